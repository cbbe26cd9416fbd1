"""Thirty steps: memory, tensors and open files do not grow, and the frozen base is unchanged bit for bit."""

import gc
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import detox_ppo

pytestmark = pytest.mark.usefixtures("quick")


STEPS = 30


@pytest.fixture(scope="module")
def watched(small_config, tmp_path_factory):
    """A run whose tensors, resident memory (MiB) and open files are recorded in every step."""
    notes, load, rewards = [], detox_ppo.load_policy, detox_ppo.compute_rewards
    captured = {}

    def capture_policy(*args):
        captured["policy"], tokenizer = load(*args)
        return captured["policy"], tokenizer

    def record(*args):
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        memory = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
        notes.append(SimpleNamespace(tensors=tensors, memory=memory, files=len(os.listdir("/proc/self/fd"))))
        return rewards(*args)

    gc.freeze()  # existing objects need not be counted in every step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detox_ppo, "load_policy", capture_policy)
        patch.setattr(detox_ppo, "compute_rewards", record)
        detox_ppo.run(small_config(max_ppo_steps=STEPS, eval_samples=1, output_dir=tmp_path_factory.mktemp("long")))
    assert len(notes) == STEPS
    return notes, captured["policy"]


def test_memory_tensors_and_files_do_not_grow(watched):
    notes, _ = watched
    # Adam's state comes with the first update.
    assert len({step.tensors for step in notes[2:]}) == 1
    assert len({step.files for step in notes}) == 1
    # It was 60 with unrounded widths, as oneDNN generates code for each. The allocator still adds a few pages.
    assert notes[-1].memory - notes[9].memory < 20


def test_the_base_is_unchanged_bit_for_bit(watched, tiny):
    _, policy = watched
    stored = load_file(tiny / "base" / "model.safetensors")
    frozen = {
        name.replace(".base_layer", "").removeprefix("model.base_model.model."): parameter
        for name, parameter in policy.named_parameters()
        if "lora_" not in name and not name.startswith("value_head")
    }
    assert set(stored) <= set(frozen)
    for name, tensor in stored.items():
        assert torch.equal(frozen[name], tensor), name
    moved = dict(policy.named_parameters())
    pairs = [(name, name.replace(".default.", ".reference.")) for name in moved if ".default." in name]
    assert all(not torch.equal(moved[trained], moved[reference]) for trained, reference in pairs)


@pytest.mark.parametrize("length, steps", [(["--steps", "3"], 3), (["--minutes", "0.001"], 1)])
def test_a_short_soak(length, steps, monkeypatch, capsys):
    """With --steps it finishes; with --minutes SIGTERM stops it with a checkpoint of the current step."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import soak

    monkeypatch.setattr(sys, "argv", ["soak.py", *length])
    soak.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == steps and result["exit_code"] == 0 and result["newest_is_whole"]
    assert len(result["files"]) == 1 and result["memory"]["peak"] >= result["memory"]["first"] > 100
