"""The PPO arithmetic of detox_ppo, against TRL 0.8.0 and against plain Python.

trl_reference.json holds inputs and the outputs of TRL's own functions; trl_reference.py recorded it. The second
reference are loops over single tokens, written from the definitions: the double sum of generalized advantages
instead of the recursion, and the four cases of the clipped objective instead of the maximum.
"""

import json
import math
import statistics
from pathlib import Path

import peft
import pytest
import torch
from transformers import T5ForConditionalGeneration

from detox_ppo import (
    DetoxConfig,
    Policy,
    Responses,
    adapted_kl_coef,
    compute_advantages,
    compute_rewards,
    masked_mean,
    masked_whiten,
    policy_loss,
    value_loss,
    variance_explained,
)

HERE = Path(__file__).resolve().parent
TRL = json.loads((HERE / "trl_reference.json").read_text())
START = 0  # the decoder start token of T5 is its padding token


def close(actual, expected, tolerance=2e-6):
    """Equal up to float32 rounding, shape included."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def floats(nested):
    return torch.tensor(nested, dtype=torch.float32)


def bools(nested):
    return torch.tensor(nested, dtype=torch.bool)


def prefixes(lengths, width):
    """Masks built entry by entry, independently of Responses.mask."""
    return bools([[t < n for t in range(width)] for n in lengths])


def under(tensor, mask):
    """The entries where the mask is set, as Python floats, row after row."""
    rows = zip(tensor.tolist(), mask.tolist(), strict=True)
    return [x for row, keep in rows for x, k in zip(row, keep, strict=True) if k]


def outside(tensor, mask):
    return under(tensor, ~mask)


def random_batch(seed, lengths=(6, 1, 3, 4), width=6, spread=0.5):
    """Random inputs of one PPO step in the right shapes."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    shape = (len(lengths), width)
    old_logprobs, old_values = randn(*shape) - 2, randn(*shape)
    return {
        "lengths": lengths,
        "mask": prefixes(lengths, width),
        "scores": 2 * randn(len(lengths)),
        "old_logprobs": old_logprobs,
        "logprobs": old_logprobs + spread * randn(*shape),
        "ref_logprobs": old_logprobs + spread * randn(*shape),
        "old_values": old_values,
        "values": old_values + spread * randn(*shape),
        "rewards": randn(*shape),
        "advantages": randn(*shape),
        "returns": randn(*shape),
    }


def padded(batch, extra, seed=99):
    """The same batch in wider tensors, with garbage in the added columns."""
    generator = torch.Generator().manual_seed(seed)
    wider = dict(batch)
    for key, tensor in batch.items():
        if key == "mask":
            wider[key] = torch.cat([tensor, torch.zeros(len(tensor), extra, dtype=torch.bool)], dim=1)
        elif isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
            rubbish = 3 * torch.randn(len(tensor), extra, generator=generator)
            wider[key] = torch.cat([tensor, rubbish], dim=1)
    return wider


@pytest.mark.parametrize("case", TRL["masked_statistics"])
def test_mean_and_whitening_agree_with_trl(case):
    values, mask = floats(case["values"]), bools(case["mask"])
    close(masked_mean(values, mask), case["mean"])
    whitened = masked_whiten(values, mask)
    close(under(whitened, mask), under(floats(case["whitened"]), mask))


@pytest.mark.parametrize("seed", range(3))
def test_mean_and_whitening_agree_with_the_statistics_module(seed):
    batch = random_batch(seed)
    values, mask = batch["rewards"], batch["mask"]
    unmasked = under(values, mask)
    mean, deviation = statistics.fmean(unmasked), statistics.stdev(unmasked)
    assert masked_mean(values, mask).shape == ()
    close(masked_mean(values, mask), mean)
    close(under(masked_whiten(values, mask), mask), [(x - mean) / deviation for x in unmasked])


def test_whitening_divides_by_the_unbiased_deviation():
    values, mask = floats([[1.0, 3.0, 1e6], [2.0, -1e6, 1e6]]), bools([[1, 1, 0], [1, 0, 0]])
    # 1, 3 and 2: mean 2, unbiased variance 1, biased 2/3
    close(under(masked_whiten(values, mask), mask), [-1.0, 1.0, 0.0])


@pytest.mark.parametrize("case", TRL["rewards"])
def test_rewards_agree_with_trl(case):
    mask = bools(case["mask"])
    rewards, kl = compute_rewards(
        floats(case["scores"]), floats(case["logprobs"]), floats(case["ref_logprobs"]), mask, case["kl_coef"]
    )
    close(under(rewards, mask), under(floats(case["rewards"]), mask))
    close(under(kl, mask), under(floats(case["kl"]), mask))


@pytest.mark.parametrize("seed", range(3))
def test_rewards_agree_with_loops(seed):
    b = random_batch(seed)
    rewards, kl = compute_rewards(b["scores"], b["logprobs"], b["ref_logprobs"], b["mask"], 0.3)
    for row, length in enumerate(b["lengths"]):
        for t in range(length):
            difference = b["logprobs"][row, t].item() - b["ref_logprobs"][row, t].item()
            close(kl[row, t], difference)
            close(rewards[row, t], -0.3 * difference + (b["scores"][row].item() if t == length - 1 else 0.0))


def test_rewards_and_kl_are_zero_outside_the_mask():
    b = padded(random_batch(5), 2)
    for result in compute_rewards(b["scores"], b["logprobs"], b["ref_logprobs"], b["mask"], 0.3):
        assert set(outside(result, b["mask"])) == {0.0}


def test_rewards_of_an_unmoved_policy_sum_to_the_score():
    b = random_batch(6)
    rewards, kl = compute_rewards(b["scores"], b["logprobs"], b["logprobs"].clone(), b["mask"], 0.2)
    close(rewards.sum(dim=1), b["scores"])
    assert kl.abs().max() == 0


def test_rewards_do_not_modify_their_inputs():
    b = random_batch(7)
    before = {k: v.clone() for k, v in b.items() if isinstance(v, torch.Tensor)}
    compute_rewards(b["scores"], b["logprobs"], b["ref_logprobs"], b["mask"], 0.2)
    compute_advantages(b["values"], b["rewards"], b["mask"], 0.97, 0.9)
    for key, tensor in before.items():
        assert torch.equal(b[key], tensor), key


def summed_advantages(b, gamma, lam):
    """Unwhitened advantages and returns of every row, each by its defining sum over later TD errors."""
    advantages, returns = [], []
    for row, n in enumerate(b["lengths"]):
        value, reward = b["values"][row].tolist(), b["rewards"][row].tolist()
        error = [reward[k] + (gamma * value[k + 1] if k + 1 < n else 0.0) - value[k] for k in range(n)]
        for t in range(n):
            advantage = math.fsum((gamma * lam) ** (k - t) * error[k] for k in range(t, n))
            advantages.append(advantage)
            returns.append(advantage + value[t])
    return advantages, returns


@pytest.mark.parametrize("case", TRL["advantages"])
def test_advantages_agree_with_trl(case):
    mask = bools(case["mask"])
    advantages, returns = compute_advantages(
        floats(case["values"]), floats(case["rewards"]), mask, case["gamma"], case["lam"]
    )
    close(under(advantages, mask), under(floats(case["advantages"]), mask))
    close(under(returns, mask), under(floats(case["returns"]), mask))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.9), (0.5, 0.0), (1.0, 1.0)])
def test_advantages_agree_with_their_defining_sum(gamma, lam):
    b = random_batch(8)
    raw, expected_returns = summed_advantages(b, gamma, lam)
    mean, deviation = statistics.fmean(raw), statistics.stdev(raw)
    advantages, returns = compute_advantages(b["values"], b["rewards"], b["mask"], gamma, lam)
    close(under(returns, b["mask"]), expected_returns)
    close(under(advantages, b["mask"]), [(x - mean) / deviation for x in raw])


def test_advantages_are_white_under_the_mask_and_zero_outside():
    b = padded(random_batch(9, lengths=(6, 2, 5)), 3)
    advantages, _ = compute_advantages(b["values"], b["rewards"], b["mask"], 1.0, 0.95)
    unmasked = under(advantages, b["mask"])
    close(math.fsum(unmasked), 0.0, 1e-5)
    close(statistics.variance(unmasked), 1.0, 1e-5)
    assert set(outside(advantages, b["mask"])) == {0.0}


def test_undiscounted_returns_are_sums_of_later_rewards():
    b = random_batch(10)
    _, returns = compute_advantages(b["values"], b["rewards"], b["mask"], 1.0, 1.0)
    for row, n in enumerate(b["lengths"]):
        for t in range(n):
            close(returns[row, t], math.fsum(b["rewards"][row, t:n].tolist()))


def loss_of(inputs, cliprange):
    new, old = inputs["logprobs"], inputs["old_logprobs"]
    return policy_loss(new, old, inputs["advantages"], inputs["mask"], cliprange)


def trl_inputs(case):
    return {k: (bools if k == "mask" else floats)(v) for k, v in case["inputs"].items()}


@pytest.mark.parametrize("case", TRL["losses"], ids=lambda case: case["name"])
def test_policy_loss_agrees_with_trl(case):
    loss, stats = loss_of(trl_inputs(case), case["cliprange"])
    close(stats["ppo/policy/ratio"], case["ratio"])
    close(stats["ppo/policy/clipfrac"], case["clipfrac"])
    close(stats["ppo/policy/approxkl"], case["approxkl"])
    if case["ratio"] > case["ratio_threshold"]:
        # TRL drops the whole batch here; that is the training loop's decision, not the loss's
        assert case["name"] == "skipped" and case["policy_loss"] == 0
        assert loss != 0
        assert stats["ppo/policy/ratio"] > case["ratio_threshold"]
    else:
        close(loss, case["policy_loss"])


def clip_cases(inputs, cliprange):
    """Per token: the clipped objective, and which bound was active, if any."""
    for new, old, advantage in zip(
        *(under(inputs[k], inputs["mask"]) for k in ("logprobs", "old_logprobs", "advantages")), strict=True
    ):
        ratio = math.exp(new - old)
        if advantage > 0 and ratio > 1 + cliprange:
            yield advantage * (1 + cliprange), "above"
        elif advantage < 0 and ratio < 1 - cliprange:
            yield advantage * (1 - cliprange), "below"
        else:
            yield advantage * ratio, None


def test_trl_cases_clip_on_both_sides():
    near, clipped, _ = (list(clip_cases(trl_inputs(c), c["cliprange"])) for c in TRL["losses"])
    assert {side for _, side in near} == {None}
    assert {side for _, side in clipped} == {None, "above", "below"}


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_policy_loss_agrees_with_loops(spread):
    b = random_batch(12, spread=spread)
    counted = list(clip_cases(b, 0.2))
    new, old = under(b["logprobs"], b["mask"]), under(b["old_logprobs"], b["mask"])
    changes = [n - o for n, o in zip(new, old, strict=True)]
    loss, stats = loss_of(b, 0.2)
    close(loss, -statistics.fmean(value for value, _ in counted))
    close(stats["ppo/policy/clipfrac"], statistics.fmean(side is not None for _, side in counted))
    close(stats["ppo/policy/ratio"], statistics.fmean(math.exp(c) for c in changes))
    close(stats["ppo/policy/approxkl"], statistics.fmean(c * c / 2 for c in changes))
    close(stats["ppo/policy/policykl"], -statistics.fmean(changes))
    assert loss.shape == () and all(torch.as_tensor(v).shape == () for v in stats.values())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [
        (1.5, 2.0, -2.4, 1.0, 0.0),  # good and already likelier: no more gain
        (0.5, 2.0, -1.0, 0.0, -1.0),  # good but less likely: full gradient
        (1.5, -2.0, 3.0, 0.0, 3.0),  # bad but likelier: full gradient
        (0.5, -2.0, 1.6, 1.0, 0.0),  # bad and already less likely: no more gain
    ],
)
def test_the_four_cases_of_clipping(ratio, advantage, loss, clipped, slope):
    logprobs = floats([[math.log(ratio) - 3]]).requires_grad_()
    result, stats = policy_loss(logprobs, floats([[-3.0]]), floats([[advantage]]), bools([[1]]), 0.2)
    result.backward()
    close(result.detach(), loss)
    close(stats["ppo/policy/clipfrac"], clipped)
    close(stats["ppo/policy/approxkl"], math.log(ratio) ** 2 / 2)
    close(logprobs.grad, [[slope]])


def test_an_unmoved_policy_has_ratio_one_and_clips_nothing():
    b = random_batch(13)
    _, stats = policy_loss(b["logprobs"], b["logprobs"].clone(), b["advantages"], b["mask"], 0.2)
    names = [f"ppo/policy/{name}" for name in ("ratio", "clipfrac", "approxkl", "policykl")]
    assert [stats[name] for name in names] == [1, 0, 0, 0]


def test_gradient_of_an_unmoved_policy_is_the_plain_policy_gradient():
    generator = torch.Generator().manual_seed(14)
    lengths, vocabulary = (4, 2), 5
    logits = torch.randn(2, 4, vocabulary, generator=generator).requires_grad_()
    tokens = torch.randint(0, vocabulary, (2, 4), generator=generator)
    advantages = torch.randn(2, 4, generator=generator)
    logprobs = logits.log_softmax(dim=-1).gather(2, tokens[..., None]).squeeze(2)
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, prefixes(lengths, 4), 0.2)
    loss.backward()
    for row in range(2):
        for t in range(4):
            exps = [math.exp(x) for x in logits[row, t].tolist()]
            for j in range(vocabulary):
                score = (j == tokens[row, t].item()) - exps[j] / math.fsum(exps)
                expected = -advantages[row, t].item() * score / sum(lengths) if t < lengths[row] else 0.0
                close(logits.grad[row, t, j], expected)


@pytest.mark.parametrize("case", TRL["losses"], ids=lambda case: case["name"])
def test_value_loss_agrees_with_trl(case):
    i = trl_inputs(case)
    loss, stats = value_loss(i["vpreds"], i["values"], i["returns"], i["mask"], case["cliprange_value"])
    close(stats["ppo/val/clipfrac"], case["value_clipfrac"])
    if case["name"] != "skipped":
        close(loss, case["value_loss"])


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_value_loss_agrees_with_loops(spread):
    b = random_batch(15, spread=spread)
    errors, clipped = [], []
    columns = (under(b[k], b["mask"]) for k in ("values", "old_values", "returns"))
    for value, old, target in zip(*columns, strict=True):
        held = value
        if value > old + 0.2:
            held = old + 0.2
        elif value < old - 0.2:
            held = old - 0.2
        further = abs(held - target) > abs(value - target)
        errors.append((held if further else value) - target)
        clipped.append(further)
    loss, stats = value_loss(b["values"], b["old_values"], b["returns"], b["mask"], 0.2)
    close(loss, statistics.fmean(e * e for e in errors) / 2)
    close(stats["ppo/val/clipfrac"], statistics.fmean(clipped))
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("target", "loss", "clipped", "slope"),
    [
        (1.5, 0.125, 0.0, 0.5),  # overshot: the unclipped error is larger
        (3.0, 1.62, 1.0, 0.0),  # not there yet, but the step exceeded the range
    ],
)
def test_value_clipping_by_hand(target, loss, clipped, slope):
    value = floats([[2.0]]).requires_grad_()
    result, stats = value_loss(value, floats([[1.0]]), floats([[target]]), bools([[1]]), 0.2)
    result.backward()
    close(result.detach(), loss)
    close(stats["ppo/val/clipfrac"], clipped)
    close(value.grad, [[slope]])


@pytest.mark.parametrize("extra", [1, 5])
def test_padding_changes_nothing(extra):
    narrow = random_batch(16)
    wide, width = padded(narrow, extra), narrow["mask"].shape[1]

    def everything(b):
        mask = b["mask"]
        rewards, kl = compute_rewards(b["scores"], b["logprobs"], b["ref_logprobs"], mask, 0.2)
        advantages, returns = compute_advantages(b["values"], rewards, mask, 0.97, 0.9)
        loss, stats = loss_of(b, 0.2)
        vf_loss, vf_stats = value_loss(b["values"], b["old_values"], b["returns"], mask, 0.2)
        scalars = [masked_mean(b["values"], mask), loss, vf_loss, *(stats | vf_stats).values()]
        return [rewards, kl, advantages, returns, masked_whiten(b["values"], mask)], scalars

    (tensors, scalars), (wide_tensors, wide_scalars) = everything(narrow), everything(wide)
    for tensor, wide_tensor in zip(tensors, wide_tensors, strict=True):
        close(under(wide_tensor[:, :width], narrow["mask"]), under(tensor, narrow["mask"]))
    for scalar, wide_scalar in zip(scalars, wide_scalars, strict=True):
        close(wide_scalar, scalar)


@pytest.mark.parametrize("case", TRL["kl_controllers"], ids=lambda case: f"horizon {case['horizon']}")
@pytest.mark.parametrize("controller", ["adaptive", "fixed"])
def test_kl_coefficient_follows_trl(case, controller):
    options = {"target_kl": float(case["target"]), "kl_horizon": case["horizon"], "batch_size": case["batch_size"]}
    config, coefficient = DetoxConfig(adaptive_kl=controller == "adaptive", **options), case["init"]
    for kl, expected in zip(case["kls"], case[controller], strict=True):
        coefficient = adapted_kl_coef(coefficient, kl, config)
        assert isinstance(coefficient, float)
        assert coefficient == pytest.approx(expected, rel=1e-7)
    # with a short horizon the steps must differ visibly, or the comparison would be weak
    assert (case["horizon"] > 100) or max(case["adaptive"]) - min(case["adaptive"]) > 0.01


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.2), (6.6, 0.2032), (7.2, 0.2064), (600.0, 0.2064), (5.4, 0.1968), (-3.0, 0.1936)],
)
def test_adapted_kl_coefficient_by_hand(kl, expected):
    # 16 samples in a horizon of 100: the relative distance from the target, at most a fifth, times 0.16
    config = DetoxConfig(target_kl=6.0, kl_horizon=100, batch_size=16)
    assert adapted_kl_coef(0.2, kl, config) == pytest.approx(expected, rel=1e-7)


def test_response_mask_covers_each_generated_token_and_nothing_after():
    mask = Responses([[1]] * 3, torch.zeros(3, 5, dtype=torch.long), torch.tensor([1, 3, 5])).mask
    assert mask.dtype == torch.bool
    assert mask.tolist() == bools([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).tolist()


# Variance explained


def test_variance_explained_by_hand():
    returns = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    padding = torch.tensor([[0, 0, 0], [0, 7.0, -3.0]])
    assert variance_explained(returns + padding, returns, mask) == pytest.approx(1)
    # a constant shift is not variance
    assert variance_explained(returns + 5 + padding, returns, mask) == pytest.approx(1)
    assert variance_explained(torch.full((2, 3), 8.0) + padding, returns, mask) == pytest.approx(0)
    assert variance_explained(-returns, returns, mask) == pytest.approx(-3)
    assert variance_explained(returns / 2, returns, mask) == pytest.approx(0.75)


def test_variance_explained_without_variance():
    one = torch.tensor([[True, False]])
    assert variance_explained(torch.ones(1, 2), torch.zeros(1, 2), one) == 0
    both = torch.tensor([[True, True]])
    assert variance_explained(torch.ones(1, 2), torch.ones(1, 2), both) == pytest.approx(1)


# The policy's own log-probabilities and values, on the model that TRL ran


@pytest.fixture(scope="module")
def policy():
    """TRL's model and value head as a policy with a new LoRA, which is the identity."""
    model = T5ForConditionalGeneration.from_pretrained(HERE / "trl_reference_t5")
    # with a head tied to the embeddings the same file would be another model
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=peft.TaskType.SEQ_2_SEQ_LM))
    policy, head = Policy(model), TRL["first_token_masked"]["value_head"]
    with torch.no_grad():
        policy.value_head.summary.weight.copy_(floats([head["weight"]]))
        policy.value_head.summary.bias.copy_(floats(head["bias"]))
    return policy


def our_view(policy, queries, with_start):
    """Log-probabilities, values and mask of the generated tokens, as this project computes them."""
    assert all(response[0] == START for response in with_start)
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(response[1:]) for response in with_start], True)
    responses = Responses(queries, tokens, torch.tensor([len(response) - 1 for response in with_start]))
    return *policy.logprobs_and_values(responses), responses.mask


@pytest.mark.parametrize("name", ["first_token_masked", "length_cap", "empty_response"])
def test_logprobs_and_values_agree_with_trl_wherever_trl_has_them(policy, name):
    case = TRL[name]
    responses, trl = (case["returned"], case["on_returned"]) if name == "length_cap" else (case["responses"], case)
    logprobs, values, mask = our_view(policy, case["queries"], responses)
    trl_mask = bools(trl["masks"])
    assert (mask & trl_mask).equal(trl_mask)
    # TRL computes the first token's log-probability too and only masks it, so each of ours has a counterpart
    close(under(logprobs, mask), under(floats(trl["logprobs"]), mask), 1e-5)
    close(under(values, mask), under(floats(trl["values"]), mask), 1e-5)


def test_trl_leaves_the_first_generated_token_out(policy):
    case = TRL["first_token_masked"]
    logprobs, _, mask = our_view(policy, case["queries"], case["responses"])
    trl_mask = bools(case["masks"])
    assert mask[:, 0].all() and not trl_mask[:, 0].any()
    assert mask[:, 1:].equal(trl_mask[:, 1:])
    # so it is not trained: the loss does not depend on its log-probability
    for chosen, trained in ((mask, True), (trl_mask, False)):
        moving = logprobs.clone().requires_grad_()
        loss, _ = policy_loss(moving, logprobs, torch.ones_like(logprobs), chosen, 0.2)
        loss.backward()
        assert (moving.grad[:, 0] != 0).tolist() == [trained] * len(moving)


def test_trl_masks_every_token_of_an_empty_response(policy):
    case = TRL["empty_response"]
    assert not bools(case["masks"]).any() and case["error"] == "IndexError"
    logprobs, _, mask = our_view(policy, case["queries"], case["responses"])
    assert mask.tolist() == [[True], [True]]
    rewards, _ = compute_rewards(floats([0.7, -0.4]), logprobs, logprobs, mask, 0.2)
    close(rewards, [[0.7], [-0.4]])


def test_slicing_at_max_new_tokens_drops_the_start_token(policy):
    case = TRL["length_cap"]
    max_new_tokens = case["max_new_tokens"]
    full = [len(response) == max_new_tokens + 1 for response in case["returned"]]
    assert True in full and False in full
    # generate() itself drops nothing; taking the last max_new_tokens of its output does
    assert all(response[0] == START for response in case["returned"] + case["returned_one_by_one"])
    assert [response[0] != START for response in case["sliced"]] == full

    logprobs, _, mask = our_view(policy, case["queries"], case["returned"])
    trl = case["on_sliced"]
    for row in (r for r, is_full in enumerate(full) if is_full):
        assert mask[row].sum() == max_new_tokens
        # TRL then counts two tokens fewer than were sampled, and conditions the others on a decoder input
        # without the start token; its columns are one token behind ours
        assert sum(trl["masks"][row]) == max_new_tokens - 2
        counted = [t for t, is_counted in enumerate(trl["masks"][row]) if is_counted]
        errors = [abs(trl["logprobs"][row][t] - logprobs[row, t + 1].item()) for t in counted]
        assert max(errors) > 1e-3
