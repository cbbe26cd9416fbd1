"""freeze_encoder, ptx_coef, the bounds of their passes, and R@1: is a summary nearest to its own dialogue?"""

import dataclasses

import datasets
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from test_policy import ppo, some_responses
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

import detox_ppo
from detox_ppo import (
    UserError,
    character_counts,
    clean_summaries,
    content_scores,
    micro_batches,
    random_stream,
    retrieval_at_1,
    roll_out,
    update,
)


def test_retrieval_at_1_by_hand():
    for texts in (
        ["the cat sat on the mat", "stocks fell again today", "he plays the violin"],
        ["고양이가 의자에 앉아 있다", "오늘 주식이 떨어졌다"],
        ["猫坐在椅子上睡觉", "今天股票又下跌了"],
    ):
        assert retrieval_at_1(texts, texts) == 1.0
        assert retrieval_at_1(texts, texts[1:] + texts[:1]) == 0.0
        assert retrieval_at_1(texts, [texts[0]] * len(texts)) <= 1 / len(texts) + 1e-9
        assert retrieval_at_1(texts, [""] * len(texts)) == 0.0


def test_content_scores_are_high_for_the_own_dialogue_and_low_for_another():
    dialogues = ["A: the cat sat on the mat", "A: stocks fell again today", "A: he plays the violin"]
    own, another = ([text[3:] for text in dialogues], [text[3:] for text in dialogues[1:] + dialogues[:1]])
    assert content_scores(own, dialogues, [0, 1, 2]).min() > 0.6
    assert content_scores(another, dialogues, [0, 1, 2]).max() < -0.2
    bland = content_scores(["they are talking"] * 3 + ["", " "], dialogues, [0, 1, 2, 0, 1])
    assert bland.abs().max() < 0.2 and bland[:3].mean() == pytest.approx(0, abs=1e-6)
    share_of_a_process = content_scores(own[1:2], dialogues, [1])
    assert share_of_a_process == content_scores(own, dialogues, [0, 1, 2])[1]
    assert content_scores(["the cat"], dialogues[:1], [0]) > 0  # a batch of one has no others


def test_content_is_part_of_what_ppo_maximizes(load_small, classifier, splits):
    """With the value head at 0, lam 1 and no KL, each token's return is its response's total score."""
    returns, scores = {}, {}
    for content_coef in (0, 4):
        small = load_small(content_coef=content_coef, gamma=1, lam=1)
        batch = splits["train"].select(range(4))
        responses, rollout = roll_out(small.policy, small.tokenizer, classifier, batch, 1, small.config, {})
        metrics = ppo(small, classifier, splits)
        returns[content_coef], scores[content_coef] = metrics["ppo/returns/mean"], metrics["ppo/mean_scores"]
    assert scores[0] == scores[4]
    assert metrics["ppo/mean_content"] == pytest.approx(rollout["content"].mean().item()) and rollout["content"].any()
    content = (rollout["content"] * responses.lengths).sum() / responses.lengths.sum()
    assert returns[4] - returns[0] == pytest.approx(4 * content.item(), abs=1e-5)


def test_many_short_prompts_with_long_responses_are_split_by_logit_memory(small):
    lengths, logits = [2] * 8, [2**27] * 8
    with torch.enable_grad():
        assert micro_batches(lengths, range(8), small.policy.base) == [list(range(8))]
        split = micro_batches(lengths, range(8), small.policy.base, logits)
    assert split == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("ptx_coef", [0.0, 0.5])
def test_only_the_decoder_and_the_value_head_are_trained(load_small, classifier, splits, ptx_coef):
    small = load_small(freeze_encoder=True, ptx_coef=ptx_coef)
    policy = small.policy
    before = {name: value.clone() for name, value in policy.adapters().items()}
    rows = []
    hook = policy.base.get_encoder().register_forward_hook(
        lambda _, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    metrics = ppo(small, classifier, splits)
    hook.remove()
    assert sum(rows) == 4
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert ("ppo/loss/ptx" in metrics) == (ptx_coef > 0)
    parts = metrics["ppo/loss/policy"] + small.config.vf_coef * metrics["ppo/loss/value"]
    parts += ptx_coef * metrics.get("ppo/loss/ptx", 0)
    assert metrics["ppo/loss/total"] == pytest.approx(parts, rel=1e-5)
    changed = {name for name, value in policy.adapters().items() if not torch.equal(value, before[name])}
    assert changed and any(name.startswith("value_head.") for name in changed)
    assert all(name.startswith("value_head.") or ".decoder." in name and ".default." in name for name in changed)


# What an update learns


@pytest.fixture(scope="module")
def learner(load_small):
    """A policy whose updates leave its weights as they are."""
    return load_small()


def gradients_of_update(small, batch, frozen, summaries=None, **options):
    """The gradients of each minibatch of an update on made-up responses, by name, and the update's stats."""
    policy, generator = small.policy, torch.Generator().manual_seed(0)
    options = {"batch_size": len(batch), "mini_batch_size": len(batch), "freeze_encoder": frozen} | options
    config = dataclasses.replace(small.config, **options)
    responses = some_responses(small, len(batch))
    responses.prompts = list(batch["input_ids"])
    scored = policy.logprobs_and_values(responses)
    noise = torch.randn(4, *responses.tokens.shape, generator=generator)
    rollout = {"logprobs": scored[0] + 0.3 * noise[0], "values": scored[1] + 0.3 * noise[1]}
    rollout |= {"advantages": noise[2], "returns": noise[3]}
    if frozen:
        with torch.no_grad():
            responses.encoder_states = policy.encode(responses.prompts)
    found = []
    policy.zero_grad()
    policy.freeze_encoder(frozen)
    optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=0)
    optimizer.register_step_pre_hook(
        lambda *_: found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    )
    stats = update(policy, optimizer, responses, summaries, rollout, 1, config)
    policy.freeze_encoder(False)
    assert stats["ppo/skipped_minibatches"] == 0
    return found, stats


def assert_close(found, expected):
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name


def test_a_frozen_encoder_leaves_the_other_gradients_as_they_are(learner, splits):
    batch = splits["train"].select(range(12))
    (expected,), stats = gradients_of_update(learner, batch, frozen=False)
    (found,), frozen_stats = gradients_of_update(learner, batch, frozen=True)
    assert frozen_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)
    of_the_encoder = {name for name in expected if ".encoder." in name}
    assert of_the_encoder and found.keys() == expected.keys() - of_the_encoder
    assert all(gradient.any() for gradient in expected.values())
    assert_close(found, expected)


def test_a_rollout_shares_the_encoder_states_with_the_reference(load_small, classifier, splits):
    """After a step, by which policy and reference differ; without sharing, each has its own."""
    small, batch = load_small(freeze_encoder=True), splits["train"].select(range(4, 8))
    ppo(small, classifier, splits)
    rollouts = []
    for frozen in (True, False):
        config = dataclasses.replace(small.config, freeze_encoder=frozen)
        responses, rollout = roll_out(small.policy, small.tokenizer, classifier, batch, 2, config, {})
        assert (responses.encoder_states is None) != frozen
        rollouts.append(rollout | {"tokens": responses.tokens})
    torch.testing.assert_close(*rollouts, rtol=1e-4, atol=1e-4)
    assert (rollouts[0]["ref_logprobs"] - rollouts[0]["logprobs"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "dtype, frozen, passes",
    [
        (torch.float32, True, ["reference"]),
        (torch.float32, False, ["default", "reference"]),
        (torch.bfloat16, True, ["default", "reference"]),
    ],
)
def test_sampling_gives_the_old_logprobs_where_they_are_those_of_the_update(
    load_small, classifier, splits, monkeypatch, dtype, frozen, passes
):
    small, found = load_small(dtype, freeze_encoder=frozen), []
    original = small.policy.logprobs_and_values
    monkeypatch.setattr(
        small.policy, "logprobs_and_values", lambda r: found.append(small.policy.model.active_adapter) or original(r)
    )
    _, rollout = roll_out(
        small.policy, small.tokenizer, classifier, splits["train"].select(range(4)), 1, small.config, {}
    )
    assert found == passes
    assert (rollout["logprobs"] - rollout["ref_logprobs"]).abs().max() < (0.2 if dtype == torch.bfloat16 else 1e-4)


def test_sft_trains_the_encoder_that_ppo_then_leaves(small_config, quick, tmp_path):
    """By the files that a run leaves: the adapter after SFT, whose start was the identity, and the one after PPO."""
    options = {"adapter_name": "", "sft_steps": 2, "sft_batch_size": 4, "max_ppo_steps": 1, "learning_rate": 1e-3}
    detox_ppo.run(small_config(freeze_encoder=True, output_dir=tmp_path, eval_samples=1, **options))
    sft, ppo = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft_adapter", "adapter"))
    assert sft.keys() == ppo.keys()
    unchanged = {name for name, tensor in sft.items() if torch.equal(tensor, ppo[name])}
    of_the_encoder = {name for name in sft if ".encoder." in name}
    assert of_the_encoder == unchanged
    assert all(sft[name].any() for name in of_the_encoder if "lora_B" in name)


# ptx_coef: the clean human summaries


RUDE = "#Person1# is a stupid idiot."


@pytest.fixture(scope="module")
def batch(splits):
    """Twelve rows: two without a human summary, some with a toxic one."""
    columns = splits["train"].select(range(12)).to_dict()
    for row in (2, 7):
        columns["summary"][row] = ""
    return datasets.Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def clean(tiny, batch):
    """Which rows have a summary that the classifier, as transformers loads it, does not call toxic."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny / "classifier").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "classifier")
    inputs = tokenizer(list(batch["summary"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        toxicity = model(**inputs).logits.softmax(dim=-1)[:, model.config.label2id["hate"]]
    assert (toxicity > 0.5).sum() >= 3
    return [row for row, text in enumerate(batch["summary"]) if text and toxicity[row] <= 0.5]


def labels_loss(tiny, batch, rows):
    """The loss and gradients that transformers and PEFT give for human summaries as labels, padding ignored."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tiny / "adapter", is_trainable=True).eval()
    inputs = tokenizer([batch["query"][row] for row in rows], padding=True, return_tensors="pt")
    targets = tokenizer(text_target=[batch["summary"][row] for row in rows], padding=True, return_tensors="pt")
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    loss = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss
    loss.backward()
    return loss.item(), {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows_per_pass", [1, 12])
def test_ptx_adds_the_gradient_of_the_labels_loss(
    learner, classifier, tiny, batch, clean, frozen, rows_per_pass, monkeypatch
):
    """For each minibatch, a mean over the tokens of its clean summaries, however many passes it takes."""
    if rows_per_pass == 1:
        monkeypatch.setattr(detox_ppo, "micro_batches", lambda lengths, rows, *_: [[int(row)] for row in rows])
    summaries = clean_summaries(learner.policy, learner.tokenizer, classifier, batch, learner.config)
    options = {"mini_batch_size": 4, "ptx_coef": 0.7}
    without, _ = gradients_of_update(learner, batch, frozen, **options)
    found, stats = gradients_of_update(learner, batch, frozen, summaries, **options)
    order = random_stream(learner.config.seed, detox_ppo.MINIBATCH, 1, 0).permutation(12).reshape(3, 4)
    losses = []
    for minibatch, alone, both in zip(order, without, found, strict=True):
        loss, expected = labels_loss(tiny, batch, [row for row in minibatch if row in clean])
        losses.append(loss)
        assert both.keys() == alone.keys() and (frozen or expected.keys() < both.keys())
        assert_close(
            {name: both[name] - alone[name] for name in expected.keys() & both.keys()},
            {name: 0.7 * gradient for name, gradient in expected.items()},
        )
        assert all(torch.equal(both[name], alone[name]) for name in both.keys() - expected.keys())
    assert stats["ppo/loss/ptx"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("text", ["", RUDE])
def test_rows_without_a_clean_summary_add_nothing(learner, classifier, batch, frozen, text):
    rows = datasets.Dataset.from_dict(batch.to_dict() | {"summary": [text] * 12})
    summaries = clean_summaries(learner.policy, learner.tokenizer, classifier, rows, learner.config)
    (without,), _ = gradients_of_update(learner, rows, frozen)
    (found,), stats = gradients_of_update(learner, rows, frozen, summaries, ptx_coef=0.7)
    assert stats["ppo/loss/ptx"] == 0 and found.keys() == without.keys()
    assert all(torch.equal(found[name], without[name]) for name in found)


@pytest.mark.parametrize(
    "text, fault",
    [("", "but there are none. Set it to 0"), (RUDE, "classifier rates all of them as toxic. Set it to 0")],
)
def test_ptx_without_a_clean_summary_is_an_error(small_arguments, dialogues, tmp_path, capsys, text, fault):
    path = tmp_path / "rows.csv"
    detox_ppo.read_table(dialogues / "train.csv").assign(summary=text).to_csv(path, index=False)
    options = {"dataset_name": path, "ptx_coef": 0.5, "output_dir": tmp_path / "run"}
    with pytest.raises(SystemExit) as end:
        detox_ppo.main(small_arguments(**options))
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "error" in line]
    assert end.value.code == 2 and "--ptx_coef 0.5" in line and fault in line
    assert not (tmp_path / "run").exists()  # no checkpoint, no evaluation
    assert "before detox" not in printed.out


def test_a_lora_of_the_encoder_alone_leaves_nothing_to_freeze(load_small):
    with pytest.raises(UserError, match="freeze_encoder leaves nothing to train"):
        load_small(adapter_name="", lora_target_modules=r"encoder\..*\.q", freeze_encoder=True)


def test_retrieval_at_1_in_blocks_is_that_of_one_table():
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abcdef "), 30)) for _ in range(600)]
    summaries = [text[:4] for text in texts]
    counts, told = character_counts(texts), character_counts(summaries)
    idf = 1 + np.log(601 / (1 + (counts > 0).sum(axis=0)))
    vectors = counts * idf
    similarity = (told * idf) @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    own = similarity.diagonal().copy()
    np.fill_diagonal(similarity, -1)
    expected = np.mean(own > similarity.max(axis=1))
    assert 0 < expected < 1 and retrieval_at_1(texts, summaries) == expected
