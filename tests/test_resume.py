"""A run that is stopped at any point and resumed has the output of an uninterrupted run."""

import shutil
from types import SimpleNamespace

import kill_points
import pandas as pd
import pytest
import torch
from kill_points import FAST, arguments, content, differences, left, strike

import detox_ppo

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A copy of the undisturbed run's directory, to corrupt, as if the run had not finished."""
    shutil.copytree(undisturbed.directory, tmp_path / "copy")
    (tmp_path / "copy" / "run" / "results.json").unlink()
    return tmp_path / "copy"


def complaint(args, capsys):
    """The message of a user error before anything is loaded."""
    with pytest.raises(SystemExit) as end:
        detox_ppo.main(args)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_kill_points(forked, tmp_path):
    """A few points; python tests/kill_points.py tests 132."""
    options = {"sft_steps": 2, "max_ppo_steps": 2, "freeze_encoder": True, "ptx_coef": 0.5}
    found = kill_points.main(11, forked, tmp_path, **options)
    assert found["lost"] == [] and found["survived"] == found["points"] == 11 and found["kills"] >= 11
    assert all(row["points"] for row in found["phases"].values())


def test_points_are_spread_over_the_phases():
    chosen = kill_points.choose({"a": 1, "b": 100, "c": 10}, 21)
    assert len(set(chosen)) == 21
    assert [point for point in chosen if point[0] == "a"] == [("a", 1)]
    assert [number for phase, number in chosen if phase == "b"] == [6, 16, 26, 36, 46, 56, 66, 76, 86, 96]
    assert [number for phase, number in chosen if phase == "c"] == list(range(1, 11))


@pytest.mark.parametrize("number", [2, 4], ids=["half written", "in place"])
def test_the_checkpoint_before_ppo_replaces_the_last_one_of_sft(number, undisturbed, forked, tmp_path):
    """Both are checkpoint-3.pt: killed while the second is written, the first is there and the run resumes from it."""
    assert forked.run(undisturbed.args, tmp_path, [strike("checkpoint", number)]).code == -9
    (newest, *_) = detox_ppo.Checkpoints(tmp_path / "run", 9).paths()
    phase = content(newest)["state"]["phase"]
    assert (newest.name, phase) == ("checkpoint-3.pt", "sft" if number == 2 else "ppo")
    resumed = forked.run([*undisturbed.args, "--resume"], tmp_path, [FAST])
    assert resumed.code == 0 and "resuming from run/checkpoint-3.pt" in resumed.output
    assert differences(undisturbed.left, left(tmp_path / "run")) == []


# Which checkpoint


def test_a_truncated_checkpoint_is_reported_and_the_one_before_is_used(undisturbed, copy, forked):
    torn = copy / "run" / "checkpoint-6.pt"
    torn.write_bytes(torn.read_bytes()[:-1])
    run = forked.run([*undisturbed.args, "--resume"], copy, [FAST])
    assert run.code == 0
    assert "warning: run/checkpoint-6.pt is not used: " in run.output
    assert "resuming from run/checkpoint-5.pt" in run.output
    assert differences(undisturbed.left, left(copy / "run")) == []


def test_a_corrupt_checkpoint_does_not_displace_a_valid_one(undisturbed, copy, forked):
    """With save_total_limit 1 and a corrupt checkpoint of step 4, that of step 3 is kept."""
    run = copy / "run"
    (run / "checkpoint-6.pt").rename(run / "checkpoint-7.pt")
    (run / "checkpoint-7.pt").write_bytes(b"")
    args = [*undisturbed.args, "--max_ppo_steps", "4", "--save_total_limit", "1"]
    assert forked.run([*args, "--resume"], copy, [strike("update", 8)]).code == -9  # in step 4
    assert detox_ppo.Checkpoints(run, 1).load()["state"].step == 3


def test_every_corruption_is_detected(tmp_path, capsys):
    """In a checkpoint so small that one bit of every byte can be flipped."""
    checkpoints = detox_ppo.Checkpoints(tmp_path, limit=2)
    policy = SimpleNamespace(adapters=lambda: {"lora": torch.arange(40.0)})
    checkpoints.save(policy, torch.optim.Adam([torch.zeros(1)]), detox_ppo.RunState({"seed": 0}, {}))
    (path,) = checkpoints.paths()
    whole, found = path.read_bytes(), checkpoints.load()
    assert found["weights"]["lora"].equal(torch.arange(40.0)) and found["state"].config == {"seed": 0}
    corrupted = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    corrupted += [whole[:length] for length in (0, 1, 32, len(whole) // 2, len(whole) - 1)] + [whole + b"0"]
    capsys.readouterr()
    for number, damage in enumerate(corrupted):
        path.write_bytes(damage)
        assert checkpoints.load() is None, number
    printed = capsys.readouterr().out
    assert printed.count("checkpoint-0.pt is not used: it is corrupt\n") == len(corrupted)


def test_a_checkpoint_of_another_version_is_reported_and_skipped(tmp_path, capsys):
    """As one from before the field `phase`, which its default would make the start of a run."""
    checkpoints = detox_ppo.Checkpoints(tmp_path, limit=2)
    policy = SimpleNamespace(adapters=lambda: {"lora": torch.arange(4.0)})
    for step in (1, 2):
        state = detox_ppo.RunState({}, {}, phase="ppo", step=step)
        if step == 2:
            del state.phase
        checkpoints.save(policy, torch.optim.Adam([torch.zeros(1)]), SimpleNamespace(**vars(state)))
    assert checkpoints.load()["state"].step == 1
    assert "checkpoint-2.pt is not used: another version of this script wrote it" in capsys.readouterr().out


def test_an_unreadable_checkpoint_is_not_treated_as_corrupt(copy, undisturbed, capsys, monkeypatch):
    """The disk may come back, while a corrupt checkpoint is replaced."""
    (copy / "run" / "checkpoint-7.pt").mkdir()  # root ignores permissions
    monkeypatch.chdir(copy)
    line = complaint([*undisturbed.args, "--resume"], capsys)
    assert "--resume run/checkpoint-7.pt: can't be loaded: " in line and "Is a directory" in line


def test_without_a_valid_checkpoint_resume_starts_from_scratch(undisturbed, copy, forked):
    """As on a new machine with a partial copy of the only checkpoint."""
    (copy / "run" / "checkpoint-5.pt").unlink()
    (copy / "run" / "checkpoint-6.pt").write_bytes(b"")
    run = forked.run([*undisturbed.args, "--resume"], copy, [FAST])
    assert run.code == 0
    assert "run/checkpoint-6.pt is not used: " in run.output
    assert "no valid checkpoint in run, starting from scratch" in run.output
    assert differences(undisturbed.left, left(copy / "run")) == []


def test_a_copied_checkpoint_alone_can_be_resumed(undisturbed, forked, tmp_path):
    """A file that was copied is all that a new machine needs."""
    (tmp_path / "kept").mkdir()
    shutil.copy(undisturbed.directory / "run" / "checkpoint-5.pt", tmp_path / "kept")
    run = forked.run([*undisturbed.args, "--resume", "--checkpoint_dir", "kept"], tmp_path, [FAST])
    assert run.code == 0 and "step    2/3" not in run.output and "step    3/3" in run.output
    found = left(tmp_path / "run")
    assert found.pop("results.json")["config"].pop("checkpoint_dir") == "kept"
    assert sorted(path.name for path in (tmp_path / "kept").glob("*.pt")) == ["checkpoint-5.pt", "checkpoint-6.pt"]
    assert differences(undisturbed.left, found) == ["checkpoint-5.pt", "checkpoint-6.pt", "results.json"]


# Which run


def test_another_configuration_is_an_error_that_names_the_options(undisturbed, copy, capsys, monkeypatch):
    monkeypatch.chdir(copy)
    line = complaint([*undisturbed.args, "--resume", "--seed", "7", "--learning_rate", "0.5"], capsys)
    assert "seed was 0 and is 7" in line and "learning_rate was 0.001 and is 0.5" in line and "batch_size" not in line
    line = complaint([*undisturbed.args, "--resume", "--max_ppo_steps", "2"], capsys)
    assert "the checkpoint is at step 3, --max_ppo_steps 2 is below it; raise it to at least 3" in line


def test_every_option_may_change_or_is_an_error(undisturbed, small_config):
    """An option may change if the steps before the checkpoint do not depend on it."""
    free = {"resume", "output_dir", "model_dir", "checkpoint_dir", "save_steps", "save_total_limit", "max_ppo_steps"}
    free |= {"logging_steps", "report_to", "dynamodb_table", "hub_model_id", "gradient_checkpointing"}
    free |= set(detox_ppo.FROM_HUB)  # their contents are compared, wherever they lie
    checkpoints = detox_ppo.Checkpoints(undisturbed.directory / "run", 2)
    found = checkpoints.load()
    same = found["state"].config | {"resume": True}
    assert same.keys() == vars(small_config()).keys()
    for name in same:
        changed = detox_ppo.DetoxConfig(**same)
        setattr(changed, name, 99)
        if name in free:
            checkpoints.check(found, changed)
        else:
            with pytest.raises(detox_ppo.UserError, match=f"options: {name} was [^,]* and is 99$"):
                checkpoints.check(found, changed)


def test_a_checkpoint_older_than_an_option_can_be_resumed(undisturbed):
    """The missing option counts as its default; another value is another run."""
    checkpoints = detox_ppo.Checkpoints(undisturbed.directory / "run", 2)
    found = checkpoints.load()
    assert found["state"].config.pop("score_clip") is None
    same = detox_ppo.DetoxConfig(**found["state"].config | {"resume": True})
    checkpoints.check(found, same)
    same.score_clip = 2.0
    with pytest.raises(detox_ppo.UserError, match="score_clip was None and is 2.0"):
        checkpoints.check(found, same)


def test_changed_data_is_an_error(undisturbed, forked, tmp_path):
    """The same path, as the run knows it, with one human summary changed."""
    shutil.copytree(undisturbed.dialogues, tmp_path / "data")
    args = arguments("data", sft_steps=0)
    assert forked.run(args, tmp_path, [strike("update", 3)]).code == -9
    table = pd.read_csv(tmp_path / "data" / "train.csv")
    table.loc[3, "summary"] += " Or not."
    table.to_csv(tmp_path / "data" / "train.csv", index=False)
    run = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert run.code == 2 and "--resume: dataset_fingerprint changed since the run started; restore" in run.error


def test_another_commit_of_a_model_is_an_error(undisturbed, copy, capsys, monkeypatch):
    monkeypatch.chdir(copy)
    monkeypatch.setattr(detox_ppo, "contents_of", lambda name, option_name: option_name != "model_name" or "c0ffee")
    with pytest.raises(SystemExit):
        detox_ppo.main([*undisturbed.args, "--resume"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model_name, reward_model_name changed since the run started" in line


def test_an_unfinished_run_is_not_overwritten(undisturbed, copy, capsys, monkeypatch):
    monkeypatch.chdir(copy)
    line = complaint(undisturbed.args, capsys)
    assert "run holds an unfinished run (checkpoint-6.pt); use --resume to continue it" in line
    line = complaint([*undisturbed.args, "--output_dir", "elsewhere", "--checkpoint_dir", "run"], capsys)
    assert "run holds an unfinished run (checkpoint-6.pt)" in line


def test_a_finished_run_can_be_repeated_and_resumed(undisturbed, forked, tmp_path):
    """With another seed in the same directory, killed during SFT: the new run is resumed."""
    shutil.copytree(undisturbed.directory, tmp_path / "again")
    args = [*undisturbed.args, "--seed", "1"]
    fresh = forked.start(args, tmp_path / "fresh", [FAST])
    killed = forked.run(args, tmp_path / "again", [strike("tuning", 8)])
    assert killed.code == -9 and fresh.wait() == 0
    resumed = forked.run([*args, "--resume"], tmp_path / "again", [FAST])
    assert resumed.code == 0 and "resuming from run/checkpoint-2.pt" in resumed.output
    expected = left(tmp_path / "fresh" / "run")
    assert differences(expected, left(tmp_path / "again" / "run")) == []
    assert "adapter/adapter_model.safetensors" in differences(expected, undisturbed.left)


def test_resuming_with_more_steps_gives_the_longer_run(undisturbed, forked, tmp_path):
    short = forked.run([*undisturbed.args, "--max_ppo_steps", "2"], tmp_path, [FAST])
    assert short.code == 0
    # It counts as unfinished from its first new step on, though it had been finished before.
    killed = forked.run([*undisturbed.args, "--resume"], tmp_path, [strike("update", 2)])
    assert killed.code == -9 and not (tmp_path / "run" / "results.json").exists()
    resumed = forked.run([*undisturbed.args, "--resume"], tmp_path, [FAST])
    assert resumed.code == 0 and "resuming from run/checkpoint-5.pt" in resumed.output
    # The older checkpoint contains the options of the shorter run.
    assert differences(undisturbed.left, left(tmp_path / "run")) == ["checkpoint-5.pt"]


def test_a_repeated_sft_run_counts_as_unfinished(undisturbed, forked, tmp_path):
    args = [*undisturbed.args, "--max_ppo_steps", "0", "--eval_samples", "1"]
    assert forked.run(args, tmp_path, [FAST]).code == 0
    assert forked.run([*args, "--seed", "1"], tmp_path, [strike("tuning", 6)]).code == -9
    second = forked.run([*args, "--seed", "1"], tmp_path, [FAST])
    assert second.code == 2 and "run holds an unfinished run (checkpoint-" in second.error


# Retention


def test_only_the_newest_checkpoints_are_kept(tmp_path, capsys):
    kept = [f"checkpoint-{number}.pt" for number in (30, 10, 9, 4, 2)]
    others = {"checkpoint-x.pt", "checkpoint-5", "model.pt"}
    for name in (*kept, *others, ".checkpoint-7.pt.partial"):
        (tmp_path / name).touch()
    checkpoints = detox_ppo.Checkpoints(tmp_path, limit=4)
    for limit, names in ((4, kept[:4]), (1, kept[:1]), (0, [])):
        checkpoints.prune(limit)
        assert [path.name for path in checkpoints.paths()] == names
    assert {path.name for path in tmp_path.iterdir()} == others
    assert capsys.readouterr().out == ""


def test_a_finished_run_leaves_its_results_and_the_allowed_checkpoints(undisturbed):
    assert {name for name in undisturbed.left if "/" not in name} == {
        ".lock",
        "README.md",
        "adapter",
        "checkpoint-5.pt",
        "checkpoint-6.pt",
        "comparison.csv",
        "metrics.jsonl",
        "results.json",
        "sft_adapter",
        "toxicity.png",
        "training.png",
    }
    assert [line["step"] for line in undisturbed.left["metrics.jsonl"]] == [1, 2, 3]


def test_files_are_written_atomically(tmp_path):
    """A partial file does not have a checkpoint's name, and the old file stays until the new one is complete."""
    path = tmp_path / "checkpoint-1.pt"
    path.write_text("old")
    with detox_ppo.atomic_write(path) as partial:
        partial.write_text("new")
        assert detox_ppo.Checkpoints(tmp_path, 1).paths() == [path] and path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
