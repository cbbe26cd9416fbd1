"""The classifier: which logit is the score, what text it reads, and the toxicity measurement."""

import json
import math
import shutil
from types import SimpleNamespace

import evaluate
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    FNetConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    MptConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

import detox_ppo
from detox_ppo import Toxicity, ToxicityClassifier, UserError, print_examples

pytestmark = pytest.mark.usefixtures("quick")


GREAT = "You are a great person and i like you."
TERRIBLE = "You are a terrible person and i hate you."
SUMMARY = "#Person1# asks #Person2# to bring the umbrella to the station on Monday, that idiot."
TEXTS = [TERRIBLE, "Hi", GREAT, "", "The weather is nice today. " * 30, "You moron!", "The weather is nice today."]


@pytest.fixture(scope="module")
def plain(tiny):
    """Logits by plain transformers, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(tiny / "classifier", dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(text):
        return model(**tokenizer(text, return_tensors="pt")).logits[0]

    return logits


@pytest.fixture
def read(classifier, monkeypatch):
    """The token ids that the classifier's model reads for one text."""
    seen, model = [], classifier.model

    def spy(input_ids, attention_mask, **kwargs):
        seen.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    class Spy(SimpleNamespace):
        __call__ = staticmethod(spy)

    monkeypatch.setattr(classifier, "model", Spy(config=model.config, device=model.device, dtype=model.dtype))

    def read(text):
        seen.clear()
        classifier.scores([text])
        (ids,) = seen
        return ids

    return read


def load(small_config, path, **overrides):
    return ToxicityClassifier(small_config(reward_model_name=path, **overrides), torch.device("cpu"))


def relabelled(tiny, tmp_path, labels):
    """The bundled classifier with other label names."""
    shutil.copytree(tiny / "classifier", tmp_path / "classifier")
    path = tmp_path / "classifier" / "config.json"
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    return tmp_path / "classifier"


# Which logit


def test_score_is_the_raw_nothate_logit(classifier, plain):
    scores = classifier.scores([GREAT, TERRIBLE])
    assert scores.shape == (2,) and scores.dtype == torch.float32
    for score, text in zip(scores, (GREAT, TERRIBLE), strict=True):
        assert score == pytest.approx(plain(text)[0].item(), abs=1e-4)
    # On toxic text the other logit is larger: in a list sorted by score it would become the reward.
    assert plain(TERRIBLE)[1] > plain(TERRIBLE)[0] + 1


def test_score_follows_the_label_not_the_position(small_config, tiny, tmp_path, plain):
    swapped = load(small_config, relabelled(tiny, tmp_path, ["hate", "nothate"]))
    expected = [plain(text)[1].item() for text in (GREAT, TERRIBLE)]
    assert swapped.scores([GREAT, TERRIBLE]).tolist() == pytest.approx(expected, abs=1e-4)
    toxicity = Toxicity(swapped).compute(predictions=[GREAT])["toxicity"]
    assert toxicity == pytest.approx([plain(GREAT).softmax(-1)[0].item()], abs=1e-4)


def test_score_follows_the_option(small_config, tiny, plain):
    reversed_ = load(small_config, tiny / "classifier", reward_label="hate", toxic_label="nothate")
    assert reversed_.scores([GREAT])[0] == pytest.approx(plain(GREAT)[1].item(), abs=1e-4)


@pytest.mark.parametrize("option", ["reward_label", "toxic_label"])
def test_classifier_without_a_required_label(small_config, tiny, tmp_path, option):
    path = relabelled(tiny, tmp_path, ["fine", "rude"])
    other = {"reward_label": "toxic_label", "toxic_label": "reward_label"}[option]
    with pytest.raises(UserError) as error:
        load(small_config, path, **{other: "fine"})
    message = str(error.value)
    for word in (option, str(path), "fine", "rude"):
        assert word in message
    assert load(small_config, path, reward_label="fine", toxic_label="rude").labels == ["fine", "rude"]


# Every kind of classifier


def one_of(family, tiny, directory, labels, problem_type=None):
    """A random classifier of a family with the bundled classifier's tokenizer."""
    words = len(AutoTokenizer.from_pretrained(tiny / "classifier"))
    ids = {"vocab_size": words, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "bert": lambda: BertConfig(**ids, **small, max_position_embeddings=64),
        "bart": lambda: BartConfig(
            **ids, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32
        ),
        "fnet": lambda: FNetConfig(**ids, hidden_size=32, intermediate_size=32, num_hidden_layers=1),
        "gemma3": lambda: Gemma3Config(
            text_config=Gemma3TextConfig(
                **ids, **small, num_key_value_heads=1, head_dim=16, max_position_embeddings=80
            ),
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        ),
        "mpt": lambda: MptConfig(**ids, d_model=32, n_heads=2, n_layers=1, expansion_ratio=1, max_seq_len=96),
        "distilbert": lambda: DistilBertConfig(**ids, dim=32, hidden_dim=32, n_layers=2, n_heads=2),
        "gpt2": lambda: GPT2Config(**ids, n_embd=32, n_layer=2, n_head=2, n_positions=128),
        "roberta": lambda: RobertaConfig(**ids, **small, max_position_embeddings=66),
        "t5": lambda: T5Config(
            **ids, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=1
        ),
        "xlnet": lambda: XLNetConfig(**ids, d_model=32, n_layer=2, n_head=2, d_inner=32),
    }[family]()
    config.id2label, config.problem_type = dict(enumerate(labels)), problem_type
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # the initial heads are so small that all texts have similar scores
        for name, parameter in model.named_parameters():
            if any(head in name for head in ("classifier", "score", "classification_head", "logits_proj")):
                parameter.mul_(30)
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "classifier")
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(directory)
    return directory


def probability(predictions, label):
    """The score of one label in a pipeline's output for one text."""
    (score,) = [prediction["score"] for prediction in predictions if prediction["label"] == label]
    return score


@pytest.mark.parametrize(
    "labels, problem_type, options",
    [
        (["nothate", "hate"], None, {}),
        (["NOT", "OFF"], "single_label_classification", {"reward_label": "NOT", "toxic_label": "OFF"}),
        (["LABEL_0", "LABEL_1"], None, {"reward_label": "LABEL_0", "toxic_label": "LABEL_1"}),
        (["hate", "offensive", "neither"], None, {"reward_label": "neither"}),
        (["toxic"], None, {"reward_label": None, "toxic_label": "toxic"}),
        (
            ["toxic", "severe_toxic", "obscene"],
            "multi_label_classification",
            {"reward_label": None, "toxic_label": "toxic"},
        ),
    ],
)
def test_probabilities_are_those_of_transformers_pipeline(small_config, tiny, tmp_path, labels, problem_type, options):
    path = one_of("bert", tiny, tmp_path / "one", labels, problem_type)
    classifier = load(small_config, path, **{name: value or "" for name, value in options.items()})
    pipeline = transformers.pipeline("text-classification", model=str(path), device="cpu", top_k=None)
    texts = TEXTS[:3]
    logits = classifier.logits(texts)
    for label in labels:
        expected = [probability(predictions, label) for predictions in pipeline(texts)]
        assert classifier.toxicity(logits, label) == pytest.approx(expected, abs=1e-5)
    options = {"reward_label": "nothate", "toxic_label": "hate"} | options
    assert classifier.toxicity(logits) == classifier.toxicity(logits, options["toxic_label"])
    if options["reward_label"]:
        expected = logits[:, labels.index(options["reward_label"])]
    else:
        expected = -logits[:, labels.index(options["toxic_label"])]
    assert len(expected.unique()) > 1 and torch.equal(classifier.scores(texts), expected)


@pytest.mark.parametrize("label", ["severe_toxic", "neutral", "not-hate"])
def test_labels_that_do_not_exclude_each_other_need_no_reward_label(small_config, tiny, tmp_path, label):
    path = one_of("bert", tiny, tmp_path / "one", ["toxic", label], "multi_label_classification")
    with pytest.raises(UserError, match=f"--reward_label '{label}'.*--reward_label None"):
        load(small_config, path, reward_label=label, toxic_label="toxic")


def test_without_a_harmless_label_the_message_has_a_solution(small_config, tiny, tmp_path):
    path = one_of("bert", tiny, tmp_path / "one", ["toxic"])
    with pytest.raises(
        UserError, match="--reward_label 'nothate' is not a label of .* it has toxic; with None the score is minus"
    ):
        load(small_config, path, toxic_label="toxic")


def test_a_regression_model_is_an_error(small_config, tiny, tmp_path):
    path = one_of("bert", tiny, tmp_path / "one", ["toxic"], "regression")
    with pytest.raises(UserError, match=f"--reward_model_name {path}.* it is a regression"):
        load(small_config, path, reward_label="", toxic_label="toxic")


@pytest.mark.parametrize(
    "family, length",
    [
        ("bert", 64),
        ("distilbert", 512),
        ("gemma3", 80),
        ("gpt2", 128),
        ("mpt", 96),
        ("roberta", 64),
        ("t5", math.inf),
        ("xlnet", math.inf),
    ],
)
def test_positions_of_each_family(small_config, tiny, tmp_path, family, length):
    """The model's number of positions; texts of any length have the same score alone and in a batch."""
    classifier = load(small_config, one_of(family, tiny, tmp_path / "one", ["nothate", "hate"]))
    assert detox_ppo.positions_of(classifier.model) == length
    long = classifier.join("#Person1#: Where is the wide, wooden table? " * 60, "A table is looked for.")
    assert long.endswith("A table is looked for.") and len(long) < 3000 or length == math.inf
    texts = ["", *TEXTS[:3], long]
    together, alone = classifier.logits(texts), torch.cat([classifier.logits([text]) for text in texts])
    assert together.isfinite().all() and together.std() > 0
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family, changed, side",
    [
        ("bert", {"padding_side": "left"}, "right"),
        ("gpt2", {"padding_side": "left"}, "right"),
        ("roberta", {"model_input_names": ["input_ids"]}, "right"),
        ("xlnet", {"padding_side": "right"}, "left"),
    ],
)
def test_padding_changes_no_logit(small_config, tiny, tmp_path, family, changed, side):
    """Whatever padding tokenizer_config.json sets."""
    path = one_of(family, tiny, tmp_path / "one", ["nothate", "hate"])
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changed))
    classifier = load(small_config, path)
    assert classifier.tokenizer.padding_side == side
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        expected = torch.cat([classifier.model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS[:3]])
    assert expected.std() > 0.1
    torch.testing.assert_close(classifier.logits(TEXTS[:3]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family, fault", [("fnet", "padding changes its logits"), ("bart", "number of <eos> tokens")])
def test_a_classifier_that_can_t_be_padded_is_one_line(small_config, tiny, tmp_path, family, fault):
    """FNet has no attention mask. BART counts EOS tokens, so EOS cannot be its padding token."""
    path = one_of(family, tiny, tmp_path / "one", ["nothate", "hate"])
    if family == "bart":
        settings = path / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "</s>"}))
    with pytest.raises(UserError, match=f"--reward_model_name {path}: can't be loaded: .*{fault}"):
        load(small_config, path)


def test_judge(small_config, tiny, tmp_path):
    """It uses the judge's options and scores responses without dialogues."""
    labels = ["insult", "toxic"]
    path = one_of("bert", tiny, tmp_path / "one", labels, "multi_label_classification")
    config = small_config(judge_model_name=path)
    table = pd.DataFrame({"response": TEXTS[:3]})
    detox_ppo.add_judge({"some": table}, config, torch.device("cpu"))
    pipeline = transformers.pipeline("text-classification", model=str(path), device="cpu", top_k=None)
    expected = [probability(predictions, "toxic") for predictions in pipeline(TEXTS[:3])]
    assert table["judge_toxicity"].tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="--judge_label 'rude' is not a label of .*: it has insult, toxic"):
        detox_ppo.add_judge({}, small_config(judge_model_name=path, judge_label="rude"), torch.device("cpu"))
    with pytest.raises(UserError, match="--judge_model_name .* it is also the reward model"):
        small_config(judge_model_name=tiny / "classifier")


# Many texts


def test_batches_and_order_change_nothing(classifier, plain):
    expected = torch.stack([plain(text) for text in TEXTS])
    torch.testing.assert_close(classifier.logits(TEXTS), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(classifier.logits(TEXTS[::-1]), expected.flip(0), rtol=0, atol=1e-4)
    many = TEXTS * 10
    torch.testing.assert_close(classifier.logits(many), expected.repeat(10, 1), rtol=0, atol=1e-4)


# Text that the classifier reads


def test_short_text_is_read_unchanged(classifier, read):
    joined = classifier.join("#Person1#: Hello. \n", "  A greeting. ")
    assert joined == "#Person1#: Hello. A greeting."
    tokenizer = classifier.tokenizer
    assert read(joined) == tokenizer(joined).input_ids
    assert tokenizer.decode(read(joined), skip_special_tokens=True) == joined


def check_kept(classifier, read, dialogue, summary):
    """The summary is complete, at the end, and the dialogue fills the space before it."""
    tokenizer, longest = classifier.tokenizer, classifier.max_length
    ids = read(classifier.join(dialogue, summary))
    summary_ids = tokenizer(" " + summary, add_special_tokens=False).input_ids
    assert len(ids) <= longest
    assert ids[-1 - len(summary_ids) : -1] == summary_ids
    everything = tokenizer(f"{dialogue.strip()} {summary}").input_ids
    if len(everything) <= longest:
        assert ids == everything
    else:
        # The word at the cut may be dropped or split into more tokens.
        before = ids[1 : -1 - len(summary_ids)]
        assert longest - 12 <= len(ids)
        assert before[:-12] == everything[1 : len(before) - 11]


WORDS = ["hello", "umbrella", "#Person1#:", "unheard-of", "it's", "\n", "Zürich", "naïve", "12:30", "!?"]


@pytest.mark.parametrize("summary", ["Yes", SUMMARY, SUMMARY * 6], ids=["short", "usual", "long"])
def test_summary_is_kept_whatever_the_length_of_the_dialogue(classifier, read, summary):
    generator = np.random.default_rng(0)
    for count in [1, 2, 500, 2000, *range(100, 300, 19), *generator.integers(100, 400, 6)]:
        check_kept(classifier, read, " ".join(generator.choice(WORDS, size=count)), summary)


@pytest.mark.parametrize("shift", range(8))
def test_summary_is_kept_when_the_cut_splits_a_character(classifier, read, shift):
    # Characters of several tokens: the text before them decides whether the cut splits one.
    check_kept(classifier, read, "a" * shift + "😀" * 600, SUMMARY)
    check_kept(classifier, read, "hi " * shift + "שלום " * 300, SUMMARY)


def test_empty_dialogue_and_empty_summary(classifier, read):
    assert classifier.join("", "Summary.") == "Summary."
    assert classifier.join("Dialogue.", "") == "Dialogue."
    assert len(read(classifier.join("hello " * 5000, ""))) <= classifier.max_length
    assert classifier.scores([classifier.join("", "")]).shape == (1,)


def test_summary_longer_than_the_classifier_reads(classifier, read):
    summary = "table " * 600
    ids = read(classifier.join("dialogue", summary))
    assert len(ids) == classifier.max_length
    assert len(set(ids[2:-1])) == 1  # nothing of the dialogue


def test_special_tokens_in_a_text_are_text(classifier, read):
    tokenizer = classifier.tokenizer
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.cls_token_id}
    for text in ("a </s> b", "<pad>", "<s>a</s>", "Well</s></s>"):
        inside = read(text)[1:-1]
        assert not specials & set(inside), text
        assert read(text)[0] == tokenizer.cls_token_id and read(text)[-1] == tokenizer.eos_token_id


def test_length_limit_is_the_models_where_the_tokenizer_has_none(small_config, tiny, tmp_path, classifier):
    shutil.copytree(tiny / "classifier", tmp_path / "classifier")
    path = tmp_path / "classifier" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["model_max_length"]
    path.write_text(json.dumps(settings))
    unlimited = load(small_config, tmp_path / "classifier")
    assert unlimited.max_length == classifier.max_length == 512
    assert unlimited.scores(["hello " * 5000]).shape == (1,)


@pytest.mark.parametrize("score_text", ["query_response", "response"])
def test_a_run_loads_each_model_once_and_scores_plain_text(small_config, monkeypatch, tmp_path, score_text):
    loaded, scored = [], []
    for name in ("AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification"):
        kind = getattr(detox_ppo, name)

        def counted(*args, original=kind.from_pretrained, name=name, **kwargs):
            loaded.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", counted)
    logits = ToxicityClassifier.logits
    monkeypatch.setattr(
        ToxicityClassifier, "logits", lambda self, texts, *dtype: scored.extend(texts) or logits(self, texts, *dtype)
    )
    config = small_config(max_ppo_steps=1, score_text=score_text, output_max_length=24, output_dir=tmp_path / "run")
    detox_ppo.run(config)
    assert sorted(loaded) == ["AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification"]
    # Two texts of the padding check and two examples. Once: human summaries joined and alone, and dialogues. Before
    # and after, sampled and greedy: summaries joined and alone. In between, the batch of the single step.
    count = config.eval_samples
    assert len(scored) == 4 + 3 * count + 4 * count + config.batch_size + 4 * count
    assert not [text for text in scored if "<pad>" in text or "</s>" in text or text != text.strip()]
    batch = scored[-4 * count - config.batch_size : -4 * count]
    assert all(text.startswith("#Person1#: ") == (score_text == "query_response") for text in batch)
    assert not [text for text in batch if "Summarize the following" in text]


# Toxicity


def test_toxicity_has_the_interface_of_the_measurement_of_evaluate(classifier, plain):
    measure = Toxicity(classifier)
    assert isinstance(measure, evaluate.Measurement)
    assert measure.classifier is classifier
    expected = [plain(text).softmax(-1)[1].item() for text in TEXTS]
    close = {"abs": 1e-5}
    assert measure.compute(predictions=TEXTS) == {"toxicity": pytest.approx(expected, **close)}
    assert measure.compute(predictions=TEXTS, aggregation="all")["toxicity"] == pytest.approx(expected, **close)
    maximum = measure.compute(predictions=TEXTS, aggregation="maximum")
    assert maximum == {"max_toxicity": pytest.approx(max(expected), **close)}
    fine = measure.compute(predictions=TEXTS, toxic_label="nothate")["toxicity"]
    assert fine == pytest.approx([1 - value for value in expected], **close)


def test_toxicity_ratio_counts_from_the_threshold_on(classifier):
    measure = Toxicity(classifier)
    values = sorted(measure.compute(predictions=TEXTS)["toxicity"])
    assert values[1] < 0.5 < values[-2]  # texts on both sides, or the default threshold would not be tested
    over_half = sum(value > 0.5 for value in values) / len(values)
    assert measure.compute(predictions=TEXTS, aggregation="ratio") == {"toxicity_ratio": pytest.approx(over_half)}
    for rank in range(1, 4):
        result = measure.compute(predictions=TEXTS, aggregation="ratio", threshold=values[-rank])
        assert result["toxicity_ratio"] == pytest.approx(rank / len(values))


def test_toxicity_rejects_unknown_arguments(classifier):
    with pytest.raises(ValueError, match="rude.*nothate.*hate"):
        Toxicity(classifier).compute(predictions=["a"], toxic_label="rude")
    with pytest.raises(ValueError, match="median.*maximum.*ratio"):
        Toxicity(classifier).compute(predictions=["a"], aggregation="median")


# The two sentences of the notebooks


def test_examples_are_printed_with_logits_probabilities_and_reward(classifier, plain, capsys):
    print_examples(classifier)
    printed = capsys.readouterr().out
    assert printed.index(GREAT) < printed.index(TERRIBLE)
    assert "nothate, hate" in printed
    blocks = printed.split(TERRIBLE)
    for block, text in zip(blocks, (GREAT, TERRIBLE), strict=True):
        logits = plain(text)
        probabilities = logits.softmax(-1)
        assert f"[{logits[0]:.4f}, {logits[1]:.4f}]" in block
        assert f"[{probabilities[0]:.6f}, {probabilities[1]:.6f}]" in block
        assert f"reward {logits[0]:.4f}" in block


def test_bundled_classifier_separates_great_from_terrible(classifier):
    great, terrible = classifier.scores([GREAT, TERRIBLE])
    assert great > 1 and terrible < -1
    low, high = Toxicity(classifier).compute(predictions=[GREAT, TERRIBLE])["toxicity"]
    assert low < 0.1 and high > 0.9


def test_the_judge_runs_in_float32_with_any_policy_dtype(small_config):
    classifier = ToxicityClassifier(small_config(dtype="bfloat16"), torch.device("cpu"))
    assert {parameter.dtype for parameter in classifier.model.parameters()} == {torch.float32}
