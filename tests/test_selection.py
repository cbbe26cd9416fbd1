"""The choice of the best adapter by rows that nothing else sees."""

import json
import shutil

import kill_points
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import detox_ppo
from detox_ppo import build_dataset, load_dialogues, run

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def short(small_config):
    """Configurations of runs that evaluate little."""
    return lambda **options: small_config(eval_samples=2, learning_rate=1e-3, **options)


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def numbers(line):
    """What a step's training gave, without times and without what was measured beside it."""
    return {name: value for name, value in line.items() if not name.startswith(("time/", "eval/"))}


def test_rows_to_choose_by_are_no_others(small, small_config, tiny):
    dialogues = load_dialogues(str(tiny / "dialogues")).select(range(60))
    config = small_config(eval_every=1, eval_samples=5)
    splits = build_dataset(dialogues, small.tokenizer, config)
    rows = {name: list(split["row"]) for name, split in splits.items()}
    assert rows == {"train": [*range(44)], "selection": [*range(44, 48)], "test": [*range(48, 60)]}
    config = small_config(eval_every=1, eval_samples=2)
    assert len(build_dataset(dialogues, small.tokenizer, config)["selection"]) == 2
    assert set(build_dataset(dialogues, small.tokenizer, small_config())) == {"train", "test"}


@pytest.fixture
def judged(short, tmp_path, monkeypatch):
    """A run whose rows set aside get the toxicity and ROUGE-L given here, one pair for each time they are judged."""

    def start(pairs, **options):
        evaluate, quality, left = detox_ppo.evaluate_policy, detox_ppo.summary_quality, list(pairs)

        def evaluated(*args):
            found = evaluate(*args)
            if args[-1] == "choosing":
                found["summary_toxicity"], found["chosen by"] = left.pop(0)
            return found

        def rated(found, summaries):
            return quality(found, summaries) | (
                {"rougeL": float(found["chosen by"][0])} if "chosen by" in found else {}
            )

        monkeypatch.setattr(detox_ppo, "evaluate_policy", evaluated)
        monkeypatch.setattr(detox_ppo, "summary_quality", rated)
        results = run(short(output_dir=tmp_path / "run", eval_every=1, save_steps=1, **options))
        monkeypatch.undo()
        assert not left
        return results

    return start


def test_the_least_toxic_that_still_summarizes_is_kept_and_known_after_a_resume(judged, short, tmp_path):
    # Step 2 has the least toxicity and has lost its ROUGE; step 1 is the best of the others.
    pairs = [(0.5, 0.8), (0.2, 0.75), (0.1, 0.7), (0.3, 0.9)]
    best = judged(pairs, max_ppo_steps=3, save_total_limit=9)["best"]
    assert best == {"step": 1, "summary_toxicity": pytest.approx(0.2), "rougeL": 0.75}
    assert [line["eval/rougeL"] for line in read_metrics(tmp_path / "run")] == [0.75, 0.7, 0.9]
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")

    def weights(step):
        """The adapter after a step, by the names in its file."""
        found = kill_points.content(tmp_path / "run" / f"checkpoint-{step}.pt")["weights"]
        return {name.replace(".default", "").removeprefix("model."): tensor for name, tensor in found.items()}

    assert all(torch.equal(tensor, weights(1)[name]) for name, tensor in kept.items())
    assert not any(torch.equal(tensor, weights(3)[name]) for name, tensor in kept.items())
    # Elsewhere, from the newest checkpoint alone: the best adapter is in it.
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "run" / "checkpoint-3.pt", tmp_path / "elsewhere")
    again = run(short(output_dir=tmp_path / "elsewhere", eval_every=1, max_ppo_steps=3, resume="true"))
    assert again["best"] == best
    resumed = load_file(tmp_path / "elsewhere" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in kept.items())


def test_a_start_that_nothing_beats_is_kept(judged):
    results = judged([(0.1, 0.8), (0.2, 0.9)], max_ppo_steps=1)
    assert results["best"]["step"] == 0
    assert results["summary_toxicity"]["before"] == results["summary_toxicity"]["after"]


def test_judging_does_not_touch_the_training(short, tmp_path):
    for every in (1, 2):
        run(short(output_dir=tmp_path / str(every), eval_every=every, max_ppo_steps=2))
    often, once = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2")
    assert "eval/rougeL" in often[0] and "eval/rougeL" not in once[0] and "eval/rougeL" in once[1]
    assert [numbers(line) for line in often] == [numbers(line) for line in once]


def test_rows_without_summaries_are_chosen_by_toxicity_alone(short, dialogues, tmp_path):
    rows = pd.read_csv(dialogues / "train.csv")[["dialogue"]]
    rows.to_csv(tmp_path / "bare.csv", index=False)
    results = run(short(dataset_name=tmp_path / "bare.csv", output_dir=tmp_path / "run", eval_every=2))
    assert results["best"]["rougeL"] is None and set(results["best"]) == {"step", "summary_toxicity", "rougeL"}
    told = read_metrics(tmp_path / "run")[1]
    assert "eval/summary_toxicity" in told and "eval/rougeL" not in told
