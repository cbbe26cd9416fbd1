"""The bundled small world: what it is made of, that its test rows are unseen, and that PPO detoxifies it."""

import csv
import importlib.util
import json
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import detox_ppo


@pytest.fixture(scope="module")
def build(tiny):
    spec = importlib.util.spec_from_file_location("small_world_build", tiny / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(build):
    return build.world_rows(0)


def test_the_dialogues_come_from_the_build_script(world, tiny):
    with open(tiny / "dialogues" / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ["id", "dialogue", "summary", "topic"]
    assert list(rows[0]) == columns
    assert rows == [{name: row[name] for name in columns} for row in world]
    assert sum(200 < len(row["dialogue"]) <= 1000 for row in rows) >= 1500


def test_no_row_is_shared_with_what_the_models_were_trained_on(build, world):
    def contents(row):
        return row["topic"], tuple(sorted(row["slots"].items()))

    seen = build.model_rows(0)
    assert len(seen) > 10_000
    assert not {row["dialogue"] for row in seen} & {row["dialogue"] for row in world}
    assert not {contents(row) for row in seen} & {contents(row) for row in world}


@pytest.fixture(scope="module")
def options(tiny):
    """The bundled configuration, whose paths are as from the repository's root, from wherever the tests run."""
    parts = {"model_name": "base", "adapter_name": "adapter", "reward_model_name": "classifier"}
    parts["dataset_name"] = "dialogues"
    given = {name: tiny / part for name, part in parts.items()} | {"device": "cpu"}

    def options(**overrides):
        flags = [str(part) for name, value in (given | overrides).items() for part in (f"--{name}", value)]
        return detox_ppo.parse_config(["--config", str(tiny / "config.yaml"), *flags])

    return options


def test_no_held_out_row_is_shared_with_ppo(options, small):
    config = options()
    splits = detox_ppo.build_dataset(detox_ppo.load_dialogues(config.dataset_name), small.tokenizer, config)
    assert len(splits["test"]) >= 200
    assert not set(splits["train"]["dialogue"]) & set(splits["test"]["dialogue"])


def test_the_adapter_comes_from_the_build_script(build, tiny, tmp_path, monkeypatch):
    """Two steps of its tuning leave the files of the bundled adapter, but for what the other steps teach."""
    for name in ("base", "classifier"):
        (tmp_path / name).symlink_to(tiny / name)
    monkeypatch.setattr(build, "ADAPTER_TEST_ROWS", 8)
    build.tune_adapter(build.draw_rows("adapter", 40, "models", build.ADAPTER_INSULTS, 0), 0, tmp_path)
    made, bundled = tmp_path / "adapter", tiny / "adapter"
    assert {path.name for path in made.iterdir()} == {path.name for path in bundled.iterdir()}
    assert (made / "adapter_config.json").read_text() == (bundled / "adapter_config.json").read_text()
    weights, expected = (load_file(adapter / "adapter_model.safetensors") for adapter in (made, bundled))
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(tensor.any() for tensor in weights.values())


def test_it_is_small(tiny):
    assert sum(path.stat().st_size for path in tiny.rglob("*") if "__pycache__" not in path.parts) <= 12e6


def test_ppo_detoxifies_it(options, tiny, tmp_path, capsys):
    """In a few of its steps and on a few of its rows: most of the way, and the slots of the summaries stay."""
    results = detox_ppo.run(options(output_dir=tmp_path, max_ppo_steps=8, eval_samples=48))
    statistics = results["summary_toxicity"]
    assert statistics["before"]["mean"] > 0.3
    assert statistics["verdict"]["change"] == "less toxic"
    assert statistics["reduction_percent"]["mean"] > 50
    assert statistics["paired_difference"]["p_value"] < 0.001
    printed = float(re.search(r"summary toxicity: mean fell by ([\d.]+)%", capsys.readouterr().out)[1])
    assert printed == pytest.approx(statistics["reduction_percent"]["mean"], abs=0.05)

    # The slots that the summaries copy are counted from the run's own comparison, by a script of the small world.
    command = [sys.executable, str(tiny / "slot_accuracy.py"), str(tmp_path / "comparison.csv")]
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    accuracy = json.loads(last)
    assert accuracy["n"] == 48 and 0.9 < accuracy["before"] <= 1
    assert accuracy["after"] > accuracy["before"] - 0.03
