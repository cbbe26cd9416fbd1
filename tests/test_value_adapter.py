"""A LoRA of the value head's own: what it trains, what it leaves alone, and that a resumed run keeps it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from detox_ppo import load_policy, resolve_device, run

OPTIONS = {"max_ppo_steps": 2, "learning_rate": 1e-3, "eval_samples": 1, "save_steps": 1}


def weights(checkpoint, name):
    return load_file(checkpoint / name / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def runs(small_config, tmp_path_factory):
    """Directories of runs whose value losses weigh little and much, with the value head's own LoRA and without."""
    found = {}
    for own in (True, False):
        for weight in (0.1, 50.0):
            found[own, weight] = tmp_path_factory.mktemp("values")
            run(small_config(output_dir=found[own, weight], value_adapter=own, vf_coef=weight, **OPTIONS))
    return found


def test_values_do_not_move_the_policy(runs):
    little, much = (runs[True, weight] / "checkpoint-1" for weight in (0.1, 50.0))
    assert same(weights(little, "adapter"), weights(much, "adapter"))
    little, much = (runs[False, weight] / "checkpoint-2" for weight in (0.1, 50.0))
    assert not same(weights(little, "adapter"), weights(much, "adapter"))


def test_it_starts_as_the_policy_does_and_is_trained(runs):
    first, last = (runs[True, 0.1] / name for name in ("checkpoint-1", "checkpoint-2"))
    assert not same(weights(first, "value"), weights(last, "value"))
    assert not same(weights(last, "value"), weights(last, "adapter"))
    assert same(weights(first, "reference"), weights(last, "reference"))
    assert not (runs[False, 0.1] / "checkpoint-2" / "value").exists()


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
    for adapter, head in (("default", False), ("default", True)):
        assert policy.count_parameters(adapter, head) == small.policy.count_parameters(adapter, head)
    assert len(policy.value_parameters) == len(small.policy.value_parameters) + len(
        [name for name, _ in policy.named_parameters() if ".value." in name]
    )


def test_a_resumed_run_keeps_it(runs, small_config, tmp_path):
    whole = runs[True, 0.1]
    options = OPTIONS | {"output_dir": tmp_path, "resume": whole / "checkpoint-1", "value_adapter": True}
    run(small_config(vf_coef=0.1, **options))
    for name in ("adapter", "value"):
        assert same(weights(tmp_path / "checkpoint-2", name), weights(whole / "checkpoint-2", name))
