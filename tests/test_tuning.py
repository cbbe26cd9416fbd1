"""SFT before PPO: its targets, its output, and that it works with each family of models."""

import csv
import dataclasses
import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    DataCollatorForSeq2Seq,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import detox_ppo
from detox_ppo import Responses, UserError, load_policy, rows_of_step, sft_step

pytestmark = pytest.mark.usefixtures("quick")


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tiny):
    with open(tiny / "dialogues" / "train.csv", newline="", encoding="utf-8") as file:
        return [row for row, _ in zip(csv.DictReader(file), range(40), strict=False)]


@pytest.fixture
def jsonl(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def run_sft(small, rows):
    """All SFT steps of a run; returns their losses."""
    config, optimizer = small.config, torch.optim.AdamW(small.policy.trainable_parameters(), weight_decay=0)
    losses = []
    for step in range(1, config.sft_steps + 1):
        batch = rows.select(rows_of_step(len(rows), config.sft_batch_size, config.seed, detox_ppo.SFT, step))
        losses.append(sft_step(small.policy, small.tokenizer, optimizer, batch, step, config))
    return losses


def test_non_finite_gradients_change_no_weight(load_small, splits, monkeypatch):
    small = load_small(sft_steps=2, sft_batch_size=4)
    before, forward = adapter_of(small.policy), detox_ppo.Policy.forward
    monkeypatch.setattr(detox_ppo.Policy, "forward", lambda *args: tuple(math.nan * x for x in forward(*args)))
    with pytest.raises(UserError, match="SFT step 1: the gradients are not finite. .* sft_learning_rate"):
        run_sft(small, splits["train"])
    assert same(before, adapter_of(small.policy))


def adapter_weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def adapter_of(policy):
    return {key: tensor.clone() for key, tensor in detox_ppo.lora_weights(policy.model).items()}


def summaries_of(tokenizer, rows):
    """The human summaries, as responses to score."""
    tokens = [torch.tensor(tokenizer(text).input_ids) for text in rows["summary"]]
    padded = torch.nn.utils.rnn.pad_sequence(tokens, True, tokenizer.pad_token_id)
    return Responses(list(rows["input_ids"]), padded, torch.tensor([len(ids) for ids in tokens]))


def target_loss(policy, tokenizer, rows):
    """Mean negative log-probability per token of the human summaries, as PPO scores them."""
    summaries = summaries_of(tokenizer, rows)
    return (-policy.logprobs_and_values(summaries)[0].sum() / summaries.lengths.sum()).item()


def test_nothing_follows_the_eos_of_a_summary(load_small, splits):
    """mBART's tokenizer, for example, adds the language after EOS."""
    small = load_small()
    batch = splits["train"].select(range(4))
    expected = detox_ppo.tokenize_summaries(small.policy, small.tokenizer, batch, small.config)
    tail = [("</s>", small.tokenizer.eos_token_id), ("<pad>", small.tokenizer.pad_token_id)]
    small.tokenizer._tokenizer.post_processor = processors.TemplateProcessing("$A </s> <pad>", None, tail)
    assert small.tokenizer(batch["summary"][0]).input_ids[-2:] == [token for _, token in tail]
    actual = detox_ppo.tokenize_summaries(small.policy, small.tokenizer, batch, small.config)
    assert torch.equal(actual.tokens, expected.tokens) and torch.equal(actual.lengths, expected.lengths)


@pytest.fixture
def seen(monkeypatch):
    """Every (prompt, target) pair that SFT trains on, as token ids."""
    pairs, forward = [], detox_ppo.Policy.forward

    def recorded(policy, responses):
        load_check = responses.prompts[0] == responses.tokens[0].tolist()  # the check of a newly loaded model
        if torch.is_grad_enabled() and not load_check:
            targets = zip(responses.tokens.tolist(), responses.lengths.tolist(), strict=True)
            pairs.extend(zip(responses.prompts, [tokens[:length] for tokens, length in targets], strict=True))
        return forward(policy, responses)

    monkeypatch.setattr(detox_ppo.Policy, "forward", recorded)
    return pairs


# Learning


def test_it_learns_the_summaries_and_changes_only_the_adapter(load_small, splits):
    small = load_small(adapter_name="", sft_steps=12, sft_learning_rate=1e-2, sft_batch_size=8)
    before = {name: parameter.clone() for name, parameter in small.policy.named_parameters()}
    loss = target_loss(small.policy, small.tokenizer, splits["train"])
    losses = run_sft(small, splits["train"])
    assert target_loss(small.policy, small.tokenizer, splits["train"]) < 0.9 * loss
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    for name, parameter in small.policy.named_parameters():
        assert torch.equal(parameter, before[name]) != (".default." in name), name
        assert parameter.requires_grad == (".default." in name or name.startswith("value_head.")), name


def test_only_the_lora_uses_dropout_and_only_in_sft(load_small, splits, tiny):
    assert json.loads((tiny / "base" / "config.json").read_text())["dropout_rate"] > 0
    small = load_small(adapter_name="", sft_steps=2, sft_batch_size=32, sft_learning_rate=1e-2, lora_dropout=0.5)
    optimizer = torch.optim.AdamW(small.policy.trainable_parameters(), weight_decay=0)
    for step in (1, 2):
        expected = target_loss(small.policy, small.tokenizer, splits["train"])
        loss = sft_step(small.policy, small.tokenizer, optimizer, splits["train"], step, small.config)
        # A new LoRA is zero at first, so dropout has no effect.
        assert (loss == pytest.approx(expected, rel=1e-5)) == (step == 1)
    assert not any(module.training for module in small.policy.modules())


def test_it_continues_a_given_adapter(load_small, splits, tiny):
    small = load_small(sft_steps=1, sft_learning_rate=1e-5)
    run_sft(small, splits["train"])
    given, tuned = adapter_weights(tiny / "adapter"), adapter_of(small.policy)
    assert not same(given, tuned)
    assert all((tuned[name] - given[name]).abs().max() < 2e-5 for name in given)


def test_sft_trains_the_adapter_in_float32_on_a_bfloat16_base(load_small, splits):
    small = load_small(torch.bfloat16, sft_steps=1, sft_learning_rate=1e-5)
    before = adapter_of(small.policy)
    run_sft(small, splits["train"])
    for name, tensor in adapter_of(small.policy).items():
        assert tensor.dtype == torch.float32
        # bfloat16 would round a step this small away
        assert ((tensor - before[name]).abs() > 0.5e-5).float().mean() > 0.9, name
    assert small.policy.base.dtype == torch.bfloat16


def test_long_summaries_are_truncated_without_eos(load_small, splits, seen):
    small = load_small(sft_steps=4, sft_batch_size=8, sft_max_target_length=18)
    run_sft(small, splits["train"])
    texts = small.tokenizer(list(splits["train"]["summary"])).input_ids
    full_targets = dict(zip(map(tuple, splits["train"]["input_ids"]), texts, strict=True))
    assert len(seen) == len(splits["train"])
    for prompt, target in seen:
        assert target == full_targets[tuple(prompt)][:18]
    ends = [target[-1] == small.tokenizer.eos_token_id for _, target in seen]
    assert any(ends) and not all(ends)


class WithoutEos:
    """A tokenizer that adds no EOS, as Gemma's."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **kwargs):
        encoded = self.tokenizer(texts, **kwargs)
        for column in encoded.values():
            column[:] = [row[:-1] for row in column]
        return encoded


def test_summaries_end_with_eos_whether_or_not_the_tokenizer_adds_it(small, splits):
    batch = splits["train"].select(range(8))
    config = dataclasses.replace(small.config, sft_max_target_length=18)
    expected, actual = (
        detox_ppo.tokenize_summaries(small.policy, tokenizer, batch, config)
        for tokenizer in (small.tokenizer, WithoutEos(small.tokenizer))
    )
    assert torch.equal(actual.tokens, expected.tokens) and torch.equal(actual.lengths, expected.lengths)
    assert (actual.tokens == small.tokenizer.eos_token_id).any() and actual.lengths.max() == 18


# Runs with SFT


def test_a_run_with_sft(small_config, jsonl, rows, tmp_path, capsys):
    options = {"dataset_name": jsonl("rows.jsonl", rows), "adapter_name": "", "eval_max_new_tokens": 24}
    options |= {"sft_steps": 10, "sft_learning_rate": 2e-2, "sft_batch_size": 4}
    results = detox_ppo.run(small_config(output_dir=tmp_path / "first", max_ppo_steps=1, **options))
    whens = ["base", "before", "after"]
    assert [list(results[name]) for name in ("rouge", "length", "reward")] == [whens] * 3
    printed = capsys.readouterr().out
    assert printed.count("SFT step ") == 10 and "toxicity [mean, std] before SFT: [" in printed
    (line,) = (line.split() for line in printed.splitlines() if line.startswith("ROUGE-L "))
    expected = [block["rouge"][when]["rougeL"] for block in (results, results["greedy"]) for when in whens]
    assert [float(x) for x in line[1:]] == pytest.approx(expected, abs=1e-4)
    assert results["rouge"]["base"] != results["rouge"]["before"]
    # the reference is the SFT adapter
    (line,) = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["objective/kl"] == 0

    # the base of a run with SFT is the start of a run without it
    bare = detox_ppo.run(small_config(output_dir=tmp_path / "bare", max_ppo_steps=0, **options | {"sft_steps": 0}))
    assert bare["rouge"]["before"] == results["rouge"]["base"]
    assert not (tmp_path / "bare" / "sft_adapter").exists()

    # and the next run can start from its SFT adapter
    options |= {"adapter_name": tmp_path / "first" / "sft_adapter", "sft_steps": 0}
    again = detox_ppo.run(small_config(output_dir=tmp_path / "again", max_ppo_steps=0, **options))
    assert again["rouge"]["before"] == results["rouge"]["base"]
    assert again["rouge"]["after"] == results["rouge"]["before"]
    assert again["reward"]["after"] == results["reward"]["before"]


def test_test_rows_are_never_seen(small_config, jsonl, rows, tmp_path, seen, small):
    def tuned(name, rows):
        options = {"dataset_name": jsonl(f"{name}.jsonl", rows), "max_ppo_steps": 0, "eval_max_new_tokens": 2}
        options |= {"sft_steps": 4, "sft_batch_size": 8, "eval_samples": 1}
        detox_ppo.run(small_config(output_dir=tmp_path / name, **options))
        return adapter_weights(tmp_path / name / "sft_adapter")

    weights = tuned("whole", rows)
    prompts = [small.tokenizer(detox_ppo.build_prompt(row["dialogue"])).input_ids for row in rows]
    used_rows = {prompts.index(prompt) for prompt, _ in seen}
    assert used_rows == set(range(32))  # of 40 rows, the last fifth is held out
    # Other test rows do not change the SFT adapter; a single other training row does.
    other = [row | {"dialogue": row["dialogue"].upper(), "summary": "Nothing of this."} for row in rows]
    assert same(weights, tuned("other test rows", rows[:32] + other[32:]))
    assert not same(weights, tuned("another training row", other[:1] + rows[1:]))


# Families of models: small random models, each with its own configuration, start token and tokenizer.


def t5_tokenizer():
    letters = [("\u2581", -5.0), *((chr(code), -5.0) for code in range(33, 127) if code != 0x2581)]
    words = [(f"\u2581{word}", -2.0) for word in "the to and wants will Summarize following conversation".split()]
    return T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, *words], extra_ids=0)


def bart_tokenizer():
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return BartTokenizer(
        {piece: i for i, piece in enumerate([*specials, *alphabet, "\u0120t", "he"])}, [("\u0120", "t"), ("h", "e")]
    )


T5_SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}


def t5(directory, tokenizer):
    config = T5Config(vocab_size=len(tokenizer), **T5_SHAPE)
    T5ForConditionalGeneration(config).save_pretrained(directory)


def untied(model, directory):
    """transformers ties the head of every T5 built in memory; those of FLAN-T5 and mT5 are separate."""
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.2)
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs", None)
    (directory / "config.json").write_text(json.dumps(config))


def flan_t5(directory, tokenizer):
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **T5_SHAPE)
    untied(T5ForConditionalGeneration(config), directory)


def mt5(directory, tokenizer):
    config = MT5Config(vocab_size=len(tokenizer) + 7, **T5_SHAPE)  # like mT5's, larger than the tokenizer
    untied(MT5ForConditionalGeneration(config), directory)


def umt5(directory, tokenizer):
    config = UMT5Config(vocab_size=len(tokenizer), **T5_SHAPE)
    UMT5ForConditionalGeneration(config).save_pretrained(directory)


def bart(directory, tokenizer):
    layers = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in BART_SHAPE.items()}
    config = BartConfig(vocab_size=len(tokenizer), d_model=32, init_std=0.3, **layers)
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()  # added by the head
    model.save_pretrained(directory)


BART_SHAPE = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
T5_LAYERS, BART_LAYERS = {"q", "v"}, {"q_proj", "v_proj"}
FAMILIES = {
    "T5": (t5, t5_tokenizer, 0, T5_LAYERS, {}),
    "FLAN-T5": (flan_t5, t5_tokenizer, 0, T5_LAYERS, {}),
    "mT5": (mt5, t5_tokenizer, 0, T5_LAYERS, {}),
    "UMT5": (umt5, t5_tokenizer, 0, T5_LAYERS, {"lora_target_modules": "q v"}),  # unknown to PEFT
    "BART": (bart, bart_tokenizer, 2, BART_LAYERS, {}),
}


@pytest.mark.parametrize("make, make_tokenizer, start, layers, more", FAMILIES.values(), ids=FAMILIES)
def test_families(small_config, jsonl, rows, tmp_path, make, make_tokenizer, start, layers, more):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    make(tmp_path / "base", tokenizer)
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"model_name": tmp_path / "base", "adapter_name": "", "dataset_name": jsonl("rows.jsonl", rows), **more}
    options |= {"sft_steps": 2, "sft_learning_rate": 1e-2, "sft_batch_size": 4, "max_ppo_steps": 1, "eval_samples": 2}
    config = small_config(output_dir=tmp_path / "run", **options)

    # PPO and SFT score a summary as transformers does, with the model's own start token, head and masks.
    policy, tokenizer = load_policy(config, CPU, torch.float32)
    dataset = detox_ppo.build_dataset(detox_ppo.load_dialogues(config.dataset_name), tokenizer, config)
    batch = dataset["train"].select(range(4))
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    targets = [tokenizer(text).input_ids for text in batch["summary"]]
    pairs = [{"input_ids": i, "labels": labels} for i, labels in zip(batch["input_ids"], targets, strict=True)]
    inputs = DataCollatorForSeq2Seq(tokenizer, plain)(pairs)
    assert set(inputs["decoder_input_ids"][:, 0].tolist()) == {start}
    with torch.no_grad():
        expected = plain(**inputs)
    chosen = expected.logits.log_softmax(-1).gather(-1, inputs["labels"].clamp(min=0)[..., None])[..., 0]
    logprobs, _ = policy.logprobs_and_values(summaries_of(tokenizer, batch))
    torch.testing.assert_close(logprobs, chosen.where(inputs["labels"] >= 0, 0), rtol=0, atol=1e-5)
    optimizer = torch.optim.AdamW(policy.trainable_parameters())
    loss = sft_step(policy, tokenizer, optimizer, batch, 1, config)
    assert loss == pytest.approx(expected.loss.item(), abs=1e-5)

    results = detox_ppo.run(config)
    assert all(math.isfinite(score) for scores in results["rouge"].values() for score in scores.values())
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["objective/kl"] == pytest.approx(0, abs=1e-5)
    for name in ("sft_adapter", "adapter"):
        assert peft.PeftConfig.from_pretrained(tmp_path / "run" / name).target_modules == layers
        weights = adapter_weights(tmp_path / "run" / name)
        assert all(weights[key].any() for key in weights if "lora_B" in key)


def test_a_family_with_another_kind_of_head_is_an_error(small_config, tmp_path):
    """ProphetNet's head predicts several tokens at a time."""
    shape = {
        f"num_{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 4}.items()
    }
    config = ProphetNetConfig(vocab_size=200, hidden_size=32, encoder_ffn_dim=64, decoder_ffn_dim=64, **shape)
    ProphetNetForConditionalGeneration(config).save_pretrained(tmp_path)
    t5_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--model_name .*: can't be loaded"):
        load_policy(
            small_config(model_name=tmp_path, adapter_name="", lora_target_modules="query_proj"), CPU, torch.float32
        )


def test_a_family_unknown_to_peft_needs_target_modules(small_config, tiny, tmp_path):
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    PegasusForConditionalGeneration(PegasusConfig(vocab_size=200, **shape)).save_pretrained(tmp_path)
    t5_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--lora_target_modules"):
        load_policy(small_config(model_name=tmp_path, adapter_name=""), CPU, torch.float32)
    config = small_config(model_name=tmp_path, adapter_name="", lora_target_modules="q_proj")
    assert load_policy(config, CPU, torch.float32)[0].model.peft_config["default"].target_modules == {"q_proj"}
