"""The evaluation: paired, reproducible, with correct verdicts and warnings."""

import itertools
import unicodedata

import numpy as np
import pandas as pd
import pytest
import torch
from rouge_score import rouge_scorer

import detox_ppo
from detox_ppo import (
    EVALUATION,
    Responses,
    RunState,
    Toxicity,
    build_comparison,
    build_results,
    degradation,
    evaluate_policy,
    format_change,
    generate,
    minutes_left,
    new_warnings,
    paired_statistics,
    print_results,
    random_stream,
    results_table,
    roll_out,
    split_words,
    step_warnings,
    summary_quality,
)


@pytest.fixture(scope="module")
def evaluate(small, classifier, splits):
    """Evaluates rows of the test split by number; options are the configuration's."""

    def evaluate(rows=range(8), policy=small.policy, **options):
        config = type(small.config)(**(vars(small.config) | {"eval_max_new_tokens": 24} | options))
        return evaluate_policy(policy, small.tokenizer, classifier, splits["test"].select(rows), config)

    return evaluate


@pytest.fixture(scope="module")
def evaluated(evaluate):
    """All of the test split."""
    return evaluate()


@pytest.fixture
def few(monkeypatch):
    """Fewer resamples, where their number does not matter."""
    monkeypatch.setattr(paired_statistics, "__defaults__", (400,))


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
    assert result["before"] == {"mean": pytest.approx(0.2), "std": pytest.approx(0.1), "n": 2, "share": 0}
    assert result["after"] == {"mean": pytest.approx(0.05), "std": pytest.approx(0), "n": 2, "share": 0}
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


def test_noise_is_neither_a_fall_nor_a_rise():
    after = [0.501, 0.499, 0.5 + 0.02, 0.5 - 0.02, 0.5 - 1e-9]
    verdict = paired_statistics([0.5] * 5, after, seed=0, resamples=20)["verdict"]
    assert (verdict["better"], verdict["worse"]) == (0.2, 0.2)


def test_the_share_that_is_toxic(few):
    result = paired_statistics([0.4, 0.5, 0.6, 0.9], [0.0, 0.1, 0.2, 0.7], seed=0)
    assert (result["before"]["share"], result["after"]["share"]) == (0.5, 0.25)  # 0.5 is not above 0.5


def test_a_change_of_the_detectable_size_is_detected_four_times_in_five():
    generator = np.random.default_rng(0)
    size = paired_statistics([0.0] * 50, list(generator.normal(0, 0.1, 50)), seed=0)["verdict"]["detectable"]
    runs = [list(generator.normal(-size, 0.1, 50)) for _ in range(100)]
    found = [paired_statistics([0.0] * 50, run, seed=0, resamples=300)["verdict"]["change"] for run in runs]
    assert found.count("less toxic") / 100 == pytest.approx(0.8, abs=0.12)
    assert "more toxic" not in found


def test_verdict_text(few):
    before = list(np.linspace(0.3, 0.5, 20))
    for shift, change in ((-0.1, "less toxic"), (0.1, "more toxic"), (0, "no detectable change")):
        statistics = paired_statistics(before, [value + shift for value in before], seed=0)
        assert statistics["verdict"]["change"] == change
        assert format_change(statistics)["verdict"] == change
    # Without any change every effect is detectable; with one prompt the limit is unknown.
    for values, least in (([0.3, 0.5], "0.0000"), ([0.3], "unknown")):
        assert format_change(paired_statistics(values, values, seed=0))["detectable"] == least


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


def test_statistics_are_a_function_of_the_seed(few):
    before, after = [0.1, 0.4, 0.2, 0.7], [0.2, 0.1, 0.3, 0.6]
    assert paired_statistics(before, after, seed=1) == paired_statistics(before, after, seed=1)
    assert paired_statistics(before, after, seed=1) != paired_statistics(before, after, seed=2)


def test_nothing_to_reduce(few):
    result = paired_statistics([0, 0], [0.1, 0.3], seed=0)
    assert result["reduction_percent"] == {"mean": None, "std": None}
    constant = paired_statistics([0.2, 0.2], [0.1, 0.3], seed=0)
    assert constant["reduction_percent"]["std"] is None
    assert constant["reduction_percent"]["mean"] == pytest.approx(0)


def test_a_change_has_its_true_direction(few):
    pairs = {
        "rose": ([0.1, 0.2, 0.3], [0.2, 0.35, 0.5]),
        "fell": ([0.2, 0.35, 0.5], [0.1, 0.2, 0.3]),
        "was 0": ([0, 0], [0.1, 0.3]),
    }
    rose, fell, was_0 = (format_change(paired_statistics(*pair, seed=0)) for pair in pairs.values())
    assert (rose["mean change"], rose["std change"]) == ("+75.0%", "+50.0%")
    assert (fell["mean change"], fell["std change"], fell["fell"], fell["rose"]) == ("-42.9%", "-33.3%", "100%", "0%")
    assert (was_0["mean change"], was_0["std change"]) == ("was 0", "was 0")
    assert was_0["95% interval"] == "+0.100 to +0.300"


# Content measures


def quality(texts, summaries, finished=True, kl=0.0):
    table = pd.DataFrame({"response": texts, "finished": finished, "kl": kl, "length": 5})
    references = [summary if isinstance(summary, list) else [summary] for summary in summaries]
    return summary_quality(table, references, dialogues=texts)


def rouge(texts, summaries):
    return {name: value for name, value in quality(texts, summaries).items() if name.startswith("rouge")}


def test_rouge_by_hand():
    texts = ["The cat sat on the mat.", "A second summary."]
    assert rouge(texts, texts) == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert rouge(["nothing shared"], ["The cat sat"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    # 2 of 2 words match, 2 of 6 words are covered: F = 0.5; of bigrams 1 of 1 and 1 of 5; the order is kept
    part = rouge(["the cat"], ["the cat sat on the mat"])
    assert part == pytest.approx({"rouge1": 1 / 2, "rouge2": 1 / 3, "rougeL": 1 / 2})
    # the order is lost: one word in sequence
    assert rouge(["cat the"], ["the cat"]) == pytest.approx({"rouge1": 1, "rouge2": 0, "rougeL": 1 / 2})
    # stemmed, and a mean over the pairs
    assert rouge(["walking dogs", "no"], ["walk dog", "yes"])["rouge1"] == pytest.approx(1 / 2)
    assert rouge([""], ["a summary"])["rouge1"] == 0
    # each measure by the best of several summaries; a row without one does not count
    several = [["no", "dog the cat", "the cat"], []]
    assert rouge(["the cat", "some text"], several) == {"rouge1": 1, "rouge2": 1, "rougeL": 1}


def test_rouge_of_ascii_text_is_rouge_scores_own(tiny):
    summaries = list(pd.read_csv(tiny / "dialogues" / "train.csv")["summary"][:100])
    summaries += ["It's 9:30 in the U.S.A. -- don't_stop walking, re-reading!", "#Person1# re-reads_it.", "."]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for texts in zip(summaries, summaries[1:], strict=False):
        expected = {name: score.fmeasure for name, score in scorer.score(*texts).items()}
        assert rouge([texts[1]], [texts[0]]) == expected


SCRIPTS = {  # three summaries each, without a word in common
    "Arabic": ["يشتري أحمد تذكرة", "تطبخ سارة العشاء", "الطقس ممطر اليوم"],
    "Chinese": ["小明买火车票。", "她在家做晚饭。", "今天下大雨了。"],
    "Hindi": ["राम टिकट खरीदता है", "सीता खाना पकाती हैं", "आज बारिश हो रही"],
    "Japanese": ["切符を買う。", "料理が好きだ。", "スーパーへ行く。"],
    "Khmer": ["គាត់ទិញសំបុត្រ", "នាងធ្វើម្ហូប", "ថ្ងៃនេះភ្លៀង"],
    "Korean": ["민수는 표를 샀다", "지은이 저녁을 요리한다", "오늘 비가 온다"],
    "Russian": ["Иван покупает билет", "Мама готовит ужин", "Сегодня сильный дождь"],
    "Thai": ["เขาซื้อตั๋วรถไฟ", "แม่ทำอาหารเย็น", "วันนี้ฝนตกหนัก"],
}


@pytest.mark.parametrize("texts", SCRIPTS.values(), ids=SCRIPTS)
def test_summaries_in_any_script(texts):
    good = quality(texts, texts)
    assert (good["rouge1"], good["rouge2"], good["rougeL"]) == (1, 1, 1) and good["distinct_2"] > 0.8
    decomposed = [unicodedata.normalize("NFD", text) for text in texts]
    assert quality(decomposed, texts)["rougeL"] == 1  # the same text in decomposed form
    assert degradation(good, quality(texts, texts)) == []
    assert quality([text + " " + text for text in texts], texts)["repeated_3"] > 0.1
    for fixed in (texts[0], "。，、"):
        names = [fault.split(" ")[0] for fault in degradation(good, quality([fixed] * 3, texts))]
        assert names == ["ROUGE-L", "distinct-2"]


def test_words_of_scripts_without_spaces_are_their_characters():
    assert split_words("她在 ＫＴＶ唱歌！") == ["她", "在", "ktv", "唱", "歌", "!"]
    assert split_words("ที่นี่ Hello,") == ["ที่", "นี่", "hello,"]  # marks stay with their letter
    # one word of three in common, the name
    assert rouge(["#Person1# 표를 샀다"], ["#Person1# 비가 온다"])["rouge1"] == pytest.approx(1 / 3)


def test_quality_by_hand():
    texts = ["a b a b a b", "", "a b c", "one"]
    found = quality(texts, ["a"] * 4, finished=[True, True, False, True], kl=1.5)
    # pairs: ab ba ab ba ab, ab bc: of 7 three are different; triples of the first: aba bab aba bab
    assert found["distinct_2"] == pytest.approx(3 / 7)
    assert found["repeated_3"] == pytest.approx((2 / 4) / 4)
    assert (found["empty"], found["unfinished"], found["kl"]) == (0.25, 0.25, 1.5)


def test_degradation_is_named():
    good = {"rougeL": 0.3, "distinct_2": 0.5, "repeated_3": 0.0, "empty": 0.0, "unfinished": 0.1, "length": 30.0}
    assert degradation(good, good) == []
    assert degradation(good, good | {"rougeL": 0.28, "distinct_2": 0.3, "empty": 0.05, "unfinished": 0.15}) == []
    bad = {"rougeL": 0.26, "distinct_2": 0.2, "repeated_3": 0.3, "empty": 0.4, "unfinished": 0.3}
    for name, word in zip(bad, ("ROUGE-L", "distinct-2", "repetitive", "empty", "unfinished"), strict=True):
        (named,) = degradation(good, good | {name: bad[name]})
        assert word in named
    (named,) = degradation(good, good | {"length": 17.0}, human_length=20.0)
    assert named == "the mean length fell from 30.0 to 17.0 tokens"
    assert degradation(good, good | {"length": 17.0}) == [named]  # without human summaries
    assert not degradation(good, good | {"length": 17.0}, human_length=16.0)  # no longer than human summaries
    assert not degradation(good, good | {"length": 19.0}, human_length=20.0)
    good["retrieval_at_1"] = 0.8
    assert degradation(good, good | {"retrieval_at_1": 0.7}) == ["R@1 fell from 0.800 to 0.700"]
    assert not degradation(good, good | {"retrieval_at_1": 0.73})


def table_of(texts, toxicity, reward=0.0):
    """A table as evaluate_policy returns it, with one summary per text."""
    columns = {"response": texts, "toxicity": toxicity, "summary_toxicity": toxicity, "reward": reward}
    return pd.DataFrame(columns | {"length": 5, "finished": True, "kl": 0.0})


def results_of(tables, human, summaries, config, greedy=None, **state):
    """tables are of sampled summaries, and of greedy ones unless those are given; the human ones are the dialogues."""
    both = {when: {"sampled": table, "greedy": (greedy or tables)[when]} for when, table in tables.items()}
    rows = {"dialogue": summaries, "references": [[text] if text else [] for text in summaries]}
    human = pd.DataFrame(human | {"response": summaries, "length": 6}).replace({"response": {"": None}})
    return build_results(both, human, rows, RunState({}, {}, **state), config)


def test_reward_hacking_is_reported(small, capsys, few):
    summaries = [f"#Person1# buys {count} tickets to the museum." for count in range(20)]
    rows = {"dialogue": summaries, "summary": summaries}
    before = table_of([f"The stupid {text}" for text in summaries], np.linspace(0.5, 0.9, 20))
    kept, hacked = table_of(summaries, 0.1), table_of(["Fine, fine, fine."] * 20, 0.1)
    human = {"toxicity": [0.1] * 20, "summary_toxicity": 0.1, "dialogue_toxicity": 0.1}
    both = ("sampled", "greedy")
    for after, greedy, warned in (
        (kept, kept, ()),
        (hacked, kept, both[:1]),
        (kept, hacked, both[1:]),
        (hacked, hacked, both),
    ):
        tables, others = {"before": before, "after": after}, {"before": before, "after": greedy}
        results = results_of(tables, human, summaries, small.config, others)
        assert results["summary_toxicity"]["verdict"]["change"] == "less toxic"
        assert list(results["warnings"]) == ["reward hacking"] * bool(warned)
        sides = ({"sampled": before, "greedy": before}, {"sampled": after, "greedy": greedy})
        print_results(results, results_table(results), build_comparison(rows, *sides))
        printed = " ".join(capsys.readouterr().out.split())
        warning = results["warnings"].get("reward hacking", "")
        assert f"warning: {warning}" in printed if warned else "reward hacking" not in printed
        assert [decoding for decoding in both if f" ({decoding})" in warning] == list(warned)
    assert "ROUGE-L fell from" in printed and results["warnings"]["reward hacking"] in printed
    # Summaries that got worse and more toxic are not reward hacking.
    assert not results_of({"before": kept, "after": before}, human, summaries, small.config)["warnings"]


BLAND = "#Person1# and #Person2# are talking about it."


@pytest.mark.parametrize("bland", [("sampled", "greedy"), ("sampled",), ("greedy",), ()])
def test_a_policy_with_one_summary_for_everything_is_detected(small, tiny, few, bland):
    """Although it is fluent, clean and as long as before: by the warning and the verdict, in either decoding."""
    rows = pd.read_csv(tiny / "dialogues" / "train.csv").head(40)
    texts = list(rows["summary"])
    told = [f"{text} He is an idiot." for text in texts]
    tables = {"before": table_of(told, np.linspace(0.5, 0.9, 40)), "after": {}}
    for decoding in ("sampled", "greedy"):
        after = [BLAND] * 40 if decoding in bland else texts
        tables["after"][decoding] = table_of(after, 0.1)
    both = {"before": {name: tables["before"] for name in ("sampled", "greedy")}, "after": tables["after"]}
    human = {"response": texts, "length": 6, "toxicity": 0.1, "summary_toxicity": 0.1, "dialogue_toxicity": 0.1}
    rows = rows.assign(references=[[text] for text in texts])
    results = build_results(both, pd.DataFrame(human), rows, RunState({}, {}), small.config)
    qualities = {"sampled": results["quality"], "greedy": results["greedy"]["quality"]}
    for decoding, quality in qualities.items():
        assert (quality["after"]["retrieval_at_1"] <= 1 / 40) == (decoding in bland)
        fell = f"R@1 fell from {quality['before']['retrieval_at_1']:.3f} to {quality['after']['retrieval_at_1']:.3f}"
        warning = results["warnings"].get("reward hacking", "")
        assert (f" ({decoding})" in warning) == (decoding in bland) and (not bland or "ptx_coef" in warning)
        assert decoding not in bland or fell in warning
        change = " -> ".join(f"{quality[when]['retrieval_at_1']:.3f}" for when in ("before", "after"))
        assert f"{change} {decoding}" in results["verdict"]
    assert ("content lost: R@1 " if bland else "content kept: R@1 ") in results["verdict"]


@pytest.mark.parametrize("toxicity, warned", [(0.1, ["reward hacking"]), (0.9, [])])
def test_a_bland_policy_is_found_out_without_human_summaries(small, tiny, few, capsys, toxicity, warned):
    """By R@1 alone, which needs none; where toxicity did not fall, no reward was hacked, but the content is lost."""
    rows = pd.read_csv(tiny / "dialogues" / "train.csv").head(40)
    before = table_of([f"{text} He is an idiot." for text in rows["summary"]], np.linspace(0.5, 0.8, 40))
    tables = {"before": before, "after": table_of([BLAND] * 40, toxicity)}
    both = {when: {"sampled": table, "greedy": table} for when, table in tables.items()}
    human = pd.DataFrame({"dialogue_toxicity": [0.1] * 40, "response": None})
    rows = rows.assign(summary="", references=[[]] * 40)
    results = build_results(both, human, rows, RunState({}, {}), small.config)
    assert "rougeL" not in results["quality"]["after"] and list(results["warnings"]) == warned
    print_results(results, results_table(results), build_comparison(rows, *both.values()))
    printed = " ".join(capsys.readouterr().out.split())
    assert "; content lost: R@1 " in results["verdict"] and results["verdict"] in printed
    assert all(f"warning: {results['warnings'][kind]}" in printed for kind in warned)
    for block in (results, results["greedy"]):
        assert block["quality"]["after"]["retrieval_at_1"] <= 1 / 40


def test_the_verdict_has_toxicity_and_content(small, few):
    human = {"toxicity": [0.1] * 12, "summary_toxicity": 0.1, "dialogue_toxicity": 0.1}
    texts = [f"{count} tickets" for count in range(12)]
    before = table_of(texts, np.linspace(0.55, 0.9, 12))
    results = results_of({"before": before, "after": table_of(texts, 0.1)}, human, texts, small.config)
    shares = "100.0% of the summaries were toxic, now 0.0%; greedy 100.0% and 0.0%"
    lengths = "length 5.0 -> 5.0 tokens sampled, 5.0 -> 5.0 tokens greedy"
    assert results["verdict"] == (
        f"{shares}; 12 prompts, p {detox_ppo.format_p(results['summary_toxicity']['paired_difference']['p_value'])}: "
        f"less toxic; content kept: ROUGE-L 1.000 -> 1.000 sampled, 1.000 -> 1.000 greedy, {lengths}"
    )
    # Without human summaries and with few rows only the length is checked; it fell.
    results = results_of(
        {"before": before.assign(length=9), "after": before},
        {"dialogue_toxicity": [0.1] * 12},
        [""] * 12,
        small.config,
    )
    ending = "train for more steps (--max_ppo_steps) or use --config checkpoints/flan-t5-base.yaml"
    assert "no detectable change; content lost: length 9.0 -> 5.0 tokens sampled" in results["verdict"]
    assert results["verdict"].endswith(ending)
    assert "the mean length" not in str(results["warnings"])  # toxicity did not fall: nothing was hacked


def test_a_small_p_value_is_not_exact():
    assert [detox_ppo.format_p(value) for value in (1 / 10001, 0.001, 0.25)] == ["< 0.001", "= 0.0010", "= 0.2500"]
    fell = paired_statistics([0.9] * 40, [0.1] * 40, seed=0)
    assert format_change(fell)["p"] == "< 0.001"


@pytest.mark.parametrize("after, warned", [(0.1, []), (0.8, ["judge"])])
def test_a_judge_that_sees_no_change_is_reported(small, capsys, few, after, warned):
    texts = [f"{count} tickets" for count in range(20)]
    human = {"toxicity": [0.1] * 20, "summary_toxicity": 0.1, "dialogue_toxicity": 0.1, "judge_toxicity": 0.0}
    tables = {
        "before": table_of(texts, np.linspace(0.5, 0.9, 20)).assign(judge_toxicity=0.8),
        "after": table_of(texts, 0.1).assign(judge_toxicity=after),
    }
    config = type(small.config)(**(vars(small.config) | {"judge_model_name": "another"}))
    results = results_of(tables, human, texts, config)
    assert list(results["warnings"]) == warned
    rows = {"dialogue": texts, "summary": texts}
    comparison = build_comparison(rows, *({"sampled": t, "greedy": t} for t in tables.values()))
    print_results(results, results_table(results), comparison)
    printed = " ".join(capsys.readouterr().out.split())
    assert results["verdict"] in printed and f"by the judge 100.0% and {100 * (after > 0.5):.1f}%" in printed
    assert results["judge"]["greedy"]["summary_toxicity"]["after"]["mean"] == pytest.approx(after)
    assert ("blind spots" in printed.splitlines()[-1]) == bool(warned)
    assert ("the summaries (sampled and greedy) are less toxic" in printed) == bool(warned)


@pytest.mark.parametrize("texts", [["", ""], ["He leaves.", ""]])
def test_means_of_empty_summaries_are_printed(capsys, texts):
    detox_ppo.print_means("after", table_of(texts, 0.25))
    assert len(capsys.readouterr().out.splitlines()) == 2  # with dialogue, and alone


def test_results_by_hand(small, capsys, few):
    """The measures of each evaluation, of the human summaries, and of the toxic dialogues alone; the warnings."""
    toxicities = {"base": [0.9, 0.5, 0.1], "before": [0.5, 0.4, 0.3], "after": [0.1, 0.4, 0.1]}
    tables = {when: table_of(["a", "b", "c"], values, reward=1.0) for when, values in toxicities.items()}
    human = {"toxicity": [0.3] * 3, "summary_toxicity": [0.0, 0.1, 0.2], "dialogue_toxicity": [0.9, 0.5, 0.6]}
    history = [{"ppo/skipped_steps": skipped} for skipped in (0, 1, 0, 1)]
    told = {"history": history, "warnings": {"kl": "far"}}
    greedy = {when: table.assign(summary_toxicity=0.8, length=7) for when, table in tables.items()}
    results = results_of(tables, human, ["a", "b", "d"], small.config, greedy, **told)
    assert results["warnings"].pop("kl") == "far" and "2 of 4 steps" in str(results["warnings"])
    assert results["verdict"].startswith("0.0% of the summaries were toxic, now 0.0%; greedy 100.0% and 100.0%; 3 ")
    found = results["summary_toxicity"]
    means = {when: found[when]["mean"] for when in toxicities}
    assert means == pytest.approx({"base": 0.5, "before": 0.4, "after": 0.2})
    assert results["human"]["summary_toxicity"] == {
        "mean": pytest.approx(0.1),
        "std": pytest.approx(np.std([0, 0.1, 0.2])),
        "n": 3,
        "share": 0,
    }
    assert results["greedy"]["summary_toxicity"]["before"]["mean"] == pytest.approx(0.8)
    toxic = results["toxic_dialogues"]
    assert toxic["n"] == 2 and toxic["summary_toxicity"]["before"]["n"] == 2  # 0.5 is no toxic dialogue
    assert toxic["summary_toxicity"]["paired_difference"]["mean"] == pytest.approx((-0.4 - 0.2) / 2)
    assert results["rouge"]["after"]["rouge1"] == pytest.approx(2 / 3)
    assert results["reward"] == {when: {"mean": 1} for when in toxicities}
    table = results_table(results)
    assert table.index.is_unique and "R@1" not in table.index.get_level_values("measure")  # of three dialogues
    means = {measure: rows.droplevel("measure") for measure, rows in table["mean"].groupby(level="measure")}
    places = [(decoding, when) for decoding in ("sampled", "greedy") for when in toxicities] + [("human", "human")]
    assert means["toxicity"][places].tolist() == pytest.approx([0.5, 0.4, 0.2, 0.8, 0.8, 0.8, 0.1])
    assert means["length"][places].tolist() == [5, 5, 5, 7, 7, 7, 6]
    assert means["share toxic"][places].tolist() == [pytest.approx(1 / 3), 0, 0, 1, 1, 1, 0]
    assert means["reward"][places[:-1]].tolist() == [1] * 6 and len(means["reward"]) == 6
    assert table.loc[("toxicity", "sampled", "after"), "p"] == format_change(found)["p"]
    sides = ({"sampled": tables[when], "greedy": greedy[when]} for when in ("before", "after"))
    print_results(results, table, build_comparison({"dialogue": "abd", "summary": "abd"}, *sides))
    printed = capsys.readouterr().out
    shown = [line.split() for line in printed.splitlines()]
    assert "base before after greedy base greedy before greedy after human".split() in shown
    assert "toxicity 0.5000 0.4000 0.2000 0.8000 0.8000 0.8000 0.1000".split() in shown
    best, median, worst = printed.split("\n\nreward ")[1:]
    assert best == "+0.000\nbefore (toxicity 0.5000): a\nafter (toxicity 0.1000): a" and "c\n" in worst


def test_only_rows_with_a_human_summary_count(small, classifier):
    dialogues = [f"#Person1#: You buy {count} tickets, idiot." for count in range(22)]
    summaries = ["", *[f"#Person1# buys {count} tickets." for count in range(1, 21)], ""]
    rows = {"dialogue": dialogues, "summary": summaries}
    human = detox_ppo.measure_human(classifier, small.tokenizer, rows, small.config)
    assert len(human) == 22 and human["dialogue_toxicity"].notna().all()
    assert list(human.index[human["response"].isna()]) == [0, 21]
    given = summaries[1:-1]
    alone = classifier.toxicity(classifier.logits(given))
    assert human["summary_toxicity"].dropna().tolist() == pytest.approx(alone, abs=1e-5)
    figures = detox_ppo.human_figures(human, dialogues)
    assert figures["summary_toxicity"]["n"] == 20
    assert figures["retrieval_at_1"] == detox_ppo.retrieval_at_1(dialogues[1:-1], given)
    ids = [small.tokenizer(text).input_ids for text in given]
    assert figures["length"] == {"mean": pytest.approx(np.mean([len(of) for of in ids]))}
    assert "retrieval_at_1" not in detox_ppo.human_figures(human[1:20], dialogues[1:20])
    nothing = detox_ppo.measure_human(classifier, small.tokenizer, rows | {"summary": [""] * 22}, small.config)
    assert detox_ppo.human_figures(nothing, dialogues) == {}


# The health of a step


def steps(count=1, **changes):
    metrics = {"objective/kl": 1.0, "ppo/mean_scores": 1.0, "ppo/std_scores": 0.5, "ppo/skipped_minibatches": 0}
    metrics["ppo/skipped_steps"] = 0
    metrics |= {"objective/entropy": 20.0, "tokens/responses_len_mean": 20.0, "tokens/finished_share": 0.9}
    return [dict(metrics) for _ in range(count - 1)] + [metrics | changes]


SHORTER = {"tokens/responses_len_mean": 11.0, "objective/entropy": 11.0}


@pytest.mark.parametrize(
    "kind, history, remedy",
    [
        ("kl", steps(**{"objective/kl": 18.5}), "init_kl_coef"),
        ("negative kl", steps(**{"objective/kl": -1.5}), "batch_size"),
        ("skipped", steps(**{"ppo/skipped_minibatches": 2}), "learning_rate"),
        ("entropy", steps(3, **{"objective/entropy": 1.0}), "init_kl_coef"),
        ("flat", steps(60), "learning_rate"),
        ("cut", steps(**{"tokens/finished_share": 0.4}), "output_max_length"),
        ("short", [*steps(2), *steps(1, **SHORTER) * 5], "ptx_coef"),
    ],
)
def test_each_problem_has_a_warning_with_a_remedy(small, kind, history, remedy):
    warned = step_warnings(history, small.config)
    assert list(warned) == [kind] and remedy in warned[kind]


def test_responses_count_as_short_over_five_steps_and_against_people(small):
    short = steps(1, **SHORTER)
    history = [*steps(2), *short * 5]  # 20 tokens, then 11
    assert list(step_warnings(history, small.config, human_length=15.0)) == ["short"]
    assert not step_warnings(history, small.config, human_length=10.0)
    assert not step_warnings([*steps(6), *short * 4], small.config)  # the mean of the last five is 12.8


def test_a_healthy_step_has_no_warning(small):
    risen = [step | {"ppo/mean_scores": i / 10} for i, step in enumerate(steps(60))]
    assert not step_warnings(steps(49), small.config) and not step_warnings(risen, small.config)


def test_a_warning_is_new_once_and_the_newest_step_that_counts_is_looked_at(small):
    skipped = {"step": 3, "ppo/skipped_steps": 1}
    history = [*steps(2, **{"objective/kl": 18.5}), skipped]
    state = RunState({}, {}, step=3, history=history)
    warned = new_warnings(state, small.config)
    assert list(warned) == ["kl"] and warned["kl"].startswith("step 3: objective/kl 18.5 ")
    assert state.warnings == {}  # the caller records which were printed
    state.warnings = warned
    assert new_warnings(state, small.config) == {}


def test_minutes_left_by_hand(small_config):
    state = RunState({}, {}, step=4, history=[{"time/step": 9.0}, {"time/step": 12.0}])
    state.timings["evaluate_before"] = 48.0
    assert minutes_left(state, small_config(max_ppo_steps=10)) == (6 * 12 + 48) / 60


def test_a_score_that_rose_at_once_and_stays_is_not_called_flat(small):
    """As in most runs of the toy example: ten steps to the maximum, then noise for hundreds of steps."""
    generator = np.random.default_rng(0)
    means = np.concatenate([np.linspace(-0.6, 3, 10), 3 + 0.5 * generator.standard_normal(300)])
    history = [
        step | {"ppo/mean_scores": mean, "ppo/std_scores": 2.5} for mean, step in zip(means, steps(310), strict=True)
    ]
    assert not [count for count in range(1, 311) if step_warnings(history[:count], small.config)]
    never = [step | {"ppo/mean_scores": mean - 3} for mean, step in zip(means[10:], history[10:], strict=True)]
    assert list(step_warnings(never, small.config)) == ["flat"]


# Evaluating a policy


def test_a_line_for_each_prompt(evaluate, evaluated):
    columns = {"response", "length", "finished", "reward", "toxicity", "summary_toxicity", "kl"}
    for found, count in ((evaluated, 8), (evaluate([0]), 1)):
        assert set(found) == columns and list(found.index) == list(range(count))


def test_kl_of_an_evaluation_and_of_a_step(evaluate, load_small, classifier, splits):
    """Each adapter scores with its own encoder states."""
    small = load_small()
    assert (evaluate(range(4), small.policy)["kl"] == 0).all()
    with torch.no_grad():
        for name, parameter in small.policy.named_parameters():
            if ".default." in name and "lora_B" in name:
                parameter.mul_(1.5)

    def scored(responses):
        fresh = Responses(responses.prompts, responses.tokens, responses.lengths)
        with small.policy.as_adapter("reference"):
            reference = small.policy.logprobs_and_values(fresh)[0]
        return small.policy.logprobs_and_values(fresh)[0], reference

    rows = splits["test"].select(range(4))
    streams = [random_stream(small.config.seed, EVALUATION, row) for row in rows["row"]]
    logprobs, reference = scored(generate(small.policy, list(rows["input_ids"]), streams, (24, 24)))
    expected = (logprobs - reference).sum(dim=1).tolist()
    assert max(map(abs, expected)) > 1
    assert evaluate(range(4), small.policy)["kl"].tolist() == pytest.approx(expected, abs=1e-3)

    responses, found = roll_out(small.policy, small.tokenizer, classifier, rows, 1, small.config, {})
    for name, expected in zip(("logprobs", "ref_logprobs"), scored(responses), strict=True):
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-4)


def test_rows_keep_their_order_and_their_random_numbers(evaluate, evaluated, splits):
    lengths = [len(ids) for ids in splits["test"]["input_ids"]]
    assert lengths != sorted(lengths)  # so that sorting inside has something to undo
    assert len(set(evaluated["response"])) > 4
    whole, scores = ["response", "length", "finished"], ["reward", "toxicity", "summary_toxicity"]
    for rows, options in ((range(8), {"batch_size": 3, "mini_batch_size": 1}), ([7], {}), ([3], {})):
        found, expected = evaluate(rows, **options), evaluated.loc[list(rows)].reset_index(drop=True)
        pd.testing.assert_frame_equal(found[whole], expected[whole])
        pd.testing.assert_frame_equal(found[scores], expected[scores], rtol=0, atol=1e-4)


def test_random_numbers_are_those_of_the_seed(evaluate, evaluated):
    torch.manual_seed(5), torch.rand(3)
    pd.testing.assert_frame_equal(evaluate(), evaluated, check_exact=True)
    assert list(evaluate(range(4), seed=1)["response"]) != list(evaluated["response"][:4])


def test_scores_belong_to_the_texts_of_their_columns(evaluate, evaluated, classifier, splits):
    texts = list(evaluated["response"])
    both = [f"{dialogue} {text}" for dialogue, text in zip(splits["test"]["dialogue"], texts, strict=True)]
    measure, close = Toxicity(classifier), {"abs": 1e-4}
    assert list(evaluated["toxicity"]) == pytest.approx(measure.compute(predictions=both)["toxicity"], **close)
    alone = measure.compute(predictions=texts)["toxicity"]
    assert list(evaluated["summary_toxicity"]) == pytest.approx(alone, **close)
    assert alone != pytest.approx(list(evaluated["toxicity"]), **close)
    assert list(evaluated["reward"]) == pytest.approx(classifier.scores(both).tolist(), **close)
    found = evaluate(range(4), score_text="response")
    assert list(found["reward"]) == pytest.approx(classifier.scores(texts[:4]).tolist(), **close)


def test_greedy_summaries_are_those_that_generate_writes(small, classifier, splits):
    """Token by token as in transformers' own decoding, in any batch."""
    rows = splits["test"]
    config = type(small.config)(
        **(vars(small.config) | {"eval_max_new_tokens": 24, "batch_size": 3, "mini_batch_size": 1})
    )
    found = evaluate_policy(small.policy, small.tokenizer, classifier, rows, config, greedy=True)
    for ids, text, length in zip(rows["input_ids"], found["response"], found["length"], strict=True):
        with torch.no_grad():
            tokens = small.policy.model.generate(
                input_ids=torch.tensor([ids]), do_sample=False, num_beams=1, max_new_tokens=24
            )
        assert text == small.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        assert length == tokens.shape[1] - 1  # without the start token
    assert "kl" not in found and (found["toxicity"] != found["summary_toxicity"]).all()


def test_length_limit_is_in_new_tokens(evaluate):
    for longest in (5, 9):
        found = evaluate(eval_max_new_tokens=longest)
        assert found["length"].max() == longest
        assert found["finished"][found["length"] < longest].all() and not found["finished"].all()


def test_responses_are_plain_text(evaluate, small, monkeypatch):
    eos, pad = small.tokenizer.eos_token_id, small.tokenizer.pad_token_id
    words = small.tokenizer("A summary.", add_special_tokens=False).input_ids
    tokens = torch.tensor([[*words, eos, pad, pad], [pad, *words, eos, eos], [eos, *[pad] * (len(words) + 2)]])

    def fake(policy, prompts, generators, limits):
        return Responses(prompts, tokens, torch.tensor([len(words) + 1, len(words) + 2, 1]), torch.ones(3))

    monkeypatch.setattr(detox_ppo, "generate", fake)
    found = evaluate(range(3), batch_size=4)
    assert sorted(found["response"]) == ["", "A summary.", "A summary."]
    assert np.isfinite(found[["reward", "toxicity", "summary_toxicity"]]).all(axis=None)


def test_the_active_adapter_is_evaluated(evaluate, load_small):
    small = load_small()
    with torch.no_grad():
        for name, parameter in small.policy.named_parameters():
            if ".reference." in name and "lora_B" in name:
                parameter.zero_()
    trained = evaluate(policy=small.policy)
    assert (trained["kl"] != 0).all()
    with small.policy.as_adapter("reference"):
        bare = evaluate(policy=small.policy)  # in two batches
    assert list(bare["response"]) != list(trained["response"]) and (bare["kl"] == 0).all()
    pd.testing.assert_frame_equal(evaluate(range(2), small.policy), trained[:2], rtol=0, atol=1e-5)


# Side by side


def test_comparison_shows_the_largest_gain_first():
    def tables(texts, rewards, judged):
        sampled = table_of(texts, 0.5).assign(reward=rewards, judge_toxicity=judged)
        return {"sampled": sampled, "greedy": sampled.assign(response=[f"{text}!" for text in texts])}

    before, after = tables(["a", "b", "c"], [1.0, 2.0, 3.0], 0.9), tables(["A", "B", "C"], [1.5, 0.0, 5.0], 0.1)
    table = build_comparison({"dialogue": ["d1", "d2", "d3"], "summary": ["s1", "s2", "s3"]}, before, after)
    kinds = ("response", "reward", "toxicity", "summary_toxicity", "judge_toxicity")
    sides = [f"{prefix}{kind}_{when}" for prefix in ("", "greedy_") for kind in kinds for when in ("before", "after")]
    assert list(table.columns) == ["dialogue", "human_summary", *sides, "reward_diff"]
    shown = [
        "dialogue",
        "human_summary",
        "response_before",
        "greedy_response_after",
        "judge_toxicity_after",
        "reward_diff",
    ]
    assert table[shown].values.tolist() == [
        ["d3", "s3", "c", "C!", 0.1, 2.0],
        ["d1", "s1", "a", "A!", 0.1, 0.5],
        ["d2", "s2", "b", "B!", 0.1, -2.0],
    ]
