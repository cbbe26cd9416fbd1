"""Sampling and scoring: the sampled distribution is the scored one, token by token, in any batch."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LEDForConditionalGeneration,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
    UMT5ForConditionalGeneration,
)

import detox_ppo
from detox_ppo import (
    EVALUATION,
    ROLLOUT,
    evaluate_policy,
    generate,
    ppo_step,
    random_stream,
    sample_tokens,
)

SEED = 3


def floats(*rows):
    return torch.tensor(rows, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(splits):
    """Six prompts of different lengths."""
    chosen = list(splits["train"]["input_ids"][:6])
    assert len({len(prompt) for prompt in chosen}) > 3
    return chosen


def streams(rows, step=1, seed=SEED):
    return [random_stream(seed, ROLLOUT, step, row) for row in rows]


def sample(small, prompts, rows=None, step=1, limits=(4, 24), seed=SEED):
    return generate(small.policy, prompts, streams(rows or range(len(prompts)), step, seed), limits)


def tokens_of(responses):
    return [row[:length].tolist() for row, length in zip(responses.tokens, responses.lengths, strict=True)]


@contextmanager
def head(policy, change):
    """Make the output layer return change(logits), called with a copy of the logits."""
    layer = policy.base.get_output_embeddings()
    handle = layer.register_forward_hook(lambda module, inputs, logits: change(logits.clone()))
    try:
        yield
    finally:
        handle.remove()


def step_of(small, classifier, splits, optimizer, step=1):
    """A PPO step on four rows; its metrics without timings."""
    batch = splits["train"].select(range(small.config.batch_size))
    metrics = ppo_step(small.policy, small.tokenizer, classifier, optimizer, batch, step, 0.2, small.config)
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


# Drawing a token


def test_tokens_are_drawn_with_their_probabilities():
    probabilities = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.0, 0.09, 0.01])
    count = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(count, dtype=np.float32))
    drawn = sample_tokens(probabilities.log().expand(count, -1), uniforms)
    assert drawn.shape == (count,)
    counts = torch.bincount(drawn, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = (probabilities * count)[probabilities > 0]
    chi_square = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: p = 0.001


def test_tokens_take_the_intervals_of_the_uniforms_in_order():
    logits = floats([0.25, 0.5, 0.25]).log().expand(6, -1)
    assert sample_tokens(logits, torch.tensor([0, 0.24, 0.26, 0.74, 0.76, 0.999])).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_impossible_tokens_are_not_drawn_at_the_ends(uniform):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 1000, generator=generator) * 5
    possible = torch.rand(200, 1000, generator=generator) < 0.3
    possible[:, 0] = possible[:, -1] = False
    logits = logits.masked_fill(~possible, -torch.inf)
    drawn = sample_tokens(logits, torch.full((200,), uniform))
    assert possible[torch.arange(200), drawn].all()


def test_the_only_possible_token_is_drawn():
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 3] = -2.0
    assert sample_tokens(logits, torch.tensor([0.0, 0.5, 0.99999994])).tolist() == [3, 3, 3]


# Responses


def test_response_depends_only_on_seed_step_and_row(small, prompts):
    together = tokens_of(sample(small, prompts))
    order = [4, 0, 5, 2, 1, 3]
    reordered = tokens_of(sample(small, [prompts[i] for i in order], order))
    assert reordered == [together[i] for i in order]
    for row in (0, 3):
        assert tokens_of(sample(small, prompts[row : row + 1], [row])) == [together[row]]
    assert tokens_of(sample(small, prompts, step=2)) != together
    assert tokens_of(sample(small, prompts, seed=SEED + 1)) != together
    # the same prompt in many rows
    assert len({tuple(tokens) for tokens in tokens_of(sample(small, [prompts[0]] * 8, limits=(24, 24)))}) > 1


def test_global_random_numbers_are_neither_used_nor_drawn(small, splits, classifier, prompts):
    before = tokens_of(sample(small, prompts))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluate_policy(small.policy, small.tokenizer, classifier, splits["test"], small.config)
    assert tokens_of(sample(small, prompts)) == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(99), np.random.rand(1)
    assert tokens_of(sample(small, prompts)) == before


def test_random_streams_are_distinct():
    keys = [(0, ROLLOUT, 1, 7), (0, EVALUATION, 7), (0, EVALUATION, 1, 7), (1, ROLLOUT, 1, 7), (0, ROLLOUT, 7, 1)]
    draws = [tuple(random_stream(*key).integers(2**62, size=4)) for key in keys]
    assert len(set(draws)) == len(keys)


@pytest.fixture
def never_eos(small):
    """Responses end only at max_new_tokens."""

    def change(logits):
        logits[..., small.policy.base.config.eos_token_id] = -torch.inf
        return logits

    with head(small.policy, change):
        yield


def test_max_new_tokens_is_drawn_from_the_whole_range(small, prompts, never_eos):
    lengths = sample(small, prompts[:1] * 60, limits=(2, 5)).lengths.tolist()
    assert set(lengths) == {2, 3, 4, 5}
    assert all(lengths.count(limit) > 4 for limit in (2, 3, 4, 5))
    assert sample(small, prompts, limits=(3, 3)).lengths.tolist() == [3] * 6


def test_response_at_max_new_tokens_has_no_eos_and_keeps_every_token(small, prompts, never_eos):
    model_config = small.policy.base.config
    short, long = (sample(small, prompts, limits=(limit, limit)) for limit in (5, 9))
    assert short.lengths.tolist() == [5] * 6 and long.lengths.tolist() == [9] * 6
    assert not short.finished.any() and not (short.tokens == model_config.eos_token_id).any()
    # the same random numbers, so a longer response continues the shorter one
    assert torch.equal(short.tokens[:, :5], long.tokens[:, :5])
    logprobs, _ = small.policy.logprobs_and_values(short)
    assert (logprobs[:, :5] < 0).all() and (logprobs[:, 5:] == 0).all()


def test_eos_is_the_last_token_and_nothing_follows(small, prompts):
    eos, pad = small.policy.base.config.eos_token_id, small.policy.base.config.pad_token_id
    responses = sample(small, prompts * 8, limits=(1, 40))
    assert responses.finished.any() and not responses.finished.all()
    assert responses.tokens.shape[1] == detox_ppo.padded_width(responses.lengths)
    for tokens, length, finished in zip(responses.tokens, responses.lengths, responses.finished, strict=True):
        response, rest = tokens[:length].tolist(), tokens[length:].tolist()
        assert response.count(eos) == int(finished)
        assert not finished or response[-1] == eos
        assert set(rest) <= {pad}
    # every token of the response is trained, including EOS, and nothing after it
    logprobs, values = small.policy.logprobs_and_values(responses)
    for row, length in enumerate(responses.lengths):
        assert (logprobs[row, :length] != 0).all() and (values[row, :length] != 0).all()
        assert (logprobs[row, length:] == 0).all() and (values[row, length:] == 0).all()


def test_response_that_is_only_eos(small, prompts):
    eos = small.policy.base.config.eos_token_id

    def eos_first(logits):
        if len(logits) == 3:  # the first of the three rows, which then leaves the batch
            logits[0, ..., eos] = 1000.0
        return logits

    with head(small.policy, eos_first):
        responses = sample(small, prompts[:3], limits=(6, 6))
    assert responses.lengths[0] == 1 and responses.finished[0] and responses.tokens[0, 0] == eos
    assert responses.lengths[1] > 1
    assert small.tokenizer.decode(responses.tokens[0], skip_special_tokens=True) == ""
    logprobs, values = small.policy.logprobs_and_values(responses)
    assert torch.isfinite(logprobs).all() and torch.isfinite(values).all()
    alone, _ = small.policy.logprobs_and_values(responses.select([0]))
    assert (alone != 0).sum() == 1
    torch.testing.assert_close(alone[0, 0], logprobs[0, 0])


def test_selecting_responses_trims_the_padding(small, prompts):
    responses = sample(small, prompts, limits=(1, 40))
    rows = sorted(range(6), key=lambda row: responses.lengths[row])[:2]
    chosen = responses.select(rows)
    assert tokens_of(chosen) == [tokens_of(responses)[row] for row in rows]
    assert chosen.tokens.shape[1] == 16 < responses.tokens.shape[1]
    assert chosen.prompts == [responses.prompts[row] for row in rows]
    assert chosen.encoder_states.shape[1] == detox_ppo.padded_width(map(len, chosen.prompts))
    expected, _ = small.policy.logprobs_and_values(responses)
    got, _ = small.policy.logprobs_and_values(chosen)
    torch.testing.assert_close(got, expected[rows, : got.shape[1]], rtol=0, atol=2e-5)


def test_finished_rows_leave_the_decoded_batch(small, prompts):
    decoded = []
    with head(small.policy, lambda logits: decoded.append(len(logits)) or logits):
        responses = sample(small, prompts, limits=(4, 20))
    running = [int((responses.lengths > position).sum()) for position in range(len(decoded))]
    assert len(decoded) == responses.lengths.max()
    assert all(now <= size for now, size in zip(running, decoded, strict=True))
    # Up to a quarter of the batch may be finished rows, so that the caches are copied rarely.
    assert all(now > 0.75 * size for now, size in zip(running, decoded, strict=True))
    assert decoded[-1] < decoded[0]


# Scoring


@torch.no_grad()
def plain_scores(model, value_head, prompt, tokens):
    """Log-probabilities and values of one response, by plain transformers, which shifts the labels."""
    labels, attention_mask = torch.tensor([tokens]), torch.ones(1, len(prompt))
    outputs = model(torch.tensor([prompt]), attention_mask, labels=labels, output_hidden_states=True)
    logprobs = outputs.logits[0].double().log_softmax(dim=-1).gather(1, labels[0][:, None]).squeeze(1)
    return logprobs, value_head(outputs.decoder_hidden_states[-1][0])


def check_against_plain(policy, model, responses):
    scored = policy.logprobs_and_values(responses)
    for row, (prompt, tokens) in enumerate(zip(responses.prompts, tokens_of(responses), strict=True)):
        for column, expected in zip(scored, plain_scores(model, policy.value_head, prompt, tokens), strict=True):
            torch.testing.assert_close(column[row, : len(tokens)].to(expected), expected, rtol=0, atol=1e-4)


def check_sampled_is_scored(policy, prompts, limits=(4, 20)):
    """Record the distribution that each token is drawn from, and compare the scores with it."""
    drawn_from = {}

    def record(logits, uniforms):
        # Rows leave the batch when they end, so a draw is identified by its random number, not by its index.
        drawn_from.update(zip(uniforms.tolist(), torch.log_softmax(logits.double(), dim=-1), strict=True))
        return sample_tokens(logits, uniforms)

    rows = range(len(prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detox_ppo, "sample_tokens", record)
        responses = generate(policy, prompts, streams(rows), limits)
    logprobs, _ = policy.logprobs_and_values(responses)
    again = streams(rows)
    width = max([stream.integers(*limits, endpoint=True) for stream in again])
    for row, tokens in enumerate(tokens_of(responses)):
        uniforms = again[row].random(width, dtype=np.float32).tolist()
        expected = torch.stack([drawn_from[uniforms[t]][token] for t, token in enumerate(tokens)])
        torch.testing.assert_close(logprobs[row, : len(tokens)].double(), expected, rtol=0, atol=1e-4)
    return responses


def test_sampled_distribution_is_scored_and_matches_plain_transformers(small, prompts):
    responses = check_sampled_is_scored(small.policy, prompts)
    check_against_plain(small.policy, small.policy.model, responses)
    responses.encoder_states = None
    with small.policy.as_adapter("reference"):
        check_against_plain(small.policy, small.policy.model, responses)


def t5(kind):
    """A T5 whose head is tied to its embedding, so that the decoder's output is scaled first."""

    def make(vocabulary):
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        return kind(kind.config_class(vocab_size=vocabulary, decoder_start_token_id=0, **shape))

    return make


def bart(kind, **options):
    """A BART or a related model, whose logits have a bias."""

    def make(vocabulary):
        layers = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
        shape = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in layers.items()}
        special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
        config = kind.config_class(
            vocab_size=vocabulary, d_model=32, init_std=0.3, forced_eos_token_id=None, **shape, **special, **options
        )
        model = kind(config)
        model.final_logits_bias += torch.randn(1, vocabulary)
        return model

    return make


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def two_configs(kind):
    """A model with separate configurations of encoder and decoder."""

    def make(vocabulary):
        if kind is T5GemmaForConditionalGeneration:
            part = {**SMALL, "vocab_size": vocabulary, "num_key_value_heads": 1, "head_dim": 16}
            part |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.3}
            encoder, decoder = T5GemmaModuleConfig(**part), T5GemmaModuleConfig(**part)
            model = kind(T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=vocabulary, dropout_rate=0.3))
        else:
            part = {**SMALL, "vocab_size": vocabulary, "hidden_dropout_prob": 0.3, "initializer_range": 0.3}
            halves = [BertConfig(**part), BertConfig(**part, is_decoder=True, add_cross_attention=True)]
            config = EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
            config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 1, 2
            model = kind(config)
        return model

    return make


@pytest.mark.parametrize("kind", [T5GemmaForConditionalGeneration, EncoderDecoderModel])
def test_dropout_that_stays_on_is_an_error(saved, kind, monkeypatch):
    config = saved(two_configs(kind), NESTED[kind])
    monkeypatch.setattr(detox_ppo, "remove_dropout", lambda _: None)
    with pytest.raises(detox_ppo.UserError, match="--model_name .* train mode changes its log-probabilities"):
        detox_ppo.load_policy(config, torch.device("cpu"), torch.float32)


NESTED = {T5GemmaForConditionalGeneration: "q_proj v_proj", EncoderDecoderModel: "query value"}
FAMILIES = {
    **{kind.__name__: (two_configs(kind), modules) for kind, modules in NESTED.items()},
    "T5": (t5(T5ForConditionalGeneration), None),
    "UMT5": (t5(UMT5ForConditionalGeneration), "q v"),
    "BART": (bart(BartForConditionalGeneration), None),
    # LED pads prompts to its attention window.
    "LED": (bart(LEDForConditionalGeneration, attention_window=16), "q_proj"),
}


@pytest.fixture
def saved(small_config, tiny, tmp_path):
    """The configuration of a model of another family with the toy example's tokenizer."""

    def saved(make, modules):
        left_out = shutil.ignore_patterns("*.safetensors", "config.json")
        shutil.copytree(tiny / "base", tmp_path / "base", ignore=left_out)
        torch.manual_seed(0)
        make(json.loads((tiny / "base" / "config.json").read_text())["vocab_size"]).save_pretrained(tmp_path / "base")
        return small_config(adapter_name="", model_name=tmp_path / "base", lora_target_modules=modules or "")

    return saved


def test_a_forced_first_token_is_not_sampled(saved):
    """BART's <s>, or the language of NLLB and similar models; the rest equals transformers' generate."""

    def make(vocabulary):
        model = bart(BartForConditionalGeneration)(vocabulary)
        model.generation_config.forced_bos_token_id = 7
        return model

    config = saved(make, None)
    policy, tokenizer = detox_ppo.load_policy(config, torch.device("cpu"), torch.float32)
    prompts = tokenizer(["Hello there.", "A longer prompt, of more words than the other has."]).input_ids
    greedy = generate(policy, prompts, None, (8, 8))
    model = AutoModelForSeq2SeqLM.from_pretrained(config.model_name, dtype=torch.float32).eval()
    logprobs, _ = policy.logprobs_and_values(greedy)
    for row, prompt in enumerate(prompts):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=9, num_beams=1, do_sample=False)[0].tolist()
        tokens = tokens_of(greedy)[row]
        assert out[:2] == [1, 7] and out[2:] == tokens
        logits = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([out[:-1]])).logits[0, 1:]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[row, : len(tokens)], expected, rtol=0, atol=1e-4)
    check_sampled_is_scored(policy, prompts, limits=(6, 8))
    # A human summary follows it, without the tokenizer's own start token.
    ids = [7, *tokenizer("A summary.").input_ids]
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(7)]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detox_ppo, "token_ids", lambda *_: [ids])
        batch = {"summary": ["A summary."], "input_ids": prompts[:1]}
        target = detox_ppo.tokenize_summaries(policy, tokenizer, batch, config)
    assert tokens_of(target) == [ids[1:]]


@pytest.mark.parametrize("make, modules", FAMILIES.values(), ids=FAMILIES)
def test_other_families(saved, make, modules):
    config = saved(make, modules)
    policy, tokenizer = detox_ppo.load_policy(config, torch.device("cpu"), torch.float32)
    torch.nn.init.normal_(policy.value_head.summary.weight)
    prompts = tokenizer(["Hello there.", "A longer prompt, of more words than the other has."]).input_ids
    responses = check_sampled_is_scored(policy, prompts, limits=(6, 8))
    model = AutoModelForSeq2SeqLM.from_pretrained(config.model_name, dtype=torch.float32).eval()
    check_against_plain(policy, model, responses)


# Steps


def test_evaluation_does_not_change_training(load_small, splits, classifier):
    metrics = []
    for evaluated in (False, True):
        small = load_small()
        optimizer = torch.optim.Adam(small.policy.trainable_parameters(), lr=1e-3)
        for step in (1, 2):
            if evaluated:
                evaluate_policy(small.policy, small.tokenizer, classifier, splits["test"], small.config)
            metrics.append(step_of(small, classifier, splits, optimizer, step))
    assert metrics[:2] == metrics[2:] and metrics[0]["ppo/skipped_steps"] == 0 and metrics[0] != metrics[1]


@pytest.mark.parametrize("dtype, precision", [(torch.float32, "none"), (torch.bfloat16, "bf16")])
def test_rewards_are_products_of_the_policys_dtype(load_small, splits, classifier, dtype, precision):
    small, products, seen = load_small(dtype), torch.backends.mkldnn.matmul, []
    with classifier.model.register_forward_pre_hook(lambda *_: seen.append(products.fp32_precision)):
        step_of(small, classifier, splits, torch.optim.Adam(small.policy.trainable_parameters()))
        assert set(seen) == {precision}
        seen.clear()
        evaluate_policy(small.policy, small.tokenizer, classifier, splits["test"], small.config)
        assert set(seen) == {"none"}  # results are in float32 in any case


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_first_ratio_is_one_and_first_kl_zero(load_small, splits, classifier, dtype, tolerance):
    small = load_small(dtype, adapter_name="")
    first = step_of(small, classifier, splits, torch.optim.Adam(small.policy.trainable_parameters()))
    assert first["objective/kl"] == 0
    assert first["ppo/policy/first_ratio"] == pytest.approx(1, abs=tolerance)


# One minibatch in parts


@pytest.mark.parametrize("lengths, width", [([1], 16), ([16, 3], 16), ([5, 17], 32), ([170, 161, 2], 176)])
def test_padded_width_is_the_next_multiple_of_16(lengths, width):
    assert detox_ppo.padded_width(lengths) == detox_ppo.padded_width(torch.tensor(lengths)) == width


def test_micro_batches_hold_every_row_once_and_bound_the_pass(small):
    lengths = [int(length) for length in torch.randint(1, 3000, (50,), generator=torch.Generator().manual_seed(0))]
    rows = [row for row in range(50) if row % 3]
    groups = detox_ppo.micro_batches(lengths, rows, small.policy.base)
    assert sorted(row for group in groups for row in group) == rows
    token = small.policy.base.config.hidden_size * 4  # bytes, in float32
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) * token <= 3 * 2**18
    with torch.no_grad():
        assert len(detox_ppo.micro_batches(lengths, rows, small.policy.base)) < len(groups) < len(rows)


def test_parts_of_a_minibatch_add_up_to_its_gradient(load_small, splits, classifier, monkeypatch):
    """SGD shows the gradient itself; Adam's first step would only show its sign."""

    def moved():
        small = load_small(batch_size=6, mini_batch_size=6)
        start = {name: tensor.clone() for name, tensor in small.policy.adapters().items()}
        step_of(small, classifier, splits, torch.optim.SGD(small.policy.trainable_parameters(), lr=1.0))
        return {
            name: tensor - start[name] for name, tensor in small.policy.adapters().items() if ".reference." not in name
        }

    at_once = moved()
    monkeypatch.setattr(detox_ppo, "micro_batches", lambda lengths, rows, *_: [[int(row)] for row in rows])
    in_parts = moved()
    for name, change in at_once.items():
        assert change.abs().max() > 1e-4, name
        torch.testing.assert_close(in_parts[name], change, rtol=1e-2, atol=1e-3 * change.abs().max().item())
