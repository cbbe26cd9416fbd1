"""The side-by-side timing runs, shortened and without the classic trainer's environment, and measures ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def output():
    command = [sys.executable, "benchmarks/step_time.py", "--short", "--threads", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_ours_alone_is_measured_and_the_ratios_are_null(output):
    last = json.loads(output.splitlines()[-1])
    for dtype in ("float32", "bfloat16"):
        assert last[f"ratio_{dtype}"] is None and last[f"memory_ratio_{dtype}"] is None
        assert last[f"peak_share_{dtype}"] > 0
        ours = last["details"][dtype]["ours"]
        assert last[f"seconds_{dtype}"] == {"ours": ours["step"]["median"]}
        parts = sum(ours[phase]["median"] for phase in ("rollout", "score", "optimize"))
        assert 0 < parts == pytest.approx(ours["step"]["median"], rel=0.1)
        assert ours["tokens_per_second"]["median"] > 0 and ours["peak_memory"]["median"] > 100 * 2**20
        # Four responses of 8 to 12 tokens, and the dialogues with them.
        assert 0 < ours["tokens"]["responses"] <= 4 * 12 < ours["tokens"]["classified"]
    assert "ours alone" in output


def test_the_arithmetic_counted_for_the_full_shapes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import step_time

    shape = {
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
    }
    # Of FLAN-T5-base's 247,577,856 parameters all are matrices but the embeddings, the two tables of relative
    # positions and the norms. With one token on each side every matrix works once, and every adapter, too.
    matrices = 247_577_856 - 32128 * 768 - 2 * 32 * 12 - (12 * 2 + 12 * 3 + 2) * 768
    parts = zip(step_time.encoder_flop(shape, 1), step_time.decoder_flop(shape, 1, 1), strict=True)
    frozen, adapted, attention = map(sum, parts)
    assert (frozen, adapted) == (2 * matrices, 2 * 3_538_944)
    # Twelve encoder layers and twice twelve decoder ones, each with one pair of tokens.
    assert attention == 36 * 4 * 768


def test_growth_is_measured_fitted_and_drawn(tmp_path):
    command = [sys.executable, "benchmarks/growth.py", "--short", "--threads", "1", "--output_dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    last = json.loads(run.stdout.splitlines()[-1])
    assert last == json.loads((tmp_path / "growth.json").read_text())
    assert [point["batch_size"] for point in last["batch_size"]] == [8, 16]
    assert [point["prompt_tokens"] for point in last["prompt_tokens"]] == pytest.approx([100, 200], abs=3)
    for point in last["batch_size"] + last["prompt_tokens"]:
        assert min(point["seconds"], point["memory"], point["tflop"], point["positions"]) > 0
        fitted = point["tflop"] * last["seconds_per_tflop"] + point["positions"] * last["seconds_per_position"]
        assert point["expected"] == pytest.approx(fitted)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
