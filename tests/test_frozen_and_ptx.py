"""freeze_encoder, the bounds of its passes, and R@1: whether a summary is nearest to its own dialogue."""

import numpy as np
import pytest
import torch
from test_policy import ppo

from detox_ppo import UserError, character_counts, micro_batches, retrieval_at_1


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


def test_many_short_prompts_with_long_responses_are_split_by_their_logits(small):
    lengths, logits = [2] * 8, [2**27] * 8
    with torch.enable_grad():
        assert micro_batches(lengths, range(8), small.policy.base) == [list(range(8))]
        split = micro_batches(lengths, range(8), small.policy.base, logits)
    assert split == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_only_the_decoder_and_the_value_head_learn(load_small, classifier, splits):
    small = load_small(freeze_encoder=True)
    policy = small.policy
    before = {name: value.clone() for name, value in policy.adapters().items()}
    rows = []
    hook = policy.base.get_encoder().register_forward_hook(
        lambda _, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    metrics = ppo(small, classifier, splits)
    hook.remove()
    assert sum(rows) == 4
    assert metrics["objective/kl"] == 0
    changed = {name for name, value in policy.adapters().items() if not torch.equal(value, before[name])}
    assert changed and any(name.startswith("value_head.") for name in changed)
    assert all(name.startswith("value_head.") or ".decoder." in name and ".default." in name for name in changed)


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
