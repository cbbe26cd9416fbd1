"""The benchmarks run, shortened (the side-by-side timing without the classic trainer's environment), and measure."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_ours_alone_is_measured_and_the_ratios_are_null(monkeypatch, capsys):
    import step_time

    dtypes = ("float32",)
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--short", "--threads", "1", "--dtypes", *dtypes])
    step_time.main()
    output = capsys.readouterr().out
    last = json.loads(output.splitlines()[-1])
    for dtype in dtypes:
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


def test_the_arithmetic_counted_for_the_full_shapes():
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


def test_growth_is_measured_fitted_and_drawn(tmp_path, monkeypatch, capsys):
    import growth

    # One point a line; that the fit finds its coefficients is shown below.
    monkeypatch.setattr(growth, "BATCHES", (8,))
    monkeypatch.setattr(growth, "PROMPTS", (200,))
    monkeypatch.setattr(sys, "argv", ["growth.py", "--short", "--threads", "1", "--output_dir", str(tmp_path)])
    growth.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "growth.json").read_text())
    assert [point["batch_size"] for point in last["batch_size"]] == [8]
    assert [point["prompt_tokens"] for point in last["prompt_tokens"]] == pytest.approx([200], abs=3)
    for point in last["batch_size"] + last["prompt_tokens"]:
        assert min(point["seconds"], point["memory"], point["tflop"], point["positions"]) > 0
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_fit_of_the_growth_by_hand():
    import growth

    sizes = [(1, 10), (4, 10), (2, 70), (9, 30)]
    points = [{"tflop": tflop, "positions": n, "seconds": 3 * tflop + 0.02 * n} for tflop, n in sizes]
    found = growth.fit(points)
    assert found == {"seconds_per_tflop": pytest.approx(3), "seconds_per_position": pytest.approx(0.02)}
    assert [point["expected"] for point in points] == pytest.approx([point["seconds"] for point in points])


# Memory


@pytest.fixture
def memory():
    import memory

    return memory


def test_the_memory_formula_counts_what_the_models_hold(memory, small, classifier, tiny):
    shapes = [json.loads((tiny / part / "config.json").read_text()) for part in ("base", "classifier")]
    found = memory.memory(*shapes)
    base = sum(p.numel() for name, p in small.policy.base.named_parameters() if "lora_" not in name)
    assert memory.base_parameters(shapes[0]) == base and found["weights"] == 4 * base
    assert found["adapters"] == 4 * sum(p.numel() for name, p in small.policy.named_parameters() if "lora_" in name)
    trained = sum(p.numel() for p in small.policy.parameters() if p.requires_grad)
    assert found["optimizer"] == 3 * 4 * trained
    assert found["classifier"] == 4 * sum(p.numel() for p in classifier.model.parameters())
    # Published sizes, without the adapters.
    sizes = {name: memory.base_parameters(shape) for name, shape in memory.FLAN.items()}
    assert sizes["base"] == 247_577_856 and sizes["xl"] == 2_849_757_184 and sizes["xxl"] == 11_135_332_352


def test_the_memory_formula_moves_as_it_should(memory):
    def peak(**options):
        return memory.memory(memory.FLAN["base"], dtype="bfloat16", device="cuda", **options)

    plain = peak(mini_batch_size=16)
    assert peak(mini_batch_size=16, gradient_checkpointing=True)["activations"] < 0.5 * plain["activations"]
    assert peak(mini_batch_size=8)["activations"] == plain["activations"] / 2
    assert peak(mini_batch_size=16, processes=2)["activations"] == plain["activations"] / 2
    assert peak(processes=2)["cache"] == plain["cache"] / 2 and peak(processes=2)["weights"] == plain["weights"]
    # On the CPU a pass holds few rows, however large the minibatch.
    on_cpu = [memory.memory(memory.FLAN["base"], mini_batch_size=size)["activations"] for size in (4, 16)]
    assert on_cpu[0] == on_cpu[1]


def test_the_memory_formula_meets_the_measured_peak(memory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--short", "--threads", "1"])
    memory.main()
    printed = capsys.readouterr().out
    (found,) = json.loads(printed.splitlines()[-1])["measured"]
    assert found["tensors"] == pytest.approx(found["peak"], rel=0.15)
    assert found["resident"] > found["tensors"]
    for size in ("small", "base", "large", "xl", "xxl"):
        assert f"| {size} | " in printed


# Scaling


@pytest.fixture
def scaling():
    import scaling

    return scaling


def test_scaling_is_measured_modelled_and_drawn(scaling, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--short", "--output_dir", str(tmp_path)])
    scaling.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "scaling.json").read_text())
    one, two = last["points"]
    assert (one["processes"], two["processes"], one["efficiency"]) == (1, 2, 1)
    assert two["efficiency"] == pytest.approx(one["seconds"] / 2 / two["seconds"])
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_of_communication_by_hand(scaling, monkeypatch):
    sizes = {"gradients": 100, "batch": 40, "updates": 3}
    network = 10, 0.5  # bytes a second, seconds
    assert scaling.communication(1, network, **sizes) == 0
    # Of four: three updates of 6/4 of the gradients in 6 hops, and 3/4 of the batch in 3 hops.
    assert scaling.communication(4, network, **sizes) == pytest.approx(3 * (150 / 10 + 3) + 30 / 10 + 1.5)
    monkeypatch.setattr(scaling, "LOOPBACK", network)
    measured = {n: scaling.expected(n, 2, 12, network, sizes) for n in (1, 2)}
    assert scaling.fit(measured, sizes) == pytest.approx((2, 12))


# Learning


def test_learning_curves_are_summed_up_and_drawn(tmp_path):
    """Of made-up runs: ours rises by 1 a step, the classic side by a half, and a start that was only evaluated."""
    import learning_curve

    def made_up(side, seed, slope):
        scores = [slope * step for step in range(1, 13)] if slope else []
        curve = [{"score": s, "score_without_dropout": s, "kl": 0.1, "seconds": 2.0} for s in scores]
        at = [
            {"step": n, "summary_toxicity": 0.5 / (n + 1), "rougeL": 0.9, "kl": n / 10}
            for n in ([5, 12] if slope else [0])
        ]
        evaluation = {"summary_toxicity": 0.1 + 0.1 * seed if slope else 0.4}
        return {"side": side, "batch_size": 32, "curve": curve, "held_out": at, "evaluation": evaluation}

    sides = {"start": 0, "ours": 1.0, "classic": 0.5}
    runs = [made_up(side, seed, slope) for side, slope in sides.items() for seed in (0, 1)]
    start, ours, classic = runs[:2], runs[2:4], runs[4:]
    found = learning_curve.summarize(ours, start)
    assert found["summary_toxicity"] == pytest.approx({"mean": 0.15, "min": 0.1, "max": 0.2})
    assert found["change_percent"] == pytest.approx({"mean": -62.5, "min": -75, "max": -50})
    assert found["seconds_a_step"]["mean"] == 2
    # The running mean of 1, 2, ... n passes 3 at n = 5; of half as much at 11, where the window of ten has moved on.
    assert (found["samples_to_3"]["mean"], found["seconds_to_3"]["mean"]) == (5 * 32, 5 * 2)
    assert learning_curve.summarize(classic, start)["samples_to_3"]["mean"] == 11 * 32
    assert "samples_to_3" not in learning_curve.summarize(start, start)
    assert learning_curve.on_the_way(50) == [5, 10, 20, 30, 45, 50] and learning_curve.on_the_way(3) == [3]
    learning_curve.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
