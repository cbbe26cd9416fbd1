"""The evaluation: paired, reproducible, and told as it is."""

import itertools

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

import detox_ppo
from detox_ppo import (
    Responses,
    Toxicity,
    build_comparison,
    change_in_words,
    degradation,
    evaluate_policy,
    health,
    paired_statistics,
    print_verdict,
    summary_quality,
    variance_explained,
)


@pytest.fixture(scope="module")
def evaluate(small, classifier, splits):
    def evaluate(rows=None, policy=small.policy, **options):
        config = type(small.config)(**(vars(small.config) | {"eval_max_new_tokens": 24} | options))
        test = splits["test"].select(range(config.eval_samples) if rows is None else rows)
        return evaluate_policy(policy, small.tokenizer, classifier, test, config, "evaluating")

    return evaluate


# Statistics


def test_nothing_changed():
    values = [0.1, 0.5, 0.3, 0.9]
    result = paired_statistics(values, values, seed=0)
    assert result["paired_difference"] == {"mean": 0, "ci_low": 0, "ci_high": 0, "p_value": 1}
    assert result["verdict"] == {"change": "no detectable change", "better": 0, "worse": 0, "detectable": 0}
    assert result["reduction_percent"] == {"mean": 0, "std": 0}
    assert result["before"] == result["after"]


def test_means_and_percentages_by_hand():
    result = paired_statistics([0.1, 0.3], [0.05, 0.05], seed=0)
    assert result["before"] == {"mean": pytest.approx(0.2), "std": pytest.approx(0.1), "n": 2}
    assert result["after"] == {"mean": pytest.approx(0.05), "std": pytest.approx(0), "n": 2}
    assert result["reduction_percent"] == {"mean": pytest.approx(75), "std": pytest.approx(100)}
    assert result["paired_difference"]["mean"] == pytest.approx(-0.15)


def test_constant_shift():
    before = np.linspace(0.1, 0.8, 8)
    result = paired_statistics(list(before), list(before + 0.1), seed=0)
    paired = result["paired_difference"]
    assert (paired["mean"], paired["ci_low"], paired["ci_high"]) == pytest.approx((0.1, 0.1, 0.1))
    # of the 256 ways to flip signs only two are as extreme
    assert paired["p_value"] == pytest.approx(2 / 256, abs=0.003)
    assert result["reduction_percent"]["mean"] == pytest.approx(-100 * 0.1 / 0.45)
    assert result["reduction_percent"]["std"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "difference",
    [[0.3, -0.1, 0.2, 0.25, 0.05, -0.02], [1, 1, -1], [0.5], [0.1, 0.2, 0.3, 0.4, 0.5, -0.6, 0.7, 0.8, 0.9]],
)
def test_p_value_against_every_flip_of_signs(difference):
    after = np.array(difference) + 1
    p_value = paired_statistics([1.0] * len(after), list(after), seed=0)["paired_difference"]["p_value"]
    flips = itertools.product((-1, 1), repeat=len(difference))
    totals = [abs(sum(sign * value for sign, value in zip(flip, difference, strict=True))) for flip in flips]
    exact = sum(total > abs(sum(difference)) - 1e-9 for total in totals) / len(totals)
    assert p_value == pytest.approx(exact, abs=0.02)


def test_p_value_is_never_zero_and_needs_no_sign():
    before, after = [0.9] * 40, [0.1] * 40
    fell = paired_statistics(before, after, seed=0)["paired_difference"]
    rose = paired_statistics(after, before, seed=0)["paired_difference"]
    assert 0 < fell["p_value"] < 0.001 and 0 < rose["p_value"] < 0.001
    assert fell["mean"] == pytest.approx(-rose["mean"])


def test_shares_and_the_smallest_change_by_hand():
    verdict = paired_statistics([0.5] * 5, [0.1, 0.2, 0.5, 0.7, 0.3], seed=0)["verdict"]
    assert (verdict["better"], verdict["worse"]) == (0.6, 0.2)
    # differences -0.4, -0.3, 0, 0.2, -0.2: variance 0.058; quantiles of the normal for 5% (two-sided) and 80%
    assert verdict["detectable"] == pytest.approx((1.95996 + 0.84162) * (0.058 / 5) ** 0.5, rel=1e-3)
    assert paired_statistics([0.5], [0.1], seed=0)["verdict"]["detectable"] is None


def test_a_change_of_the_detectable_size_is_found_four_times_in_five():
    generator = np.random.default_rng(0)
    size = paired_statistics([0.0] * 50, list(generator.normal(0, 0.1, 50)), seed=0)["verdict"]["detectable"]
    runs = [list(generator.normal(-size, 0.1, 50)) for _ in range(150)]
    found = [paired_statistics([0.0] * 50, run, seed=0, resamples=400)["verdict"]["change"] for run in runs]
    assert found.count("less toxic") / 150 == pytest.approx(0.8, abs=0.12)
    assert "more toxic" not in found


def test_verdict_in_words(capsys):
    before = list(np.linspace(0.3, 0.5, 20))
    for shift, change in ((-0.1, "less toxic"), (0.1, "more toxic"), (0, "no detectable change")):
        statistics = paired_statistics(before, [value + shift for value in before], seed=0)
        assert statistics["verdict"]["change"] == change
        print_verdict("toxicity", statistics)
        assert f"verdict: {change}; " in capsys.readouterr().out


def test_pairs_matter():
    """Shuffling one side keeps both means and loses the evidence."""
    generator = np.random.default_rng(0)
    before = generator.random(60)
    after = before - 0.05 + generator.normal(0, 0.01, 60)
    paired = paired_statistics(before, after, seed=0)["paired_difference"]
    unpaired = paired_statistics(before, generator.permutation(after), seed=0)["paired_difference"]
    assert paired["p_value"] < 0.001 < 0.05 < unpaired["p_value"]
    assert paired["ci_high"] < 0 < unpaired["ci_high"]
    assert unpaired["ci_high"] - unpaired["ci_low"] > 10 * (paired["ci_high"] - paired["ci_low"])


def test_interval_by_hand_and_by_the_normal_approximation():
    # resamples of two values have the means 0, 1/2 and 1, the ends a quarter of the time each
    paired = paired_statistics([0, 0], [0, 1], seed=0)["paired_difference"]
    assert (paired["ci_low"], paired["ci_high"]) == (0, 1)
    after = np.random.default_rng(1).normal(0.5, 0.2, 400)
    paired = paired_statistics([0] * 400, after, seed=0, resamples=4000)["paired_difference"]
    half = 1.96 * after.std() / 20
    assert paired["ci_low"] == pytest.approx(after.mean() - half, abs=0.1 * half)
    assert paired["ci_high"] == pytest.approx(after.mean() + half, abs=0.1 * half)


def test_statistics_are_a_function_of_the_seed():
    before, after = [0.1, 0.4, 0.2, 0.7], [0.2, 0.1, 0.3, 0.6]
    assert paired_statistics(before, after, seed=1) == paired_statistics(before, after, seed=1)
    assert paired_statistics(before, after, seed=1) != paired_statistics(before, after, seed=2)


def test_nothing_to_reduce():
    result = paired_statistics([0, 0], [0.1, 0.3], seed=0)
    assert result["reduction_percent"] == {"mean": None, "std": None}
    constant = paired_statistics([0.2, 0.2], [0.1, 0.3], seed=0)
    assert constant["reduction_percent"]["std"] is None
    assert constant["reduction_percent"]["mean"] == pytest.approx(0)


def test_a_change_for_the_worse_is_called_one(capsys):
    worse = paired_statistics([0.1, 0.2, 0.3], [0.2, 0.35, 0.5], seed=0)
    assert worse["reduction_percent"]["mean"] == pytest.approx(-75)
    print_verdict("toxicity", worse)
    printed = capsys.readouterr().out
    assert "toxicity: mean rose by 75.0%, std rose by 50.0%" in printed
    assert "+0.1500" in printed and "p = " in printed
    print_verdict("toxicity", paired_statistics([0.2, 0.35, 0.5], [0.1, 0.2, 0.3], seed=0))
    printed = capsys.readouterr().out
    assert "mean fell by 42.9%, std fell by 33.3%" in printed and "-0.1500" in printed
    print_verdict("toxicity", paired_statistics([0, 0], [0.1, 0.3], seed=0))
    assert "mean was 0 before" in capsys.readouterr().out


def test_words_for_a_change():
    assert [change_in_words(percent) for percent in (12.34, -12.34, None)] == [
        "fell by 12.3%",
        "rose by 12.3%",
        "was 0 before",
    ]


# Still a summary?


def quality(texts, summaries, finished=None, kl=0.0):
    found = {"responses": texts, "sample_rows": list(range(len(texts))), "kl": [kl] * len(texts)}
    return summary_quality(found | {"finished": finished or [True] * len(texts)}, summaries)


def rouge(texts, summaries):
    return {name: value for name, value in quality(texts, summaries).items() if name.startswith("rouge")}


def test_rouge_by_hand():
    texts = ["The cat sat on the mat.", "A second summary."]
    assert rouge(texts, texts) == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert rouge(["nothing shared"], ["The cat sat"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    # 2 of 2 words found, 2 of 6 words covered: F = 0.5; of bigrams 1 of 1 and 1 of 5; the order is kept
    part = rouge(["the cat"], ["the cat sat on the mat"])
    assert part == pytest.approx({"rouge1": 1 / 2, "rouge2": 1 / 3, "rougeL": 1 / 2})
    # the order is lost: one word in sequence
    assert rouge(["cat the"], ["the cat"]) == pytest.approx({"rouge1": 1, "rouge2": 0, "rougeL": 1 / 2})
    # stemmed, and a mean over the pairs
    assert rouge(["walking dogs", "no"], ["walk dog", "yes"])["rouge1"] == pytest.approx(1 / 2)
    assert rouge([""], ["a summary"])["rouge1"] == 0


def test_quality_by_hand():
    texts = ["a b a b a b", "", "a b c", "one"]
    found = quality(texts, ["a"] * 4, finished=[True, True, False, True], kl=1.5)
    # pairs: ab ba ab ba ab, ab bc: of 7 three are different; triples of the first: aba bab aba bab
    assert found["distinct_2"] == pytest.approx(3 / 7)
    assert found["repeated_3"] == pytest.approx((2 / 4) / 4)
    assert (found["empty"], found["unfinished"], found["kl"]) == (0.25, 0.25, 1.5)
    # several summaries of one row are held against its human summary
    twice = {"responses": ["yes", "no"], "sample_rows": [0, 0], "finished": [True, True], "kl": [0, 0]}
    assert summary_quality(twice, ["yes"])["rouge1"] == 0.5


def test_degradation_is_named():
    good = {"rougeL": 0.3, "distinct_2": 0.5, "repeated_3": 0.0, "empty": 0.0, "unfinished": 0.1}
    assert degradation(good, good) == []
    assert degradation(good, good | {"rougeL": 0.28, "distinct_2": 0.3, "empty": 0.05, "unfinished": 0.15}) == []
    bad = {"rougeL": 0.26, "distinct_2": 0.2, "repeated_3": 0.3, "empty": 0.4, "unfinished": 0.3}
    for name, word in zip(bad, ("ROUGE-L", "distinct-2", "repeat", "empty", "never end"), strict=True):
        (named,) = degradation(good, good | {name: bad[name]})
        assert word in named


def test_a_hacked_reward_is_called_so(small_config, tmp_path, monkeypatch, capsys):
    def likes_short_texts(self, texts):
        length = torch.tensor([float(len(text)) for text in texts])
        return torch.stack([8 - length / 10, length / 10 - 8], dim=1)

    monkeypatch.setattr(detox_ppo.HateClassifier, "logits", likes_short_texts)
    options = {"learning_rate": 2e-3, "init_kl_coef": 0.0, "adaptive_kl": "false", "score_text": "response"}
    options |= {"output_min_length": 24, "output_max_length": 25, "eval_max_new_tokens": 24, "max_grad_norm": 1.0}
    options |= {
        "max_ppo_steps": 30,
        "batch_size": 16,
        "mini_batch_size": 4,
        "eval_samples": 16,
        "output_dir": tmp_path,
    }
    results = detox_ppo.run(small_config(**options))
    assert results["summary_toxicity"]["verdict"]["change"] == "less toxic"
    hacked = results["warnings"]["reward hacking"]
    assert "ROUGE-L fell" in hacked and hacked in capsys.readouterr().out


# The health of a step


def steps(count=1, **changes):
    metrics = {"objective/kl": 1.0, "ppo/mean_scores": 1.0, "ppo/std_scores": 0.5, "ppo/skipped_minibatches": 0}
    metrics["ppo/skipped_steps"] = 0
    metrics |= {"objective/entropy": 20.0, "tokens/responses_len_mean": 20.0, "tokens/finished_share": 0.9}
    return [dict(metrics) for _ in range(count - 1)] + [metrics | changes]


@pytest.mark.parametrize(
    "kind, history, remedy",
    [
        ("kl", steps(**{"objective/kl": 18.5}), "init_kl_coef"),
        ("negative kl", steps(**{"objective/kl": -1.5}), "batch_size"),
        ("skipped", steps(**{"ppo/skipped_minibatches": 2}), "learning_rate"),
        ("entropy", steps(3, **{"objective/entropy": 1.0}), "init_kl_coef"),
        ("flat", steps(60), "learning_rate"),
        ("cut", steps(**{"tokens/finished_share": 0.4}), "output_max_length"),
    ],
)
def test_each_illness_is_warned_of_with_its_remedy(small, kind, history, remedy):
    _, warned = health(history, small.config)
    assert list(warned) == [kind] and remedy in warned[kind]


def test_a_healthy_step_in_words(small):
    words, warned = health(steps(49), small.config)
    assert words == "score steady, close to the reference, 90% of summaries end by themselves" and not warned
    risen = [step | {"ppo/mean_scores": i / 10} for i, step in enumerate(steps(60))]
    words, warned = health(risen, small.config)
    assert words.startswith("score rising") and not warned
    words, _ = health(risen[::-1], small.config)
    assert words.startswith("score falling")
    assert "moving away from the reference" in health(steps(**{"objective/kl": 7.0}), small.config)[0]


def test_a_score_that_rose_at_once_and_stays_is_not_called_flat(small):
    """As most runs of the small world do: in ten steps to the top, and up and down there for hundreds."""
    generator = np.random.default_rng(0)
    means = np.concatenate([np.linspace(-0.6, 3, 10), 3 + 0.5 * generator.standard_normal(300)])
    history = [
        step | {"ppo/mean_scores": mean, "ppo/std_scores": 2.5} for mean, step in zip(means, steps(310), strict=True)
    ]
    assert not [count for count in range(1, 311) if health(history[:count], small.config)[1]]
    never = [step | {"ppo/mean_scores": mean - 3} for mean, step in zip(means[10:], history[10:], strict=True)]
    assert list(health(never, small.config)[1]) == ["flat"]


# Evaluating a policy


@pytest.mark.parametrize("samples", [1, 5, 8])
def test_exactly_as_many_prompts_as_asked_for(evaluate, samples):
    result = evaluate(eval_samples=samples)
    each = {"response", "its_reward", "length", "reward", "toxicity", "summary_toxicity", "kl"}
    assert set(result) == each | {"responses", "finished", "sample_rows"}
    assert {len(values) for values in result.values()} == {samples}


def test_several_summaries_a_prompt(evaluate):
    one, three = (evaluate(eval_samples=4, eval_samples_per_prompt=count) for count in (1, 3))
    # The comparison shows one summary beside its own reward, not beside the mean of three.
    assert three["its_reward"] == pytest.approx(one["reward"]) and one["its_reward"] == one["reward"]
    assert three["sample_rows"] == [row for row in range(4) for _ in range(3)]
    assert three["response"] == one["response"] == three["responses"][::3]
    assert len(set(three["responses"])) > 6
    lengths = [evaluate([row], eval_samples_per_prompt=3)["length"][0] for row in range(4)]
    assert three["length"] == lengths
    assert three["summary_toxicity"] != one["summary_toxicity"]


def test_kl_of_an_evaluation(evaluate, load_small):
    small = load_small()
    assert evaluate(policy=small.policy, eval_samples=4)["kl"] == [0, 0, 0, 0]
    with torch.no_grad():
        for name, parameter in small.policy.named_parameters():
            if ".default." in name and "lora_B" in name:
                parameter.mul_(1.5)
    moved = evaluate(policy=small.policy, eval_samples=8)["kl"]
    assert np.mean(moved) > 0.01 and 0 not in moved


def test_rows_keep_their_order_and_their_random_numbers(evaluate, splits):
    lengths = [len(ids) for ids in splits["test"]["input_ids"]]
    assert lengths != sorted(lengths)  # so that sorting inside has something to undo
    result = evaluate(eval_samples=8, batch_size=3, mini_batch_size=1)
    assert len(set(result["response"])) > 4
    for row in (0, 3, 7):
        alone = evaluate([row], eval_samples=1)
        assert alone["response"] == [result["response"][row]]
        assert alone["length"] == [result["length"][row]]
        for name in ("reward", "toxicity", "summary_toxicity"):
            assert alone[name] == pytest.approx([result[name][row]], abs=1e-4)


def test_same_random_numbers_give_the_same_result(evaluate):
    first = evaluate(eval_samples=6)
    torch.manual_seed(5), torch.rand(3)
    assert evaluate(eval_samples=6) == first
    assert evaluate(eval_samples=6, seed=1)["response"] != first["response"]


def test_scores_belong_to_the_text_they_are_named_after(evaluate, classifier, splits):
    dialogues = splits["test"]["dialogue"]
    result = evaluate(eval_samples=8)
    both = [f"{dialogue} {text}" for dialogue, text in zip(dialogues, result["response"], strict=True)]
    measure = Toxicity(classifier)
    close = {"abs": 1e-4}
    assert result["toxicity"] == pytest.approx(measure.compute(predictions=both)["toxicity"], **close)
    alone = measure.compute(predictions=result["response"])["toxicity"]
    assert result["summary_toxicity"] == pytest.approx(alone, **close)
    assert alone != pytest.approx(result["toxicity"], **close)
    assert result["reward"] == pytest.approx(classifier.scores(both).tolist(), **close)
    result = evaluate(eval_samples=8, score_text="response")
    assert result["reward"] == pytest.approx(classifier.scores(result["response"]).tolist(), **close)


def test_length_limit_is_in_new_tokens(evaluate):
    assert max(evaluate(eval_samples=8, eval_max_new_tokens=5)["length"]) == 5
    assert max(evaluate(eval_samples=8, eval_max_new_tokens=9)["length"]) == 9


def test_responses_are_plain_text(evaluate, small, monkeypatch):
    eos, pad = small.tokenizer.eos_token_id, small.tokenizer.pad_token_id
    words = small.tokenizer("A summary.", add_special_tokens=False).input_ids
    tokens = torch.tensor([[*words, eos, pad, pad], [pad, *words, eos, eos], [eos, *[pad] * (len(words) + 2)]])

    def fake(policy, prompts, generators, caps, config):
        return Responses(prompts, tokens, torch.tensor([len(words) + 1, len(words) + 2, 1]), torch.ones(3), None)

    monkeypatch.setattr(detox_ppo, "sample_responses", fake)
    result = evaluate(eval_samples=3, batch_size=3, mini_batch_size=1)
    assert sorted(result["response"]) == ["", "A summary.", "A summary."]
    assert np.isfinite([result["reward"], result["toxicity"], result["summary_toxicity"]]).all()


def test_the_active_adapter_is_the_one_evaluated(evaluate, load_small, splits):
    small = load_small()
    with torch.no_grad():
        for name, parameter in small.policy.named_parameters():
            if ".reference." in name and "lora_B" in name:
                parameter.zero_()
    trained = evaluate(policy=small.policy, eval_samples=8)
    with small.policy.adapter("reference"):
        bare = evaluate(policy=small.policy, eval_samples=8)
    assert bare["response"] != trained["response"]
    assert evaluate(policy=small.policy, eval_samples=8) == trained


# Side by side


def test_comparison_shows_the_largest_gain_first():
    before = {"response": ["a", "b", "c", "d"], "its_reward": [1.0, 2.0, 3.0, 4.0]}
    after = {"response": ["A", "B", "C", "D"], "its_reward": [1.5, 0.0, 5.0, 9.0]}
    rows = datasets.Dataset.from_dict({"query": ["q1", "q2", "q3"]})  # fewer than were evaluated
    table = build_comparison(rows, before, after)
    assert list(table.columns) == [
        "query",
        "response_before",
        "response_after",
        "reward_before",
        "reward_after",
        "reward_diff",
    ]
    assert table.values.tolist() == [
        ["q3", "c", "C", 3.0, 5.0, 2.0],
        ["q1", "a", "A", 1.0, 1.5, 0.5],
        ["q2", "b", "B", 2.0, 0.0, -2.0],
    ]
    assert isinstance(table, pd.DataFrame) and list(table.index) == [0, 1, 2]


# Variance explained


def test_variance_explained_by_hand():
    returns = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    padding = torch.tensor([[0, 0, 0], [0, 7.0, -3.0]])
    assert variance_explained(returns + padding, returns, mask) == pytest.approx(1)
    assert variance_explained(returns + 5 + padding, returns, mask) == pytest.approx(1)  # a shift is no variance
    assert variance_explained(torch.full((2, 3), 8.0) + padding, returns, mask) == pytest.approx(0)
    assert variance_explained(-returns, returns, mask) == pytest.approx(-3)
    assert variance_explained(returns / 2, returns, mask) == pytest.approx(0.75)


def test_variance_explained_where_there_is_none():
    one = torch.tensor([[True, False]])
    assert variance_explained(torch.ones(1, 2), torch.zeros(1, 2), one) == 0
    both = torch.tensor([[True, True]])
    assert variance_explained(torch.ones(1, 2), torch.ones(1, 2), both) == pytest.approx(1)
