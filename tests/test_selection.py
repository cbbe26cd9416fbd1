"""Early stop of a step's updates, and the choice of the best adapter by rows that nothing else sees."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import detox_ppo
from detox_ppo import UserError, build_dataset, load_dialogues, run

pytestmark = pytest.mark.usefixtures("quick")


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def numbers(line):
    """What a step's training gave, without times and without what was measured beside it."""
    return {name: value for name, value in line.items() if not name.startswith(("time/", "eval/"))}


def test_updates_end_when_the_policy_has_moved_far_enough(small_config, tmp_path, monkeypatch):
    taken, step = [], torch.optim.Adam.step

    def counted(optimizer, *args, **kwargs):
        taken.append(1)
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    options = {"max_ppo_steps": 1, "ppo_epochs": 4, "learning_rate": 0.01, "eval_samples": 1}
    run(small_config(output_dir=tmp_path / "free", **options))
    (free,) = read_metrics(tmp_path / "free")
    assert len(taken) == 8 and free["ppo/early_stop"] == 0 and free["ppo/policy/policykl"] > 0.01
    taken.clear()
    run(small_config(output_dir=tmp_path / "bounded", target_policy_kl=0.001, **options))
    (bounded,) = read_metrics(tmp_path / "bounded")
    assert 1 <= len(taken) < 8 and bounded["ppo/early_stop"] == 1
    assert bounded["ppo/policy/policykl"] < free["ppo/policy/policykl"]


def test_rows_to_choose_by_are_no_others(small, small_config):
    texts = [texts[:60] for texts in load_dialogues(small.config.dataset_name)]
    config = small_config(eval_every=1, eval_samples=5)
    splits = build_dataset(*texts, small.tokenizer, config)
    rows = {name: list(split["row"]) for name, split in splits.items()}
    assert rows == {"train": [*range(44)], "selection": [*range(44, 48)], "test": [*range(48, 60)]}
    assert len(build_dataset(*texts, small.tokenizer, small_config(eval_every=1, eval_samples=2))["selection"]) == 2
    assert set(build_dataset(*texts, small.tokenizer, small_config())) == {"train", "test"}


@pytest.fixture
def judged(small_config, tmp_path, monkeypatch):
    """A run whose rows set aside get the toxicity and ROUGE-L given here, one pair for each time they are judged."""

    def start(pairs, **options):
        evaluate, quality, left = detox_ppo.evaluate_policy, detox_ppo.summary_quality, list(pairs)

        def evaluated(*args):
            found = evaluate(*args)
            if args[-1] == "choosing":
                found["summary_toxicity"] = [left[0][0]] * len(found["response"])
                found["chosen by"] = left.pop(0)[1]
            return found

        def rated(found, summaries):
            return quality(found, summaries) | ({"rougeL": found["chosen by"]} if "chosen by" in found else {})

        monkeypatch.setattr(detox_ppo, "evaluate_policy", evaluated)
        monkeypatch.setattr(detox_ppo, "summary_quality", rated)
        results = run(small_config(output_dir=tmp_path, eval_every=1, learning_rate=1e-3, **options))
        monkeypatch.undo()
        assert not left
        return results

    return start


def weights(directory):
    return load_file(directory / "adapter_model.safetensors") | load_file(directory / "value_head.safetensors")


def test_the_least_toxic_that_still_summarizes_is_kept(judged, tmp_path):
    # Step 2 has the least toxicity and has lost its ROUGE; step 1 is the best of the others.
    results = judged([(0.5, 0.8), (0.2, 0.75), (0.1, 0.7), (0.3, 0.9)], max_ppo_steps=3, save_total_limit=1)
    assert results["best"] == {"step": 1, "summary_toxicity": pytest.approx(0.2), "rougeL": 0.75}
    assert [line["eval/rougeL"] for line in read_metrics(tmp_path)] == [0.75, 0.7, 0.9]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    kept, best, last = (
        weights(tmp_path / name) for name in ("adapter", "checkpoint-1/adapter", "checkpoint-3/adapter")
    )
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert not all(torch.equal(kept[name], last[name]) for name in last)


def test_a_start_that_nothing_beats_is_kept(judged, tmp_path):
    results = judged([(0.1, 0.8), (0.2, 0.9)], max_ppo_steps=1)
    assert results["best"]["step"] == 0
    assert results["summary_toxicity"]["before"] == results["summary_toxicity"]["after"]


def test_judging_does_not_touch_the_training(small_config, tmp_path):
    options = {"learning_rate": 1e-3, "eval_samples": 2, "max_ppo_steps": 2}
    run(small_config(output_dir=tmp_path / "often", eval_every=1, **options))
    run(small_config(output_dir=tmp_path / "once", eval_every=2, **options))
    often, once = read_metrics(tmp_path / "often"), read_metrics(tmp_path / "once")
    assert "eval/rougeL" in often[0] and "eval/rougeL" not in once[0] and "eval/rougeL" in once[1]
    assert [numbers(line) for line in often] == [numbers(line) for line in once]


def test_the_best_is_known_after_a_resume_elsewhere(judged, small_config, tmp_path):
    judged([(0.5, 0.8), (0.01, 0.8), (0.3, 0.8)], max_ppo_steps=2)
    config = small_config(
        output_dir=tmp_path / "elsewhere",
        eval_every=1,
        learning_rate=1e-3,
        max_ppo_steps=2,
        resume=tmp_path / "checkpoint-2",
    )
    assert run(config)["best"]["step"] == 1
    best = weights(tmp_path / "checkpoint-1" / "adapter")
    # Once more, without the directory that the first resume went on from.
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    (tmp_path / "elsewhere" / "results.json").unlink()
    assert run(dataclasses.replace(config, resume="newest"))["best"]["step"] == 1
    for name, tensor in best.items():
        assert torch.equal(tensor, weights(tmp_path / "elsewhere" / "adapter")[name])


def test_a_best_adapter_that_was_left_behind_is_named(judged, small_config, tmp_path):
    judged([(0.5, 0.8), (0.01, 0.8), (0.3, 0.8)], max_ppo_steps=2)
    shutil.rmtree(tmp_path / "checkpoint-1")
    options = {"output_dir": tmp_path / "elsewhere", "resume": tmp_path / "checkpoint-2", "max_ppo_steps": 2}
    with pytest.raises(UserError, match="checkpoint-1: there is no such directory"):
        run(small_config(eval_every=1, learning_rate=1e-3, **options))
