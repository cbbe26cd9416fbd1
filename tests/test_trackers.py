"""Trackers: they receive the values of the files, and using one does not change the run."""

import json

import pytest
import torch
from safetensors.torch import load_file

import detox_ppo
from detox_ppo import UserError, run, start_tracker

pytestmark = pytest.mark.usefixtures("quick")


def test_tensorboard_holds_every_metric_and_the_results(small_config, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    results = run(small_config(output_dir=tmp_path / "tracked", report_to="tensorboard", eval_samples=2))
    events = accumulator.EventAccumulator(str(tmp_path / "tracked" / "detox_ppo"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "tracked" / "metrics.jsonl").read_text().splitlines()]
    for name in lines[0]:
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2]
        assert [point.value for point in points] == pytest.approx([line[name] for line in lines], rel=1e-6)
    (final,) = events.Scalars("final/summary_toxicity/after/mean")
    assert final.step == 2 and final.value == pytest.approx(results["summary_toxicity"]["after"]["mean"], rel=1e-6)
    tags = set(events.Tags()["scalars"])
    assert {"final/rouge/after/rougeL", "final/quality/after/kl", "final/human/toxicity/mean"} <= tags
    assert not [tag for tag in tags if tag.startswith(("final/config", "final/environment", "final/timings"))]

    untracked = run(small_config(output_dir=tmp_path / "untracked", eval_samples=2))
    assert untracked["reward"] == results["reward"]
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("tracked", "untracked")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "untracked" / "detox_ppo").exists()


def test_starting_a_tracker_changes_no_state(small_config, tmp_path):
    pytest.importorskip("tensorboard")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    tracker = start_tracker(small_config(output_dir=tmp_path, report_to="tensorboard"))
    tracker.end_training()
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert torch.get_default_device() == torch.device("cpu") and torch.get_default_dtype() == torch.float32
    assert start_tracker(small_config(output_dir=tmp_path)) is None


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed(small_config, tmp_path, monkeypatch, name):
    monkeypatch.setattr(detox_ppo, "get_available_trackers", list)
    monkeypatch.setattr(detox_ppo, "load_dialogues", lambda *_: pytest.fail("it loads first"))
    with pytest.raises(UserError, match=f"^--report_to {name}: .*pip install {name}"):
        run(small_config(output_dir=tmp_path, report_to=name))


def test_a_tracker_that_does_not_start(small_config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")

    def fail(*_):
        raise RuntimeError("no key\nfor it")

    monkeypatch.setattr(detox_ppo.Accelerator, "init_trackers", fail)
    with pytest.raises(UserError, match="^--report_to tensorboard: can't be loaded: RuntimeError: no key for it$"):
        start_tracker(small_config(output_dir=tmp_path, report_to="tensorboard"))
