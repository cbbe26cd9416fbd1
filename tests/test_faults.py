"""Full disks, lack of memory, non-finite numbers and signals: nothing is lost, and one line says what to do."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kill_points import FAST, content, differences, left, strike, wait_for_steps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import detox_ppo
from detox_ppo import UserError

pytestmark = pytest.mark.usefixtures("quick")


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def checkpoints_of(directory):
    """The names of the checkpoints, newest first."""
    return [path.name for path in detox_ppo.Checkpoints(directory, 99).paths()]


# Disks


@pytest.fixture
def disk(tmp_path):
    """Mounts and resizes small tmpfs disks, where mounting is allowed."""
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
    """First too small for the second SFT checkpoint, then for the PPO checkpoints, then large enough."""
    home = disk(tmp_path / "disk", "size=2500k")
    args = [*undisturbed.args, "--output_dir", str(home / "run")]
    run = forked.run(args, tmp_path, [FAST])
    assert run.code == 2 and "Traceback" not in run.output
    assert re.search(r"run/checkpoint-2.pt: can't be written: .*Fix that and use --resume to continue", run.error)
    assert checkpoints_of(home / "run") == ["checkpoint-1.pt"]
    assert not list((home / "run").glob(".*.partial"))  # a partial file would keep the disk full
    disk(home, "size=4950k")
    run = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert run.code == 2 and "resuming from" in run.output and "Traceback" not in run.output
    assert re.search(r"run/checkpoint-\d.pt: can't be written: ", run.error)
    disk(home, "size=40m")
    run = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert run.code == 0 and "resuming from" in run.output and "is not used" not in run.output
    assert same_results(undisturbed, home / "run")


def same_results(undisturbed, directory):
    """Whether a run in another directory has the same results, except in the files that name the directory."""
    changed = differences(undisturbed.left, left(directory))
    named = {"results.json", "README.md", "checkpoint-5.pt", "checkpoint-6.pt"}
    results, expected = left(directory)["results.json"], undisturbed.left["results.json"]
    return set(changed) <= named and results == expected | {"config": expected["config"] | results["config"]}


def error_line(arguments, capsys):
    """The error message of a run that fails before anything is loaded."""
    with pytest.raises(SystemExit) as end:
        detox_ppo.main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("detox_ppo.py: error: ")


@pytest.mark.parametrize("option", ["output_dir", "model_dir", "checkpoint_dir"])
def test_a_directory_that_cannot_be_created_is_reported_first(option, small_arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    options = {"model_name": "nobody/nothing", "output_dir": tmp_path / "run"}
    for directory, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        message = error_line(small_arguments(**options | {option: directory}), capsys)
        assert message == f"--{option} {directory}: can't be written: {reason}"


def test_a_directory_on_a_read_only_disk_is_reported_first(small_arguments, tmp_path, disk, capsys):
    read_only = disk(tmp_path / "disk", "ro")
    for directory in (read_only, read_only / "below"):
        message = error_line(small_arguments(model_name="nobody/nothing", output_dir=directory), capsys)
        assert message == f"--output_dir {directory}: can't be written: Read-only file system"


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "README.md", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("option", ["output_dir", "model_dir"])
def test_a_directory_in_place_of_a_file_is_reported_first(option, name, small_arguments, tmp_path, capsys):
    directory = tmp_path / "ours"
    (directory / name).mkdir(parents=True)
    (directory / ".lock").touch()
    options = {"model_name": "nobody/nothing", "output_dir": tmp_path / "run"} | {option: directory}
    message = error_line(small_arguments(**options), capsys)
    assert message == f"--{option} {directory}: can't be written: {directory / name} is not a writable file"


def test_a_file_in_place_of_a_directory_and_a_read_only_file(tmp_path, monkeypatch):
    (tmp_path / "adapter").touch()
    with pytest.raises(UserError, match="--model_dir .*adapter is not a writable directory"):
        detox_ppo.check_writable(tmp_path, "model_dir")
    (tmp_path / "adapter").rename(tmp_path / "training.png")
    detox_ppo.check_writable(tmp_path, "model_dir")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "training.png")  # root may write anything
    with pytest.raises(UserError, match="training.png is not a writable file"):
        detox_ppo.check_writable(tmp_path, "model_dir")


@pytest.mark.parametrize("name", ["README.md", "results.json", "adapter", "checkpoint-500.pt"])
@pytest.mark.parametrize("option", ["output_dir", "model_dir"])
def test_a_directory_with_files_of_another_program_is_an_error(option, name, small_arguments, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    if name == "adapter":
        (foreign / name).mkdir()
    else:
        torch.save({"step": 500}, foreign / name)
    options = {"model_name": "nobody/nothing", "output_dir": tmp_path / "run"} | {option: foreign}
    message = error_line(small_arguments(**options), capsys)
    assert f"--{option} {foreign}: a run would overwrite files of another program: {name};" in message
    assert os.listdir(foreign) == [name] and os.listdir(tmp_path) == ["foreign"]
    (foreign / ".lock").touch()  # as after a killed run
    assert "another program" not in error_line(small_arguments(**options), capsys)


@pytest.mark.parametrize("model_dir", ["run/at/model", "run", "elsewhere/model"])
@pytest.mark.parametrize("there", [[], ["run"], ["run/notes.txt", "elsewhere/model/.lock"]])
def test_a_run_that_cannot_start_leaves_no_files(there, model_dir, small_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in map(Path, there):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix or path.name == ".lock" else path.mkdir()
    before = set(Path().rglob("*"))
    options = {"output_dir": "run/at", "model_dir": model_dir, "checkpoint_dir": tmp_path / "elsewhere"}
    assert "--model_name nobody/nothing" in error_line(small_arguments(model_name="nobody/nothing", **options), capsys)
    assert set(Path().rglob("*")) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_another_program_are_kept(zipped, tmp_path, capsys):
    foreign = tmp_path / "checkpoint-500.pt"
    torch.save({"step": 500}, foreign, _use_new_zipfile_serialization=zipped)
    checkpoints = detox_ppo.Checkpoints(tmp_path, 1)
    assert checkpoints.load() is None and "is not used" not in capsys.readouterr().out
    checkpoints.prune(0)
    assert foreign.exists() and not checkpoints.paths()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(UserError, match="results.json: can't be written: .*No space left"):
        with detox_ppo.atomic_write(path) as partial:
            partial.write_text("ne")
            raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


# Memory


def test_out_of_memory_names_the_options_to_lower(undisturbed, forked, tmp_path):
    run = forked.run([*undisturbed.args, "--sft_steps", "0"], tmp_path, [FAST, ["forks:short_of_memory", {}]])
    assert run.code == 2 and "Traceback" not in run.output
    assert "Out of memory: lower --mini_batch_size" in run.error and "output_max_length" in run.error


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, bytearray])
def test_every_kind_of_out_of_memory(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate(2**58)
    for failure in (error.value, torch.OutOfMemoryError("CUDA out of memory.")):
        assert "Out of memory: lower --mini_batch_size" in detox_ppo.explain(failure)


def test_bugs_are_not_explained_as_user_errors():
    assert detox_ppo.explain(ValueError("a bug")) is None
    assert detox_ppo.explain(RuntimeError("CUDA error: operation not permitted")) is None  # no file is at fault


@pytest.mark.parametrize(
    "error",
    [
        OSError(1, "Operation not permitted"),
        OSError(116, "Stale file handle", "metrics.jsonl"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_failing_disk_is_one_line(error):
    assert detox_ppo.explain(error).endswith(f"{detox_ppo.RESUME_HINT}.")


def test_a_bug_while_loading_keeps_its_stack_trace():
    with pytest.raises(AttributeError), detox_ppo.as_user_error("x", "model_name"):
        detox_ppo.plain_texts(None, None)
    with (
        pytest.raises(UserError, match="--config x: can't be loaded: KeyError"),
        detox_ppo.as_user_error("x", "config"),
    ):
        raise KeyError("of a library")


def test_debug_shows_the_stack_trace_before_the_line(capsys, monkeypatch):
    monkeypatch.setenv("DETOX_DEBUG", "1")
    with pytest.raises(SystemExit):
        detox_ppo.main(["--seed", "x"])
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1].startswith("detox_ppo.py: error: --seed is 'x'")


# Numbers


@pytest.fixture
def broken_steps(monkeypatch):
    """Breaks steps of a run. faults: kind of fault by step; weights: weights after each step."""
    record = SimpleNamespace(faults={}, weights={})
    fault, losses = "", 0
    ppo_step, scores, decode, loss = (
        detox_ppo.ppo_step,
        detox_ppo.ToxicityClassifier.scores,
        detox_ppo.Policy.decode,
        detox_ppo.policy_loss,
    )

    def broken_step(policy, tokenizer, classifier, optimizer, batch, step, *args):
        nonlocal fault, losses
        fault, losses = record.faults.get(step, ""), 0
        metrics = ppo_step(policy, tokenizer, classifier, optimizer, batch, step, *args)
        fault = ""  # the evaluation is not broken
        record.weights[step] = {name: tensor.clone() for name, tensor in policy.adapters().items()}
        return metrics

    def broken(kind, value, where):
        """value, with one number replaced if the step has this kind of fault."""
        if fault.startswith(kind):
            value = value.clone()
            value[where] = float(fault.removeprefix(kind))
        return value

    def broken_decode(*args, **kwargs):
        outputs = decode(*args, **kwargs)
        outputs.logits = broken("logit ", outputs.logits, (..., 7))
        return outputs

    def broken_loss(*args):
        nonlocal losses
        (value, stats), losses = loss(*args), losses + 1
        if fault.startswith("loss ") or fault.startswith("late loss ") and losses > 1:
            value = value * float(fault.split()[-1])
        return value, stats

    monkeypatch.setattr(detox_ppo, "ppo_step", broken_step)
    monkeypatch.setattr(detox_ppo.ToxicityClassifier, "scores", lambda *a: broken("score ", scores(*a), 0))
    monkeypatch.setattr(detox_ppo.Policy, "decode", broken_decode)
    monkeypatch.setattr(detox_ppo, "policy_loss", broken_loss)
    return record


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_non_finite_numbers_change_no_weight(broken_steps, small_config, tmp_path, capsys):
    kinds = ["score nan", "score inf", "score -inf", "logit nan", "logit inf", "loss nan", "loss inf", "late loss nan"]
    faults, steps = broken_steps.faults, range(1, 14)
    faults.update(zip([step for step in steps if step % 3 != 1], kinds, strict=True))  # two, then a good step
    options = {"max_ppo_steps": len(steps), "eval_samples": 1}
    options |= {"learning_rate": 1e-3, "save_steps": 1, "save_total_limit": 99}
    results = detox_ppo.run(small_config(output_dir=tmp_path, **options))
    lines = metrics_of(tmp_path)
    skipped = [step for step in faults if not faults[step].startswith("late")]  # a late fault skips one minibatch
    assert [line["ppo/skipped_steps"] for line in lines] == [step in skipped for step in steps]
    assert lines[11]["ppo/skipped_minibatches"] == 1 and lines[12]["ppo/skipped_minibatches"] == 0
    assert results["warnings"]["not finite"].startswith("7 of 13 steps were skipped")
    printed = capsys.readouterr().out
    assert "step 2: skipped, not finite: scores\n" in printed and "step 9: skipped, not finite: gradients\n" in printed
    assert all(math.isfinite(value) for line in lines for value in line.values())
    coefficients, weights = [line["objective/kl_coef"] for line in lines], broken_steps.weights
    for step in steps[1:]:
        before = coefficients[step - 2], weights[step - 1]
        # A step learns from the minibatches before the broken one.
        learned = faults.get(step, "none").startswith(("none", "late"))
        assert same(weights[step], before[1]) != learned, (step, faults)
        assert (coefficients[step - 1] == before[0]) == (step - 1 in skipped)
    assert all(tensor.isfinite().all() for tensor in weights[13].values())
    # Adam's state ignores them: two updates in each of the five good steps, one before the late fault.
    newest = content(tmp_path / "checkpoint-13.pt")
    assert {int(state["step"]) for state in newest["optimizer"]["state"].values()} == {2 * 5 + 1}
    for state in newest["optimizer"]["state"].values():
        assert state["exp_avg"].isfinite().all() and state["exp_avg_sq"].isfinite().all()
    saved = {int(re.search(r"\d+", name)[0]) for name in checkpoints_of(tmp_path)}
    assert saved == {0, *steps} - set(skipped)


def test_three_skipped_steps_in_a_row_stop_the_run_at_the_last_good_state(broken_steps, small_config, tmp_path):
    broken_steps.faults.update({2: "logit nan", 3: "score inf", 4: "loss nan"})
    options = {"max_ppo_steps": 9, "save_steps": 1, "eval_samples": 1}
    with pytest.raises(UserError, match="step 4: three steps in a row gave numbers that are not finite.*float32"):
        detox_ppo.run(small_config(output_dir=tmp_path, **options))
    assert checkpoints_of(tmp_path)[0] == "checkpoint-1.pt"
    saved = content(tmp_path / "checkpoint-1.pt")["weights"]
    assert same(saved, broken_steps.weights[1]) and all(tensor.isfinite().all() for tensor in saved.values())
    assert len(metrics_of(tmp_path)) == 4 and not (tmp_path / "results.json").exists()


def test_a_model_without_finite_logits_is_an_error(small_config, tiny, tmp_path):
    """Reported before the first step, in one line."""
    shutil.copytree(tiny / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="--model_name .*: the logits are not finite"):
        detox_ppo.run(small_config(model_name=tmp_path / "base", output_dir=tmp_path / "run", eval_samples=1))


# Two runs, and signals


def wait_until_stopped(pid):
    deadline = time.monotonic() + 120
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "the run did not reach its stopping point"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it looks into /proc")
def test_a_second_run_in_the_same_directory_is_an_error_while_the_first_runs(undisturbed, forked, tmp_path):
    first = forked.start(undisturbed.args, tmp_path, [strike("sampling", 3, "SIGSTOP")])
    wait_until_stopped(first.pid)
    (tmp_path / "output").rename(tmp_path / "first")
    for args in (undisturbed.args, [*undisturbed.args, "--resume"]):
        second = forked.run(args, tmp_path, [FAST])
        assert second.code == 2
        assert second.output == (
            "detox_ppo.py: error: --output_dir run: another run is using it; choose another directory\n"
        )
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = forked.run([*undisturbed.args, "--resume"], tmp_path, [FAST])
    assert third.code == 0 and differences(undisturbed.left, left(tmp_path / "run")) == []


@pytest.mark.parametrize(
    "point, code, newest",
    [
        (("sampling", 10, "SIGTERM"), 0, "checkpoint-5.pt"),
        (("update", 8, "SIGINT"), 130, "checkpoint-5.pt"),
        (("checkpoint", 1, "SIGTERM"), 0, "checkpoint-3.pt"),
        (("checkpoint", 5, "SIGTERM"), 0, "checkpoint-6.pt"),
        (("tuning", 5, "SIGTERM"), 0, "checkpoint-2.pt"),
        (("evaluation", 15, "SIGINT"), 130, "checkpoint-3.pt"),
        (("final evaluation", 10, "SIGTERM"), 0, "checkpoint-6.pt"),
    ],
)
def test_a_signal_leaves_a_checkpoint_of_the_current_step(point, code, newest, undisturbed, forked, tmp_path):
    """save_steps is large, so there is no other checkpoint. Resuming from it gives the same run."""
    args = [*undisturbed.args, "--save_steps", "100"]
    stopped = forked.run(args, tmp_path, [strike(*point)])
    assert stopped.code == code and "Traceback" not in stopped.output
    assert stopped.error.startswith(f"stopped by {point[2]}; the same command with --resume continues")
    assert checkpoints_of(tmp_path / "run")[0] == newest
    resumed = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert resumed.code == 0 and f"resuming from run/{newest}" in resumed.output
    changed = differences(undisturbed.left, left(tmp_path / "run"))
    # save_steps changes which checkpoints exist, and the configuration in results.json.
    assert [name for name in changed if not name.startswith("checkpoint-")] == ["results.json"]


def test_a_second_signal_stops_the_run_at_once(undisturbed, forked, tmp_path):
    run = forked.run(undisturbed.args, tmp_path, [strike("sampling", 10, "SIGINT", "SIGINT")])
    assert run.code == 130 and "stopping after the current step" in run.output
    assert checkpoints_of(tmp_path / "run")[0] == "checkpoint-4.pt"  # step 2 was running


def test_ctrl_c_at_any_moment(tmp_path, undisturbed, forked):
    """Sent from outside at an arbitrary point of a step."""
    args = [*undisturbed.args, "--max_ppo_steps", "10000", "--save_steps", "100000", "--sft_steps", "0"]
    run = forked.start(args, tmp_path, [FAST])
    wait_for_steps(tmp_path / "run", 2)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == 130 and "Traceback" not in run.output
    step = detox_ppo.Checkpoints(tmp_path / "run", 1).load()["state"].step
    assert step >= 2 and step == metrics_of(tmp_path / "run")[-1]["step"]
