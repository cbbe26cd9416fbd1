"""The default model names with the real tokenizers, configs and dialogues, and random weights.

The real files are not part of the repository; without them these tests are skipped.
"""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, T5Config

import detox_ppo

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REAL, DIALOGSUM = SHARED / "real", SHARED / "data" / "dialogsum"
NOTEBOOKS = "peft-dialogue-summary-checkpoint-from-s3"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real tokenizers and dialogues are not here")


def write_weights(kind, config, directory):
    """Random weights in the shapes of a config; repeating random numbers is faster than drawing them all."""
    with torch.device("meta"):
        model = kind.from_config(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if json.loads((directory / "config.json").read_text()).get("tie_word_embeddings") is False:  # FLAN-T5
        shapes["lm_head.weight"] = shapes["shared.weight"]
    drawn = torch.randn(2**20 + 1)
    weights = {}
    for name, shape in shapes.items():
        count, start = math.prod(shape), len(weights)  # no two tensors are equal: transformers would tie them
        values = drawn.repeat(-(-(start + count) // len(drawn)))[start : start + count].reshape(shape)
        weights[name] = torch.ones(shape) if "layer_norm" in name else 0.02 * values
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def real_repositories(directory):
    """(models, datasets) for the stand-in hub under the default names."""
    kinds = {hub.BASE: AutoModelForSeq2SeqLM, hub.CLASSIFIER: AutoModelForSequenceClassification}
    for name, kind in kinds.items():
        shutil.copytree(REAL / Path(name).name, directory / name)
        write_weights(kind, AutoConfig.from_pretrained(directory / name), directory / name)
    (directory / hub.DIALOGUES).mkdir(parents=True)
    for file, name in {"train": "train", "dev": "validation", "test": "test"}.items():
        rows = pd.read_json(DIALOGSUM / f"{file}.jsonl", lines=True, dtype=False)
        rows = rows.rename(columns={"fname": "id", "summary1": "summary", "topic1": "topic"})
        rows[["id", "dialogue", "summary", "topic"]].to_csv(directory / hub.DIALOGUES / f"{name}.csv", index=False)
    return {name: directory / name for name in kinds}, {hub.DIALOGUES: directory / hub.DIALOGUES}


def write_notebooks_adapter(directory):
    """The notebooks' adapter: an old adapter_config.json, adapter_model.bin and tokenizer files."""
    shutil.copytree(REAL / "adapters" / NOTEBOOKS, directory)
    for name in ("special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(REAL / "flan-t5-base" / name, directory / name)
    modules = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(12)]
    modules += [f"decoder.block.{i}.layer.{j}" for i in range(12) for j in ("0.SelfAttention", "1.EncDecAttention")]
    weights = {}
    for module, layer in itertools.product(modules, "qv"):
        for part, shape in {"lora_A": (32, 768), "lora_B": (768, 32)}.items():
            weights[f"base_model.model.{module}.{layer}.{part}.weight"] = 0.02 * torch.randn(shape)
    torch.save(weights, directory / "adapter_model.bin")
    return weights


def test_the_default_names_with_the_notebooks_checkpoint(tmp_path):
    torch.manual_seed(0)
    repositories = real_repositories(tmp_path / "served")
    weights = write_notebooks_adapter(tmp_path / NOTEBOOKS)
    size = (tmp_path / NOTEBOOKS / "adapter_model.bin").stat().st_size
    assert round(size / 1e6) == 14 and not (repositories[0][hub.CLASSIFIER] / "tokenizer.json").exists()
    arguments = f"--adapter_name {NOTEBOOKS}/ --max_ppo_steps 1 --batch_size 2 --mini_batch_size 1 --dtype float32 "
    arguments += "--output_min_length 4 --output_max_length 6 --eval_samples 2 --eval_max_new_tokens 4"
    command = [sys.executable, "-B", str(ROOT / "detox_ppo.py"), *arguments.split(), "--output_dir", "out"]
    with hub.StandInHub(*repositories) as served:
        environment = hub.hub_environment(served.url, tmp_path / "cache")
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for line in (
        "data: 12,460 rows, 10,022 with 200 < characters of dialogue <= 1000",
        "data: 8,017 rows to train on, 2,005 held out, in file order",
        f"data: not used from {hub.DIALOGUES}: validation, test",
        f"adapter: {NOTEBOOKS}/ (r=32, alpha=32; lora_* options unused), on 36 q, 36 v",
        "policy: trainable 3,538,944 of 251,116,800 = 1.41%",
        "policy with value head: trainable 3,539,713 of 251,117,569 = 1.41%",
        "reference: trainable 0 of 251,117,569 = 0.00%",
    ):
        assert line in done.stdout
    assert "warning: --" not in done.stdout + done.stderr
    (step,) = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert step["objective/kl"] == 0 and step["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-4)
    start, trained = (
        load_file(tmp_path / "out" / d / "adapter_model.safetensors") for d in ("start_adapter", "adapter")
    )
    assert set(start) == set(trained) == set(weights)
    assert all(torch.equal(start[name], tensor) for name, tensor in weights.items())
    moved = max((trained[name] - tensor).abs().max() for name, tensor in weights.items())
    assert 0 < moved < 1e-3  # two updates of 1.41e-5


def test_prompts_are_the_notebooks_in_flan_t5s_tokens():
    """Token ids of the first dialogue; no prompt is truncated to the tokenizer's 512 tokens."""
    tokenizer = detox_ppo.AutoTokenizer.from_pretrained(REAL / "flan-t5-base")
    rows = detox_ppo.load_dialogues(str(DIALOGSUM))
    splits = detox_ppo.build_dataset(rows, tokenizer, detox_ppo.DetoxConfig())
    lengths = [len(ids) for split in splits.values() for ids in split["input_ids"]]
    assert (len(splits["train"]), len(splits["test"]), max(lengths)) == (8017, 2005, 358)
    first = splits["train"][0]
    assert tokenizer.decode(first["input_ids"]).endswith(" Summary:</s>")
    assert first["input_ids"] == tokenizer(first["query"]).input_ids


@pytest.fixture
def roberta(tmp_path):
    """RoBERTa's tokenizer and positions with a narrow random model."""
    directory = tmp_path / "roberta"
    shutil.copytree(REAL / "roberta-hate-speech-dynabench-r4-target", directory)
    config = AutoConfig.from_pretrained(
        directory, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(directory)
    write_weights(AutoModelForSequenceClassification, config, directory)
    return detox_ppo.ToxicityClassifier(detox_ppo.DetoxConfig(reward_model_name=str(directory)), torch.device("cpu"))


def test_a_dialogue_is_cut_at_512_of_robertas_tokens(roberta):
    assert roberta.max_length == 512
    rows = detox_ppo.load_dialogues(str(DIALOGSUM)).to_pandas()
    longest = rows.loc[rows["dialogue"].str.len().nlargest(10).index]
    for dialogue, summary in zip(longest["dialogue"], longest["summary"], strict=True):
        text = roberta.join(dialogue, summary)
        beginning = text.removesuffix(summary.strip()).rstrip()
        assert text.endswith(f" {summary.strip()}")
        assert dialogue.startswith(beginning) and len(beginning) < len(dialogue)
        assert len(roberta.tokenizer(text).input_ids) <= 512
        # One more word would not have fitted.
        longer = dialogue[: len(beginning) + 40].rstrip()
        assert len(roberta.tokenizer(f"{longer} {summary.strip()}").input_ids) > 512
        assert roberta.logits([text]).isfinite().all()
    short = rows.iloc[0]
    assert (
        roberta.join(short["dialogue"], short["summary"]) == f"{short['dialogue'].strip()} {short['summary'].strip()}"
    )


def test_adapters_as_people_publish_them_on_t5_small(small_config, tmp_path, capsys):
    directory = tmp_path / "t5-small"
    shutil.copytree(REAL / "flan-t5-base", directory)
    config = T5Config(decoder_start_token_id=0)  # its defaults are T5-small's
    config.save_pretrained(directory)
    write_weights(AutoModelForSeq2SeqLM, config, directory)
    prompts, end = [[100, 200, 300, 1]], torch.tensor([[7, 8, 1]])
    for adapter in sorted((REAL / "adapters").glob("t5-small-*")):
        config = small_config(model_name=directory, adapter_name=adapter)
        policy, _ = detox_ppo.load_policy(config, torch.device("cpu"), torch.float32)
        printed = capsys.readouterr().out
        assert f"adapter: {adapter} (r=8" in printed and "on 18 q, 18 v" in printed and "warning" not in printed
        saved = peft.load_peft_weights(adapter, device="cpu")
        loaded = detox_ppo.lora_weights(policy.model)
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
        responses = detox_ppo.Responses(prompts, end, torch.tensor([3]))
        with_adapter, _ = policy.logprobs_and_values(responses)
        with policy.as_adapter("reference"):
            assert torch.equal(policy.logprobs_and_values(responses)[0], with_adapter)
        with policy.model.disable_adapter():
            assert (policy.logprobs_and_values(responses)[0] - with_adapter).abs().max() > 1e-4


@pytest.mark.parametrize("name, judge", [("hate-minilm", False), ("toxic-minilm", True)])
def test_real_classifiers_match_recorded_probabilities(name, judge):
    """The texts and probabilities stored next to the weights."""
    option = "judge_model_name" if judge else "reward_model_name"
    config = detox_ppo.DetoxConfig(**{option: str(REAL / name)})
    classifier = detox_ppo.ToxicityClassifier(config, torch.device("cpu"), judge)
    assert classifier.exclusive == (not judge) and classifier.max_length == 512
    probes = json.loads((REAL / name / "eval.json").read_text())["probes"]
    if judge:
        probes = {text: values[0] for text, values in probes.items()}
    else:
        probes = {probe["text"]: probe["p_hate"] for probe in probes}
    assert classifier.toxicity(classifier.logits(list(probes))) == pytest.approx(list(probes.values()), abs=0.001)


@pytest.mark.parametrize(
    "name, labels", [("hate-minilm", {}), ("toxic-minilm", {"reward_label": "", "toxic_label": "toxic"})]
)
def test_bfloat16_rewards_match_float32_within_a_hundredth(name, labels):
    """No difference on a processor without bfloat16 units."""
    classifier = detox_ppo.ToxicityClassifier(
        detox_ppo.DetoxConfig(reward_model_name=str(REAL / name), **labels), torch.device("cpu")
    )
    texts = list(pd.read_json(REAL / "rude-dialogues.jsonl", lines=True)["dialogue"][:100])
    exact, rounded = (
        classifier.toxicity(classifier.logits(texts, dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert min(exact) < 0.1 and max(exact) > 0.9 and rounded == pytest.approx(exact, abs=0.01)
