"""Disks, memory, numbers and signals that fail a run in the middle: nothing is lost, one line says what to do."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_points import FAST, differences, left, strike
from safetensors.torch import load_file, save_file

import detox_ppo
from detox_ppo import UserError

pytestmark = pytest.mark.usefixtures("quick")


ROOT = Path(__file__).resolve().parent.parent


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# Disks


@pytest.fixture
def disk(tmp_path):
    """Makes and remounts small disks in memory, where mounting is allowed."""
    mounted = []

    def mount(path, options):
        path.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
        if path in mounted:
            command = ["mount", "-o", f"remount,{options}", path]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in set(mounted):
        subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_while_saving(undisturbed, forked, disk, tmp_path):
    """First too small for the tuning's checkpoints, then for those of PPO; at last large enough."""
    home = disk(tmp_path / "disk", "size=3m")
    args = [*undisturbed.args, "--output_dir", str(home / "run")]
    run = forked.run(args, tmp_path, [FAST])
    assert run.code == 2 and "Traceback" not in run.output
    assert re.search(r"sft_checkpoint/checkpoint-\d: can't be written: .*--resume goes on from the newest", run.error)
    disk(home, "size=4600k")
    run = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert run.code == 2 and "going on from" in run.output and "Traceback" not in run.output
    assert re.search(r"run/checkpoint-\d: can't be written: ", run.error)
    assert not list((home / "run").glob(".*.partial"))  # half a file would keep the disk full
    kept = detox_ppo.find_checkpoints(home / "run")
    assert kept and not any(map(detox_ppo.damage, kept)), run.error
    disk(home, "size=40m")
    run = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert run.code == 0 and re.search(r"going on from .*run/checkpoint-\d", run.output)
    assert same_results(undisturbed, home / "run")


def same_results(undisturbed, directory):
    """Whether a run in another directory left the same: what names the directory can't be."""
    changed = differences(undisturbed.left, left(directory))
    named = {"results.json", "README.md", "checkpoint-2/state.json", "checkpoint-3/state.json"}
    results, expected = left(directory)["results.json"], undisturbed.left["results.json"]
    return set(changed) <= named and results == expected | {"config": expected["config"] | results["config"]}


def refusal(directory, small_arguments, capsys):
    """Why a run can't write there. It is said before anything is loaded: no hub would know the model."""
    with pytest.raises(SystemExit) as end:
        detox_ppo.main(small_arguments(model_name="nobody/nothing", output_dir=directory))
    assert end.value.code == 2
    start = f"detox_ppo.py: error: --output_dir {directory}: can't be written: "
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(start)
    return line.removeprefix(start)


def test_an_output_directory_that_cannot_be_made_is_found_first(small_arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file", small_arguments, capsys) == "File exists"
    assert refusal(tmp_path / "file" / "below", small_arguments, capsys) == "Not a directory"


def test_an_output_directory_on_a_read_only_disk_is_found_first(small_arguments, tmp_path, disk, capsys):
    read_only = disk(tmp_path / "disk", "ro")
    for directory in (read_only, read_only / "below"):
        assert refusal(directory, small_arguments, capsys) == "Read-only file system"


def test_a_directory_where_a_file_should_go(small_arguments, tmp_path, capsys):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        detox_ppo.main(small_arguments(output_dir=tmp_path / "run"))
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert stopped.value.code == 2 and "Is a directory" in error and "metrics.jsonl" in error


def test_a_checkpoint_that_can_only_be_read(undisturbed, forked, disk, tmp_path):
    archive = disk(tmp_path / "disk", "size=40m")
    shutil.copytree(undisturbed.directory / "run" / "checkpoint-2", archive / "checkpoint-2")
    disk(archive, "ro")
    run = forked.run([*undisturbed.args, "--resume", str(archive / "checkpoint-2")], tmp_path / "new", [FAST])
    assert run.code == 0
    assert all(
        name.startswith("checkpoint-2") for name in differences(undisturbed.left, left(tmp_path / "new" / "run"))
    )


def test_truncated_weights_under_a_right_checksum(undisturbed, forked, tmp_path):
    """Cut off before the checksums were taken."""
    shutil.copytree(undisturbed.directory, tmp_path / "copy")
    checkpoint = tmp_path / "copy" / "run" / "checkpoint-3"
    weights = checkpoint / "adapter" / "adapter_model.safetensors"
    os.truncate(weights, 1000)
    (checkpoint / "checksums.json").write_text(json.dumps(detox_ppo.checksums(checkpoint)))
    run = forked.run([*undisturbed.args, "--resume"], tmp_path / "copy", [FAST])
    assert run.code == 2 and "Traceback" not in run.output
    assert run.error.startswith("detox_ppo.py: error: --resume run/checkpoint-3: can't be loaded")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(UserError, match="results.json: can't be written: .*No space left"):
        with detox_ppo.written_aside(path) as aside:
            aside.write_text("ne")
            raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


# Memory


def test_out_of_memory_says_which_options_to_lower(undisturbed, forked, tmp_path):
    large = ["--batch_size", "24", "--mini_batch_size", "24", "--output_max_length", "512"]
    args = [*undisturbed.args, "--sft_steps", "0", *large]
    run = forked.run(args, tmp_path, [FAST, ["forks:short_of_memory", {"spare": 2**22}]])
    assert run.code == 2 and "Traceback" not in run.output
    assert "out of memory" in run.error and "Lower mini_batch_size" in run.error and "batch_size" in run.error


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, bytearray])
def test_every_kind_of_out_of_memory(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate(2**58)
    for failure in (error.value, torch.OutOfMemoryError("CUDA out of memory.")):
        assert "Lower mini_batch_size" in detox_ppo.explain(failure)


def test_a_defect_is_shown_as_one():
    assert detox_ppo.explain(ValueError("a defect")) is None


# Numbers


@pytest.fixture
def broken_steps(monkeypatch):
    """Breaks chosen steps of a run in chosen ways."""
    faults, now = {}, {"step": 0}
    sample, scores, logits, loss = (
        detox_ppo.sample_responses,
        detox_ppo.HateClassifier.scores,
        detox_ppo.Policy.logits,
        detox_ppo.policy_loss,
    )

    def sample_responses(policy, prompts, generators, caps, config):
        if caps[0] != caps[1]:  # not in the evaluation
            now["step"] += 1
        return sample(policy, prompts, generators, caps, config)

    def broken(kind, value, where):
        """value, with one number replaced, if this step is to break here."""
        if faults.get(now["step"], "").startswith(kind):
            value = value.clone() if isinstance(value, torch.Tensor) else value.copy()
            value[where] = float(faults[now["step"]].removeprefix(kind))
        return value

    def policy_loss(*args):
        value, stats = loss(*args)
        fault = faults.get(now["step"], "")
        if fault.startswith("loss "):
            value = value * float(fault.removeprefix("loss "))
        return value, stats

    monkeypatch.setattr(detox_ppo, "sample_responses", sample_responses)
    monkeypatch.setattr(detox_ppo.HateClassifier, "scores", lambda *a: broken("score ", scores(*a), 0))
    monkeypatch.setattr(detox_ppo.Policy, "logits", lambda *a: broken("logit ", logits(*a), (..., 7)))
    monkeypatch.setattr(detox_ppo, "policy_loss", policy_loss)
    return faults


def weights_of(checkpoint):
    return load_file(checkpoint / "adapter_model.safetensors") | load_file(checkpoint / "value_head.safetensors")


def test_steps_whose_numbers_are_not_finite_change_only_the_counts(broken_steps, small_config, tmp_path, capsys):
    kinds = ["score nan", "score inf", "score -inf", "logit nan", "logit inf", "loss nan", "loss inf"]
    broken_steps.update({2 * i + 2: kind for i, kind in enumerate(kinds)})
    options = {"max_ppo_steps": 15, "learning_rate": 1e-3, "save_steps": 1, "save_total_limit": 99}
    results = detox_ppo.run(small_config(output_dir=tmp_path, **options))
    lines = metrics_of(tmp_path)
    assert [line["ppo/skipped_steps"] for line in lines] == [0, 1] * 7 + [0]
    assert results["warnings"]["not finite"].startswith("7 of 15 steps were skipped")
    assert "step    2/15 | not finite: scores" in capsys.readouterr().out
    assert all(math.isfinite(value) for line in lines for value in line.values())
    coefficients = [line["objective/kl_coef"] for line in lines]
    for step in broken_steps:
        assert coefficients[step] == coefficients[step - 1] != coefficients[step - 2]
        if not broken_steps[step].startswith("logit"):  # those checkpoints are not written, see below
            before, after = (weights_of(tmp_path / f"checkpoint-{i}" / "adapter") for i in (step - 1, step))
            assert all(torch.equal(before[name], after[name]) for name in before), broken_steps[step]
    saved = {int(path.name.removeprefix("checkpoint-")) for path in detox_ppo.find_checkpoints(tmp_path)}
    assert saved == set(range(16)) - {8, 10}
    weights = weights_of(tmp_path / "adapter")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights.items())  # the others trained


@pytest.mark.parametrize("kind, last", [("score nan", 4), ("logit nan", 1)])
def test_three_such_steps_in_a_row_stop_the_run_with_the_last_good_state(
    kind, last, broken_steps, small_config, tmp_path
):
    """A policy whose own numbers are broken is not saved any more; one that was only badly paid is."""
    broken_steps.update({2: kind, 3: kind, 4: kind})
    config = small_config(output_dir=tmp_path, max_ppo_steps=9, save_steps=1, eval_samples=1)
    with pytest.raises(UserError, match=f"step 4: three steps in a row .*checkpoint-{last}. Lower learning_rate"):
        detox_ppo.run(config)
    checkpoint = detox_ppo.find_checkpoints(tmp_path)[0]
    assert checkpoint.name == f"checkpoint-{last}" and detox_ppo.damage(checkpoint) is None
    assert all(tensor.isfinite().all() for tensor in weights_of(checkpoint / "adapter").values())
    assert len(metrics_of(tmp_path)) == 4 and not (tmp_path / "results.json").exists()


def test_a_model_that_gives_no_numbers_at_all(small_config, tiny, tmp_path):
    """Found in the evaluation before the first step, in one line."""
    shutil.copytree(tiny / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="--model_name .*: with its adapter the logits are not finite"):
        detox_ppo.run(small_config(model_name=tmp_path / "base", output_dir=tmp_path / "run", eval_samples=1))


# Two runs, and signals


def wait_until_stopped(pid):
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it looks into /proc")
def test_a_second_run_in_the_same_directory_is_refused_while_the_first_lives(undisturbed, forked, tmp_path):
    first = forked.start(undisturbed.args, tmp_path, [strike("sampling", 3, "SIGSTOP")])
    wait_until_stopped(first.pid)
    (tmp_path / "output").rename(tmp_path / "first")
    for args in (undisturbed.args, [*undisturbed.args, "--resume"]):
        second = forked.run(args, tmp_path, [FAST])
        assert second.code == 2
        assert second.output == (
            "detox_ppo.py: error: --output_dir run: another run is writing there; choose another directory\n"
        )
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = forked.run([*undisturbed.args, "--resume"], tmp_path, [FAST])
    assert third.code == 0 and differences(undisturbed.left, left(tmp_path / "run")) == []


@pytest.mark.parametrize(
    "point, code, newest",
    [
        (("sampling", 15, "SIGTERM"), 0, "checkpoint-2"),
        (("update", 8, "SIGINT"), 130, "checkpoint-2"),
        (("checkpoint", 5, "SIGTERM"), 0, "sft_checkpoint/checkpoint-3"),
        (("checkpoint", 25, "SIGTERM"), 0, "checkpoint-3"),
        (("tuning", 7, "SIGTERM"), 0, "sft_checkpoint/checkpoint-2"),
        (("evaluation", 25, "SIGINT"), 130, "sft_checkpoint/checkpoint-3"),
        (("final evaluation", 15, "SIGTERM"), 0, "checkpoint-3"),
    ],
)
def test_a_signal_leaves_a_checkpoint_of_the_step_in_hand(point, code, newest, undisturbed, forked, tmp_path):
    """With checkpoints far apart, so that there is none but that. What goes on from it is the same run."""
    args = [*undisturbed.args, "--save_steps", "100"]
    stopped = forked.run(args, tmp_path, [strike(*point)])
    assert stopped.code == code and "Traceback" not in stopped.output
    assert stopped.error.startswith(f"stopped by {point[2]}; the same command with --resume goes on")
    found = detox_ppo.find_checkpoints(tmp_path / "run") + detox_ppo.find_checkpoints(tmp_path / "run/sft_checkpoint")
    assert found[0].relative_to(tmp_path / "run").as_posix() == newest
    assert detox_ppo.damage(found[0]) is None
    resumed = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert resumed.code == 0 and f"going on from run/{newest}" in resumed.output
    changed = differences(undisturbed.left, left(tmp_path / "run"))
    # save_steps says which checkpoints there are, and stands in the configuration.
    assert [name for name in changed if not name.startswith("checkpoint-")] == ["README.md", "results.json"]


def test_a_second_signal_is_not_made_to_wait(undisturbed, forked, tmp_path):
    run = forked.run(undisturbed.args, tmp_path, [strike("sampling", 15, "SIGINT", "SIGINT")])
    assert run.code == 130 and "stopping after the step in hand" in run.output
    assert detox_ppo.find_checkpoints(tmp_path / "run")[0].name == "checkpoint-1"  # step 2 was in hand


def test_ctrl_c_at_the_command_line(tmp_path, undisturbed):
    """The script itself, by an interpreter of its own."""
    args = [*undisturbed.args, "--max_ppo_steps", "10000", "--save_steps", "100000", "--sft_steps", "0"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "detox_ppo.py"), *args],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step    2/"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    newest = detox_ppo.find_checkpoints(tmp_path / "run")[0]
    step = json.loads((newest / "state.json").read_text())["step"]
    assert step >= 2 and step == metrics_of(tmp_path / "run")[-1]["step"] and detox_ppo.damage(newest) is None
