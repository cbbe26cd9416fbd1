"""A LoRA of the value head's own: what it trains, what it leaves alone, and that a resumed run keeps it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from detox_ppo import load_policy, print_parameters, resolve_device, run

OPTIONS = {"max_ppo_steps": 2, "learning_rate": 1e-3, "eval_samples": 1, "save_steps": 1}


pytestmark = pytest.mark.usefixtures("quick")


def weights(checkpoint, name):
    """Of the LoRA adapter, value (which lies below the adapter, where PEFT keeps others) or reference."""
    return load_file(checkpoint / {"value": "adapter/value"}.get(name, name) / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    """Directories of runs whose value losses weigh little and much, with the value head's own LoRA and without."""
    found = {}
    for own, weight, steps in ((True, 0.1, 2), (True, 50.0, 1), (False, 0.1, 1), (False, 50.0, 1)):
        found[own, weight] = tmp_path_factory.mktemp("values")
        options = OPTIONS | {"max_ppo_steps": steps, "value_adapter": own, "vf_coef": weight}
        run(small_config(output_dir=found[own, weight], **options))
    return found


def test_values_do_not_move_the_policy(runs):
    for own in (True, False):
        little, much = (runs[own, weight] / "checkpoint-1" for weight in (0.1, 50.0))
        assert same(weights(little, "adapter"), weights(much, "adapter")) == own


def test_it_starts_as_the_policy_does_and_is_trained(runs):
    first, last = (runs[True, 0.1] / name for name in ("checkpoint-1", "checkpoint-2"))
    assert not same(weights(first, "value"), weights(last, "value"))
    assert not same(weights(last, "value"), weights(last, "adapter"))
    assert same(weights(first, "reference"), weights(last, "reference"))
    # What the head reads is kept beside it.
    assert same(weights(last, "value"), weights(runs[True, 0.1], "value"))
    assert not list(runs[False, 0.1].rglob("value"))


def test_the_first_step_is_the_same_but_for_the_values(runs):
    own, shared = (json.loads((runs[own, 0.1] / "metrics.jsonl").read_text().splitlines()[0]) for own in (True, False))
    # A new value head says 0 everywhere, whoever's states it reads.
    for name in ("ppo/mean_scores", "objective/entropy", "ppo/returns/mean", "ppo/loss/policy", "objective/kl"):
        assert own[name] == pytest.approx(shared[name], abs=1e-5), name
    assert own["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5)


def test_its_learning_rate(small_config, tmp_path):
    options = OPTIONS | {"max_ppo_steps": 1, "mini_batch_size": 4, "learning_rate": 1e-5}
    run(small_config(output_dir=tmp_path, value_adapter=True, value_learning_rate=0.01, **options))
    head = load_file(tmp_path / "adapter" / "value_head.safetensors")
    # Adam's first step has the size of its learning rate.
    assert head["v_head.summary.weight"].abs().max() == pytest.approx(0.01, rel=1e-3)


def test_counts_do_not_change(small_config, small):
    config = small_config(value_adapter=True)
    policy, _ = load_policy(config, *resolve_device(config))
    assert policy.count_parameters("default") == small.policy.count_parameters("default")
    own = [parameter for name, parameter in policy.named_parameters() if ".value." in name]
    assert own and len(policy.value_parameters) == len(small.policy.value_parameters) + len(own)
    # The tuning in several processes takes a parameter that wants a gradient and gets none for a mistake.
    print_parameters(policy)
    assert not any(parameter.requires_grad for parameter in own)
    with policy.adapter("value", trainable=True):
        assert all(parameter.requires_grad for parameter in own)


def test_its_gradients_by_activations_computed_again(runs, small_config, tmp_path):
    """After an update the value head's LoRA is no longer the policy's, so that taking one for the other would show."""
    run(small_config(output_dir=tmp_path, value_adapter=True, vf_coef=0.1, gradient_checkpointing=True, **OPTIONS))
    for name in ("adapter", "value", "reference"):
        assert same(weights(tmp_path / "checkpoint-2", name), weights(runs[True, 0.1] / "checkpoint-2", name))


def test_a_resumed_run_keeps_it(runs, small_config, tmp_path):
    whole = runs[True, 0.1]
    options = OPTIONS | {"output_dir": tmp_path, "resume": whole / "checkpoint-1", "value_adapter": True}
    run(small_config(vf_coef=0.1, **options))
    for name in ("adapter", "value"):
        assert same(weights(tmp_path / "checkpoint-2", name), weights(whole / "checkpoint-2", name))
