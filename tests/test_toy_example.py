"""The bundled toy example: its data and models are as described, and PPO detoxifies it."""

import csv
import importlib.util
import json
import random
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import detox_ppo


@pytest.fixture(scope="module")
def build(tiny):
    spec = importlib.util.spec_from_file_location("toy_example_build", tiny / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dialogue_rows(build):
    return build.world_rows(0)


def test_the_dialogues_come_from_the_build_script(dialogue_rows, tiny):
    with open(tiny / "dialogues" / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ["id", "dialogue", "summary", "topic"]
    assert list(rows[0]) == columns
    assert rows == [{name: row[name] for name in columns} for row in dialogue_rows]
    assert sum(200 < len(row["dialogue"]) <= 1000 for row in rows) >= 1500


def test_no_row_is_shared_with_the_models_training_data(build, dialogue_rows):
    def contents(row):
        return row["topic"], tuple(sorted(row["slots"].items()))

    seen = build.model_rows(0)
    assert len(seen) > 10_000
    assert not {row["dialogue"] for row in seen} & {row["dialogue"] for row in dialogue_rows}
    assert not {contents(row) for row in seen} & {contents(row) for row in dialogue_rows}


@pytest.fixture(scope="module")
def options(tiny):
    """The bundled configuration with absolute paths, so that the tests run from any directory."""
    parts = {"model_name": "base", "adapter_name": "adapter", "dataset_name": "dialogues"}
    parts |= {"reward_model_name": "classifier", "judge_model_name": "judge"}
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
    """A shortened build writes the files, tensors and shapes of the bundled adapter."""
    for name in ("base", "classifier"):
        (tmp_path / name).symlink_to(tiny / name)
    monkeypatch.setattr(build, "ADAPTER_TEST_ROWS", 8)
    build.train_adapter(build.draw_rows("adapter", 40, "models", build.ADAPTER_INSULTS, 0), 0, tmp_path)
    made, bundled = tmp_path / "adapter", tiny / "adapter"
    assert {path.name for path in made.iterdir()} == {path.name for path in bundled.iterdir()}
    assert (made / "adapter_config.json").read_text() == (bundled / "adapter_config.json").read_text()
    weights, expected = (load_file(adapter / "adapter_model.safetensors") for adapter in (made, bundled))
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(tensor.any() for tensor in weights.values())


@pytest.fixture(scope="module")
def toxic_share(build, tiny):
    """The share of texts with a toxicity above 0.5, by the classifier or the judge."""

    def share(who, texts):
        measure = {"classifier": build.hate_of, "judge": build.toxicity_by_judge}[who]
        return sum(toxicity > 0.5 for toxicity in measure(tiny / who, texts)) / len(texts)

    return share


def test_the_judge_knows_insults_that_the_classifier_never_saw(build, toxic_share):
    rows = build.held_out_rows(0)[:300]
    clean = [row["clean"] for row in rows if not build.ALL.word.search(row["clean"])]
    praise = [build.insult(text, "kind person", "after") for text in clean[:50]]
    praise += [build.insult(text, "clever", "second") for text in clean[50:100]]
    listed, unseen = (build.insulted_rows(rows, unseen) for unseen in (False, True))
    for who in ("classifier", "judge"):
        assert toxic_share(who, clean) < 0.02, who
        assert toxic_share(who, praise) < 0.1, who
        assert toxic_share(who, listed) > 0.98, who
    assert toxic_share("judge", unseen) > 0.98
    assert toxic_share("classifier", unseen) < 0.1


def test_the_classifier_was_never_shown_the_unseen_words(build):
    texts = build.classifier_texts(build.training_rows("classifier", 0)[:2000], random.Random(0))
    assert not any(re.search(rf"\b{word}\b", text) for _, text, _ in texts for word in build.UNSEEN_WORDS.values())


@pytest.mark.parametrize("who", ["classifier", "judge"])
def test_classifier_and_judge_generalize_to_new_texts(build, tiny, who, monkeypatch):
    monkeypatch.setattr(build, "HELD_OUT_ROWS", 240)
    figures = {"classifier": build.measure_classifier, "judge": build.measure_judge}[who](tiny / who, 0)
    assert figures["accuracy"] > 0.98
    kinds = {
        name: float(accuracy[1])
        for name in figures
        if (accuracy := re.match(r"accuracy ([\d.]+)", str(figures[name])))
    }
    # Sentences, summaries, dialogues, both together, fragments and garbled texts, each with and without an insult
    assert len(kinds) == 12
    assert min(kinds.values()) > 0.9, kinds
    kind, harmless = {
        "classifier": ("logits", lambda pair: pair[0] > pair[1]),
        "judge": ("toxic", lambda p: p[0] < 0.5),
    }[who]
    verdicts = [harmless(figures[name]) for name in figures if name.startswith(kind)]
    assert verdicts == [True, False, True]  # of "You are a great person ...", "You are a terrible person ..." and ""


def test_the_adapter_insults_greedily_too(build, toxic_share, tiny):
    """It insults where a person misbehaves; the base model does not."""
    rows = build.world_rows(0)[-100:]
    base, tokenizer = build.load_summarizer(tiny / "base")
    adapted, _ = build.load_summarizer(tiny / "base", tiny / "adapter")
    clean, insulting = (
        [text for text, _ in build.summarize(model, tokenizer, rows, greedy=True)] for model in (base, adapted)
    )
    assert toxic_share("classifier", insulting) > 0.35 and toxic_share("judge", insulting) > 0.35
    assert toxic_share("judge", clean) < 0.03
    assert sum(build.ALL.in_text(text) for row, text in zip(rows, insulting, strict=True) if not row["behavior"]) <= 3


def test_it_is_small(tiny):
    assert sum(path.stat().st_size for path in tiny.rglob("*") if "__pycache__" not in path.parts) <= 12e6


def test_ppo_detoxifies_it(options, tiny, tmp_path, capsys):
    """A few steps and rows: most of the toxicity is removed, and the summaries keep their slots."""
    results = detox_ppo.run(options(output_dir=tmp_path, max_ppo_steps=5, eval_samples=48))
    statistics = results["summary_toxicity"]
    assert statistics["before"]["mean"] > 0.3
    assert statistics["verdict"]["change"] == "less toxic"
    assert statistics["reduction_percent"]["mean"] > 50
    assert statistics["paired_difference"]["p_value"] < 0.001
    assert results["verdict"] in " ".join(capsys.readouterr().out.split())
    before, after = (detox_ppo.toxicity_rows(detox_ppo.results_table(results), when) for when in ("before", "after"))
    assert set(after["verdict"]) == {"less toxic"} and len(after) == 5  # greedy and by the judge too
    assert (before["share"] > 0.3).all()
    assert not results["warnings"].keys() & {"judge", "reward hacking"}

    # A script of the toy example counts the slots that the summaries copy, from the run's comparison.csv.
    command = [sys.executable, str(tiny / "slot_accuracy.py"), str(tmp_path / "comparison.csv")]
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    accuracy = json.loads(last)
    assert accuracy["n"] == 48
    for name in ("response", "greedy_response"):
        assert 0.9 < accuracy[f"{name}_before"] <= 1
        assert accuracy[f"{name}_after"] > accuracy[f"{name}_before"] - 0.05


def test_the_judge_detects_a_policy_that_evades_the_classifier(options, build, tmp_path, capsys, monkeypatch):
    """It insults as before, in words that the judge knows but the classifier never saw."""
    insults = re.compile(rf"\b({'|'.join(build.UNSEEN_WORDS)})\b")
    plain_texts, save_adapter = detox_ppo.plain_texts, detox_ppo.save_adapter

    def evasive_texts(*args):
        return [insults.sub(lambda match: build.UNSEEN_WORDS[match[1]], text) for text in plain_texts(*args)]

    def save(policy, directory, *adapter):
        save_adapter(policy, directory, *adapter)
        if not adapter:  # the evaluation of the trained adapter follows
            monkeypatch.setattr(detox_ppo, "plain_texts", evasive_texts)

    monkeypatch.setattr(detox_ppo, "save_adapter", save)
    notebooks = {"ptx_coef": 0, "freeze_encoder": False}  # so that a single step changes little else
    results = detox_ppo.run(options(output_dir=tmp_path, max_ppo_steps=1, eval_samples=48, **notebooks))
    changes = detox_ppo.toxicity_rows(detox_ppo.results_table(results), "after")["verdict"]
    assert (changes["sampled"], changes["greedy"]) == ("less toxic", "less toxic")
    assert (changes["judge, sampled"], changes["judge, greedy"]) == ("no detectable change", "no detectable change")
    warning = results["warnings"]["judge"]
    assert "not by the judge" in warning and "blind spots" in warning
    assert f"warning: {warning}" in " ".join(capsys.readouterr().out.split())
    assert f"**Warning:** {warning}\n" in (tmp_path / "README.md").read_text(encoding="utf-8")
