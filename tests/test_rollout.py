"""Sampling and scoring: what is sampled is what is scored, token by token, whoever shares the batch."""

import json
import shutil
from itertools import accumulate

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import detox_ppo
from detox_ppo import (
    EVALUATION,
    TRAINING,
    Responses,
    random_stream,
    sample_responses,
    sample_tokens,
    sampling_support,
    score_responses,
    token_logprobs,
)

pytestmark = pytest.mark.usefixtures("quick")


SEED = 3


def floats(*rows):
    return torch.tensor(rows, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(splits):
    """Six prompts of different lengths."""
    chosen = list(splits["train"]["input_ids"][:6])
    assert len({len(prompt) for prompt in chosen}) > 3
    return chosen


def sample(small, prompts, rows=None, step=1, caps=(4, 24), seed=SEED, **options):
    config = small.config
    if options:
        config = type(config)(**(vars(config) | options))
    rows = range(len(prompts)) if rows is None else rows
    generators = [random_stream(seed, TRAINING, step, row) for row in rows]
    return sample_responses(small.policy, prompts, generators, caps, config)


def tokens_of(responses):
    return [row[:length].tolist() for row, length in zip(responses.tokens, responses.lengths, strict=True)]


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
    assert chi_square < 18.5  # 4 degrees of freedom: one in a thousand is above


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


# Support of top_k and top_p


def supported(probabilities, top_k, top_p):
    """The definition, token by token: the likeliest of the top_k until their total, renormalised, reaches top_p."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    if top_k:
        order = order[:top_k]
    total = sum(probabilities[token] for token in order)
    before = [0.0, *accumulate(probabilities[token] / total for token in order)]
    return {token for token, mass in zip(order, before, strict=False) if mass < top_p and probabilities[token] > 0}


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (5, 1.0), (0, 0.8), (0, 0.01), (5, 0.8), (500, 0.8), (2, 0.5)])
def test_support_against_the_definition(top_k, top_p):
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(top_k), dtype=torch.float64) * 3
    support = sampling_support(logits, top_k, top_p)
    for row, probabilities in zip(support, logits.softmax(-1).tolist(), strict=True):
        assert set(row.nonzero().flatten().tolist()) == supported(probabilities, top_k, top_p)


def test_support_by_hand():
    logits = floats([0.1, 0.5, 0.15, 0.25]).log()
    assert sampling_support(logits, 2, 1.0).tolist() == [[False, True, False, True]]
    assert sampling_support(logits, 0, 0.7).tolist() == [[False, True, False, True]]
    assert sampling_support(logits, 0, 0.76).tolist() == [[False, True, True, True]]
    assert sampling_support(logits, 3, 0.1).tolist() == [[False, True, False, False]]
    # of the best three, 0.5 / 0.9 and 0.25 / 0.9 are 0.83 together
    assert sampling_support(logits, 3, 0.8).tolist() == [[False, True, False, True]]


def test_no_support_where_every_token_counts():
    logits = torch.zeros(1, 4)
    assert sampling_support(logits, 0, 1.0) is None
    assert sampling_support(logits, 4, 1.0) is None
    assert sampling_support(logits, 1000, 1.0) is None


def test_support_leaves_the_logits_as_they_are():
    logits = floats([3.0, 1.0, 2.0])
    sampling_support(logits, 1, 0.5)
    assert logits.tolist() == [[3.0, 1.0, 2.0]]


# Responses


def test_response_depends_on_seed_step_and_row_alone(small, prompts):
    together = tokens_of(sample(small, prompts))
    order = [4, 0, 5, 2, 1, 3]
    reordered = tokens_of(sample(small, [prompts[i] for i in order], order))
    assert reordered == [together[i] for i in order]
    for row, prompt in enumerate(prompts):
        assert tokens_of(sample(small, [prompt], [row])) == [together[row]]
    assert tokens_of(sample(small, prompts)) == together
    assert tokens_of(sample(small, prompts, step=2)) != together
    assert tokens_of(sample(small, prompts, seed=SEED + 1)) != together
    # the same prompt in many rows
    assert len({tuple(tokens) for tokens in tokens_of(sample(small, [prompts[0]] * 8, caps=(24, 24)))}) > 1


def test_sampling_leaves_the_global_random_state_alone(small, prompts):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    sample(small, prompts)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.rand(1), np.random.rand(1)
    again = tokens_of(sample(small, prompts))
    torch.manual_seed(99)
    assert tokens_of(sample(small, prompts)) == again


def test_streams_do_not_meet():
    keys = [(0, TRAINING, 1, 7), (0, EVALUATION, 7), (0, EVALUATION, 1, 7), (1, TRAINING, 1, 7), (0, TRAINING, 7, 1)]
    draws = [tuple(random_stream(*key).integers(2**62, size=4)) for key in keys]
    assert len(set(draws)) == len(keys)


def never_eos(small, monkeypatch):
    """Responses then end at their caps alone."""
    logits = small.policy.logits
    eos = small.policy.base.config.eos_token_id

    def without_eos(hidden):
        result = logits(hidden)
        result[..., eos] = -torch.inf
        return result

    monkeypatch.setattr(small.policy, "logits", without_eos)


def test_caps_are_drawn_from_the_whole_range(small, prompts, monkeypatch):
    never_eos(small, monkeypatch)
    responses = sample(small, prompts[:1] * 60, caps=(2, 5))
    lengths = responses.lengths.tolist()
    assert set(lengths) == {2, 3, 4, 5}
    assert all(lengths.count(cap) > 4 for cap in (2, 3, 4, 5))
    assert sample(small, prompts, caps=(3, 3)).lengths.tolist() == [3] * 6


def test_response_at_its_cap_has_no_eos_and_keeps_every_token(small, prompts, monkeypatch):
    never_eos(small, monkeypatch)
    eos, pad = small.policy.base.config.eos_token_id, small.policy.base.config.pad_token_id
    short, long = (sample(small, prompts, caps=(cap, cap)) for cap in (5, 9))
    assert short.lengths.tolist() == [5] * 6 and long.lengths.tolist() == [9] * 6
    assert not short.finished.any() and not (short.tokens == eos).any() and not (short.tokens == pad).all(1).any()
    # the same random numbers, so a longer cap only goes on where the shorter one stopped
    assert torch.equal(short.tokens[:, :5], long.tokens[:, :5])
    logprobs, _ = score_responses(small.policy, short)
    assert (logprobs[:, :5] < 0).all() and (logprobs[:, 5:] == 0).all()


def test_eos_is_the_last_token_and_nothing_follows(small, prompts):
    eos, pad = small.policy.base.config.eos_token_id, small.policy.base.config.pad_token_id
    responses = sample(small, prompts * 8, caps=(1, 40))
    assert responses.finished.any() and not responses.finished.all()
    assert responses.tokens.shape[1] == detox_ppo.padded_width(responses.lengths)
    for tokens, length, finished in zip(responses.tokens, responses.lengths, responses.finished, strict=True):
        kept, rest = tokens[:length].tolist(), tokens[length:].tolist()
        assert kept.count(eos) == int(finished)
        assert not finished or kept[-1] == eos
        assert set(rest) <= {pad}
    # what is trained: every token of the response, EOS included, and nothing after it
    logprobs, values = score_responses(small.policy, responses)
    for row, length in enumerate(responses.lengths):
        assert (logprobs[row, :length] != 0).all() and (values[row, :length] != 0).all()
        assert (logprobs[row, length:] == 0).all() and (values[row, length:] == 0).all()


def test_response_that_is_only_eos(small, prompts, monkeypatch):
    eos = small.policy.base.config.eos_token_id
    logits = small.policy.logits

    def eos_first(hidden):
        result = logits(hidden)
        result[0, eos] = 1000.0  # of the first row alone
        return result

    monkeypatch.setattr(small.policy, "logits", eos_first)
    responses = sample(small, prompts[:3], caps=(6, 6))
    monkeypatch.undo()
    assert responses.lengths[0] == 1 and responses.finished[0] and responses.tokens[0, 0] == eos
    assert responses.lengths[1] > 1
    assert small.tokenizer.decode(responses.tokens[0], skip_special_tokens=True) == ""
    logprobs, values = score_responses(small.policy, responses)
    assert torch.isfinite(logprobs).all() and torch.isfinite(values).all()
    alone = score_responses(small.policy, responses.select([0]))
    assert (alone[0] != 0).sum() == 1
    torch.testing.assert_close(alone[0][0, 0], logprobs[0, 0])


def test_selecting_responses_trims_the_padding(small, prompts):
    responses = sample(small, prompts, caps=(1, 40), top_k=5)
    rows = sorted(range(6), key=lambda row: responses.lengths[row])[:2]
    chosen = responses.select(rows)
    assert tokens_of(chosen) == [tokens_of(responses)[row] for row in rows]
    assert chosen.tokens.shape[1] == chosen.support.shape[1] == 16 < responses.tokens.shape[1]
    assert chosen.prompts == [responses.prompts[row] for row in rows]
    assert torch.equal(chosen.finished, responses.finished[rows])
    expected, _ = score_responses(small.policy, responses)
    got, _ = score_responses(small.policy, chosen)
    torch.testing.assert_close(got, expected[rows, : got.shape[1]], rtol=0, atol=2e-5)


# Scoring


@torch.no_grad()
def plain_logprobs(model, prompt, tokens):
    """One response at a time by plain transformers, which shifts the labels itself."""
    labels = torch.tensor([tokens])
    logits = model(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), labels=labels).logits
    return torch.log_softmax(logits.double(), dim=-1)[0].gather(1, labels[0][:, None]).squeeze(1)


def check_against_plain(policy, model, responses):
    with torch.no_grad():
        logprobs, _ = score_responses(policy, responses)
    for row, (prompt, tokens) in enumerate(zip(responses.prompts, tokens_of(responses), strict=True)):
        expected = plain_logprobs(model, prompt, tokens)
        torch.testing.assert_close(logprobs[row, : len(tokens)].double(), expected, rtol=0, atol=1e-4)


def test_logprobs_against_plain_transformers(small, prompts):
    responses = sample(small, prompts, caps=(1, 24))
    check_against_plain(small.policy, small.policy.model, responses)
    with small.policy.adapter("reference"):
        check_against_plain(small.policy, small.policy.model, responses)


def tied_t5(vocabulary):
    """As T5 1.0, whose head is its embedding, so that the decoder's output is scaled before it."""
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, decoder_start_token_id=0, **shape))


def bart(vocabulary):
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocabulary,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            init_std=0.3,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    )
    model.final_logits_bias += torch.randn(1, vocabulary)
    return model


@pytest.mark.parametrize("make", [tied_t5, bart])
def test_logprobs_of_other_models_against_plain_transformers(small_config, tiny, tmp_path, make):
    shutil.copytree(tiny / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    make(json.loads((tiny / "base" / "config.json").read_text())["vocab_size"]).save_pretrained(tmp_path / "base")
    config = small_config(adapter_name="", model_name=tmp_path / "base")
    policy, tokenizer = detox_ppo.load_policy(config, torch.device("cpu"), torch.float32)
    prompts = tokenizer(["Hello there.", "A longer prompt, of more words than the other."]).input_ids
    generators = [random_stream(0, TRAINING, row) for row in range(2)]
    responses = sample_responses(policy, prompts, generators, (6, 8), config)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    check_against_plain(policy, model, responses)
    check_sampled_is_scored(policy, prompts, config)


def check_sampled_is_scored(policy, prompts, config, caps=(4, 20)):
    """Record the distribution that each token was drawn from, and hold the scores against it."""
    drawn_from, draw = {}, detox_ppo.sample_tokens

    def record(logits, uniforms):
        # Rows leave the batch as they end, so a draw is known by its random number, not by its place.
        drawn_from.update(zip(uniforms.tolist(), torch.log_softmax(logits.double(), dim=-1), strict=True))
        return draw(logits, uniforms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detox_ppo, "sample_tokens", record)
        generators = [random_stream(SEED, TRAINING, 1, row) for row in range(len(prompts))]
        responses = sample_responses(policy, prompts, generators, caps, config)
    with torch.no_grad():
        logprobs, _ = score_responses(policy, responses)
    streams = [random_stream(SEED, TRAINING, 1, row) for row in range(len(prompts))]
    width = max([stream.integers(*caps, endpoint=True) for stream in streams])
    for row, tokens in enumerate(tokens_of(responses)):
        uniforms = streams[row].random(width, dtype=np.float32).tolist()
        expected = torch.stack([drawn_from[uniforms[t]][token] for t, token in enumerate(tokens)])
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(logprobs[row, : len(tokens)].double(), expected, rtol=0, atol=1e-4)
    return responses, logprobs


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (5, 0.8)])
def test_what_is_sampled_is_what_is_scored(small, prompts, top_k, top_p):
    config = type(small.config)(**(vars(small.config) | {"top_k": top_k, "top_p": top_p}))
    responses, logprobs = check_sampled_is_scored(small.policy, prompts, config)
    if (top_k, top_p) == (0, 1.0):
        assert responses.support is None
        return
    assert responses.support.shape == (*responses.tokens.shape, small.policy.base.config.vocab_size)
    for row, tokens in enumerate(tokens_of(responses)):
        for t, token in enumerate(tokens):
            support = responses.support[row, t]
            assert support[token]
            assert not top_k or support.sum() <= top_k
    # Policy and reference are both normalised over the support that was sampled from.
    for adapter in ("default", "reference"):
        with small.policy.adapter(adapter):
            assert_probabilities_add_up(small, responses)
    # Without the support the same tokens would score lower, so the comparison above can fail.
    unrestricted = Responses(responses.prompts, responses.tokens, responses.lengths, responses.finished, None)
    with torch.no_grad():
        plain, _ = score_responses(small.policy, unrestricted)
    assert (plain <= logprobs + 1e-4).all() and (plain.sum() < logprobs.sum() - 0.1)


@torch.no_grad()
def assert_probabilities_add_up(small, responses):
    """Score, at the first position of the first row, every token of the support in turn."""
    support = responses.support[0, 0].nonzero().flatten()
    support = support[:200]
    rows = len(support)
    everything = Responses(
        responses.prompts[:1] * rows,
        support[:, None],
        torch.ones(rows, dtype=torch.long),
        torch.zeros(rows, dtype=torch.bool),
        responses.support[:1, :1].expand(rows, -1, -1),
    )
    logprobs, _ = score_responses(small.policy, everything)
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_support_keeps_the_reference_finite_when_it_disagrees(load_small, prompts):
    """Tokens outside the reference's own best five still have a probability under it."""
    small = load_small(top_k=5)
    responses = sample(small, prompts)
    with torch.no_grad():
        for name, parameter in small.policy.named_parameters():
            if ".reference." in name and "lora_B" in name:
                parameter.mul_(-3)
        with small.policy.adapter("reference"):
            reference, _ = score_responses(small.policy, responses)
        logprobs, _ = score_responses(small.policy, responses)
    assert torch.isfinite(reference).all()
    assert (reference - logprobs).abs().max() > 0.1


def test_token_logprobs_over_a_support_by_hand():
    logits = floats([0.1, 0.2, 0.3, 0.4]).log()
    support = torch.tensor([[False, True, True, False]])
    assert token_logprobs(logits, torch.tensor([2])).exp().item() == pytest.approx(0.3)
    assert token_logprobs(logits, torch.tensor([2]), support).exp().item() == pytest.approx(0.6)
    assert token_logprobs(logits, torch.tensor([1]), support).exp().item() == pytest.approx(0.4)


def test_padding_of_prompts_changes_nothing(small, prompts):
    responses = sample(small, prompts)
    with torch.no_grad():
        together, values = score_responses(small.policy, responses)
        for row in range(len(prompts)):
            alone, value = score_responses(small.policy, responses.select([row]))
            torch.testing.assert_close(alone[0], together[row, : alone.shape[1]], rtol=0, atol=5e-5)
            torch.testing.assert_close(value[0], values[row, : alone.shape[1]], rtol=0, atol=5e-5)


# Evaluation and training


def test_evaluation_draws_from_nothing_that_training_uses(small, splits, classifier, prompts):
    before = tokens_of(sample(small, prompts))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    detox_ppo.evaluate_policy(small.policy, small.tokenizer, classifier, splits["test"], small.config, "evaluating")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert tokens_of(sample(small, prompts)) == before


def test_ended_rows_leave_the_batch_that_is_decoded(small, prompts, monkeypatch):
    decoded, decode = [], small.policy.decode
    monkeypatch.setattr(
        small.policy, "decode", lambda last, *args: (decoded.append(len(last)), decode(last, *args))[1]
    )
    generators = [random_stream(SEED, TRAINING, 1, row) for row in range(len(prompts))]
    responses = sample_responses(small.policy, prompts, generators, (4, 20), small.config)
    running = [int((responses.lengths > position).sum()) for position in range(len(decoded))]
    assert len(decoded) == responses.lengths.max()
    assert all(now <= size for now, size in zip(running, decoded, strict=True))
    # A quarter of the batch may be left to wait, so as to copy the caches seldom.
    assert all(now > 0.75 * size for now, size in zip(running, decoded, strict=True))
    assert decoded[-1] < decoded[0]


def metrics_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def test_evaluating_more_leaves_training_unchanged(small_config, tmp_path):
    for name, samples in (("few", 1), ("more", 6)):
        config = small_config(output_dir=tmp_path / name, eval_samples=samples, compare_samples=1)
        detox_ppo.run(config)
    assert metrics_of(tmp_path / "few") == metrics_of(tmp_path / "more")
    assert len(metrics_of(tmp_path / "few")) == 2


@pytest.mark.parametrize("options", [{"top_k": 5, "top_p": 0.8}, {"dtype": "bfloat16", "adapter_name": ""}])
def test_first_ratio_is_one_and_first_kl_zero(small_config, tmp_path, options):
    detox_ppo.run(small_config(output_dir=tmp_path, eval_samples=1, max_ppo_steps=1, **options))
    (first,) = metrics_of(tmp_path)
    assert first["objective/kl"] == 0
    assert first["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5 if "dtype" not in options else 0.02)


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
    assert len(groups) < len(rows)


def test_parts_of_a_minibatch_add_up_to_its_gradient(small_config, tiny, tmp_path, monkeypatch):
    # Plain gradient descent shows the gradient itself; Adam's first step would show its sign only.
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    options = {"batch_size": 6, "mini_batch_size": 6, "max_ppo_steps": 1, "eval_samples": 1, "learning_rate": 1.0}

    def adapter_after_a_step(name):
        detox_ppo.run(small_config(output_dir=tmp_path / name, **options))
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    whole = adapter_after_a_step("whole")
    monkeypatch.setattr(detox_ppo, "micro_batches", lambda lengths, rows, model: [[int(row)] for row in rows])
    parts = adapter_after_a_step("parts")
    start = load_file(tiny / "adapter" / "adapter_model.safetensors")
    for name, tensor in start.items():
        moved = whole[name] - tensor
        assert moved.abs().max() > 1e-4, name
        torch.testing.assert_close(parts[name] - tensor, moved, rtol=1e-2, atol=1e-3 * moved.abs().max().item())
