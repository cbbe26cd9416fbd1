"""The tuning before PPO: what it learns from, what it leaves, and that it works with every family of models."""

import csv
import json
import math

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
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
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import detox_ppo
from detox_ppo import (
    Responses,
    StopSignals,
    UserError,
    load_policy,
    plain_token_ids,
    score_responses,
    tune,
    tuning_loss,
)

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


def adapter_weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def adapter_of(policy, name="default"):
    return {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(policy.model, None, name).items()}


def target_loss(policy, tokenizer, rows):
    """Minus the log-probability of a token of the human summaries, as PPO scores them, in nats."""
    tokens = [torch.tensor(ids) for ids in plain_token_ids(tokenizer, list(rows["summary"]))]
    lengths = torch.tensor([len(ids) for ids in tokens])
    padded = torch.nn.utils.rnn.pad_sequence(tokens, True, policy.base.config.pad_token_id)
    responses = Responses(list(rows["input_ids"]), padded, lengths, lengths > 0, support=None)
    with torch.no_grad():
        return -score_responses(policy, responses)[0].sum() / lengths.sum()


def collated(policy, tokenizer, rows):
    labels = plain_token_ids(tokenizer, list(rows["summary"]))
    pairs = [{"input_ids": i, "labels": labels} for i, labels in zip(rows["input_ids"], labels, strict=True)]
    return DataCollatorForSeq2Seq(tokenizer, policy.base)(pairs)


@pytest.fixture
def seen(monkeypatch):
    """Every (prompt, target) that the tuning trained on, as token ids."""
    pairs, collate = [], DataCollatorForSeq2Seq.__call__

    def recorded(self, features, *args, **kwargs):
        pairs.extend((feature["input_ids"], feature["labels"]) for feature in features)
        return collate(self, features, *args, **kwargs)

    monkeypatch.setattr(DataCollatorForSeq2Seq, "__call__", recorded)
    return pairs


# What it learns


def test_it_learns_the_summaries_and_nothing_else_moves(load_small, splits, tmp_path):
    small = load_small(adapter_name="", sft_steps=30, sft_learning_rate=5e-3, sft_batch_size=8)
    before = {name: parameter.clone() for name, parameter in small.policy.named_parameters()}
    loss = target_loss(small.policy, small.tokenizer, splits["train"])
    tune(small.policy, small.tokenizer, splits["train"], small.config, tmp_path, {}, StopSignals())
    assert target_loss(small.policy, small.tokenizer, splits["train"]) < 0.9 * loss
    for name, parameter in small.policy.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
        assert parameter.requires_grad == (".default." in name or name.startswith("value_head.")), name


def test_only_the_lora_drops_out_and_only_in_the_tuning(load_small, splits, tmp_path):
    small = load_small(adapter_name="", sft_steps=2, lora_dropout=0.5)
    training = []

    def record(model, *_):
        training.append({name for name, module in model.named_modules() if module.training})

    small.policy.model.register_forward_pre_hook(record)
    tune(small.policy, small.tokenizer, splits["train"], small.config, tmp_path, {}, StopSignals())
    assert len(training) == 2
    assert (
        training[0]
        == training[1]
        == {n for n, _ in small.policy.model.named_modules() if "lora_dropout" in n}
        != set()
    )
    assert not any(module.training for module in small.policy.modules())


def test_the_tuned_adapter_is_the_reference(load_small, splits, tmp_path):
    small = load_small(sft_steps=2)
    tune(small.policy, small.tokenizer, splits["train"], small.config, tmp_path, {}, StopSignals())
    assert same(adapter_of(small.policy), adapter_of(small.policy, "reference"))
    loss = target_loss(small.policy, small.tokenizer, splits["train"])
    with small.policy.adapter("reference"):
        assert target_loss(small.policy, small.tokenizer, splits["train"]) == loss


def test_it_continues_a_given_adapter(load_small, splits, tiny, tmp_path):
    small = load_small(sft_steps=1, sft_learning_rate=1e-5)
    tune(small.policy, small.tokenizer, splits["train"], small.config, tmp_path, {}, StopSignals())
    given, tuned = adapter_weights(tiny / "adapter"), adapter_of(small.policy)
    assert not same(given, tuned)
    assert all((tuned[name] - given[name]).abs().max() < 2e-5 for name in given)


def test_the_adapter_is_tuned_in_float32_on_a_bfloat16_base(load_small, splits, tmp_path):
    small = load_small(torch.bfloat16, sft_steps=1, sft_learning_rate=1e-5)
    before = adapter_of(small.policy)
    tune(small.policy, small.tokenizer, splits["train"], small.config, tmp_path, {}, StopSignals())
    for name, tensor in adapter_of(small.policy).items():
        assert tensor.dtype == torch.float32
        # bfloat16 would round a step this small away
        assert ((tensor - before[name]).abs() > 0.5e-5).float().mean() > 0.9, name
    assert small.policy.base.dtype == torch.bfloat16


def test_long_summaries_are_cut_without_an_end(load_small, splits, seen, tmp_path):
    small = load_small(sft_steps=4, sft_batch_size=8, sft_max_target_length=18)
    tune(small.policy, small.tokenizer, splits["train"], small.config, tmp_path, {}, StopSignals())
    texts = plain_token_ids(small.tokenizer, list(splits["train"]["summary"]))
    whole = dict(zip(map(tuple, splits["train"]["input_ids"]), texts, strict=True))
    assert len(seen) == len(splits["train"])
    for prompt, target in seen:
        assert target == whole[tuple(prompt)][:18]
    ends = [target[-1] == small.tokenizer.eos_token_id for _, target in seen]
    assert any(ends) and not all(ends)


def test_the_loss_by_hand():
    logits = torch.tensor([[[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]], [[3.0, 0.0, 0.0], [9.0, 9.0, 9.0]]])
    labels = torch.tensor([[1, 2], [0, -100]])
    expected = [
        math.log(math.exp(1) + math.exp(2) + math.exp(0.5)) - 2,
        math.log(3),
        math.log(math.exp(3) + 2) - 3,
    ]
    outputs = transformers.modeling_outputs.Seq2SeqLMOutput(logits=logits)
    assert tuning_loss(outputs, labels).item() == pytest.approx(sum(expected) / 3)
    assert (
        tuning_loss(transformers.modeling_outputs.Seq2SeqLMOutput(logits=logits.bfloat16()), labels).dtype
        == torch.float32
    )


# What a run does with it


def test_a_run_that_tunes(small_config, jsonl, rows, tmp_path, capsys):
    options = {"dataset_name": jsonl("rows.jsonl", rows), "adapter_name": "", "eval_max_new_tokens": 24}
    options |= {"sft_steps": 20, "sft_learning_rate": 2e-2, "sft_batch_size": 8}
    results = detox_ppo.run(small_config(output_dir=tmp_path / "first", max_ppo_steps=1, **options))
    whens = ["base", "before", "after"]
    assert [list(results[name]) for name in ("rouge", "length", "reward")] == [whens] * 3
    printed = capsys.readouterr().out
    scores = ", ".join(f"{results['rouge'][when]['rougeL']:.4f} {when}" for when in whens)
    assert f"rougeL: {scores}\n" in printed
    assert printed.count("tuning step ") == 10 and "toxicity [mean, std] before tuning: [" in printed
    assert results["rouge"]["base"] != results["rouge"]["before"]
    # the reference is the tuned adapter
    (line,) = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["objective/kl"] == 0

    # the base of a run that tunes is what a run without it starts from
    bare = detox_ppo.run(small_config(output_dir=tmp_path / "bare", max_ppo_steps=0, **options | {"sft_steps": 0}))
    assert bare["rouge"]["before"] == results["rouge"]["base"]
    assert not (tmp_path / "bare" / "sft_adapter").exists()

    # and the next run can start from what it left, as anything else can that knows PEFT
    options |= {"adapter_name": tmp_path / "first" / "sft_adapter", "sft_steps": 0}
    again = detox_ppo.run(small_config(output_dir=tmp_path / "again", max_ppo_steps=0, **options))
    assert again["rouge"]["before"] == results["rouge"]["before"]
    assert again["reward"]["before"] == results["reward"]["before"]


def test_test_rows_are_never_seen(small_config, jsonl, rows, tmp_path, seen, small):
    def tuned(name, rows):
        options = {"dataset_name": jsonl(f"{name}.jsonl", rows), "max_ppo_steps": 0, "eval_max_new_tokens": 2}
        detox_ppo.run(small_config(output_dir=tmp_path / name, sft_steps=5, sft_batch_size=8, **options))
        return adapter_weights(tmp_path / name / "sft_adapter")

    weights = tuned("whole", rows)
    prompts = [small.tokenizer(detox_ppo.build_prompt(row["dialogue"])).input_ids for row in rows]
    found = {prompts.index(prompt) for prompt, _ in seen}
    assert found == set(range(32))  # of 40 rows, a fifth at the end is for tests
    # Whatever the test rows say, the tuned adapter is the same, and one other summary to train on changes it.
    other = [row | {"dialogue": row["dialogue"].upper(), "summary": "Nothing of this."} for row in rows]
    assert same(weights, tuned("other test rows", rows[:32] + other[32:]))
    assert not same(weights, tuned("another training row", other[:1] + rows[1:]))


# Families of models. Each is small, random and of its own kind: configuration, start token and tokenizer.


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
    """transformers ties the head of every T5 built in memory; FLAN-T5's and mT5's are on their own."""
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.2)
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs", None)
    (directory / "config.json").write_text(json.dumps(config))


def flan_t5(directory, tokenizer):
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **T5_SHAPE)
    untied(T5ForConditionalGeneration(config), directory)


def mt5(directory, tokenizer):
    config = MT5Config(vocab_size=len(tokenizer) + 7, **T5_SHAPE)  # as mT5's, padded beyond its tokens
    untied(MT5ForConditionalGeneration(config), directory)


def bart(directory, tokenizer):
    layers = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in BART_SHAPE.items()}
    config = BartConfig(vocab_size=len(tokenizer), d_model=32, init_std=0.3, **layers)
    BartForConditionalGeneration(config).save_pretrained(directory)


BART_SHAPE = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
FAMILIES = {
    "T5": (t5, t5_tokenizer, 0, {"q", "v"}),
    "FLAN-T5": (flan_t5, t5_tokenizer, 0, {"q", "v"}),
    "mT5": (mt5, t5_tokenizer, 0, {"q", "v"}),
    "BART": (bart, bart_tokenizer, 2, {"q_proj", "v_proj"}),
}


@pytest.mark.parametrize("make, make_tokenizer, start, modules", FAMILIES.values(), ids=FAMILIES)
def test_families(small_config, jsonl, rows, tmp_path, make, make_tokenizer, start, modules):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    make(tmp_path / "base", tokenizer)
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"model_name": tmp_path / "base", "adapter_name": "", "dataset_name": jsonl("rows.jsonl", rows)}
    options |= {"sft_steps": 3, "sft_learning_rate": 1e-2, "sft_batch_size": 4, "max_ppo_steps": 1, "eval_samples": 2}
    config = small_config(output_dir=tmp_path / "run", **options)

    # Tuning and PPO score a summary alike, which takes the same start token, the same head and the same mask.
    policy, tokenizer = load_policy(config, CPU, torch.float32)
    assert policy.base.config.decoder_start_token_id == start
    splits = detox_ppo.build_dataset(*detox_ppo.load_dialogues(config.dataset_name), tokenizer, config)
    batch = collated(policy, tokenizer, splits["train"].select(range(4)))
    assert set(batch["decoder_input_ids"][:, 0].tolist()) == {start}
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = tuning_loss(policy.model(**batch), labels)
        plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()(**batch, labels=labels).loss
    torch.testing.assert_close(loss, target_loss(policy, tokenizer, splits["train"].select(range(4))))
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-4)

    results = detox_ppo.run(config)
    assert all(math.isfinite(score) for scores in results["rouge"].values() for score in scores.values())
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["objective/kl"] == pytest.approx(0, abs=1e-5)
    for name in ("sft_adapter", "adapter"):
        loaded = peft.PeftConfig.from_pretrained(tmp_path / "run" / name)
        assert loaded.target_modules == modules
        weights = adapter_weights(tmp_path / "run" / name)
        assert all(weights[key].any() for key in weights if "lora_B" in key)


def test_a_family_that_makes_its_logits_otherwise_is_refused(small_config, tmp_path):
    tokenizer = t5_tokenizer()
    UMT5ForConditionalGeneration(UMT5Config(vocab_size=len(tokenizer), **T5_SHAPE)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = small_config(model_name=tmp_path, adapter_name="", lora_target_modules="q")
    policy, _ = load_policy(config, CPU, torch.float32)
    with pytest.raises(UserError, match="umt5 makes its logits in another way"):
        detox_ppo.check_logits(policy, config)


def test_a_family_that_peft_does_not_know_wants_its_layers_named(small_config, tiny, tmp_path):
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    PegasusForConditionalGeneration(PegasusConfig(vocab_size=200, **shape)).save_pretrained(tmp_path)
    t5_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--lora_target_modules"):
        load_policy(small_config(model_name=tmp_path, adapter_name=""), CPU, torch.float32)
    config = small_config(model_name=tmp_path, adapter_name="", lora_target_modules="q_proj")
    assert load_policy(config, CPU, torch.float32)[0].model.peft_config["default"].target_modules == {"q_proj"}
