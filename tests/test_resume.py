"""A run that was stopped at any point and resumed ends as one that was never stopped."""

import json
import shutil
from pathlib import Path

import kill_points
import pandas as pd
import pytest
from kill_points import FAST, arguments, differences, left, strike

import detox_ppo

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def copy(undisturbed, tmp_path):
    """The undisturbed run's directory, to be damaged; as if the run had not come to its end."""
    shutil.copytree(undisturbed.directory, tmp_path / "copy")
    (tmp_path / "copy" / "run" / "results.json").unlink()
    return tmp_path / "copy"


def complaint(args, capsys):
    """What main says of a mistake, before anything is loaded."""
    with pytest.raises(SystemExit) as end:
        detox_ppo.main(args)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_kill_points(forked, tmp_path):
    """A few of them: python tests/kill_points.py runs through 132."""
    found = kill_points.main(11, forked, tmp_path, sft_steps=2, max_ppo_steps=2)
    assert found["lost"] == [] and found["survived"] == found["points"] == 11 and found["kills"] >= 11
    assert all(row["points"] for row in found["phases"].values())


def test_points_are_spread_over_the_phases():
    chosen = kill_points.choose({"a": 1, "b": 100, "c": 10}, 21)
    assert len(set(chosen)) == 21
    assert [point for point in chosen if point[0] == "a"] == [("a", 1)]
    assert [number for phase, number in chosen if phase == "b"] == [6, 16, 26, 36, 46, 56, 66, 76, 86, 96]
    assert [number for phase, number in chosen if phase == "c"] == list(range(1, 11))


# Which checkpoint


def test_a_torn_checkpoint_is_reported_and_the_one_before_is_used(undisturbed, copy, forked):
    torn = copy / "run" / "checkpoint-3" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-1])
    run = forked.run([*undisturbed.args, "--resume"], copy, [FAST])
    assert run.code == 0
    assert "warning: run/checkpoint-3 is not used: optimizer.pt is damaged" in run.output
    assert "going on from run/checkpoint-2" in run.output
    assert differences(undisturbed.left, left(copy / "run")) == []


def test_every_damage_of_a_checkpoint_is_found(undisturbed, tmp_path):
    whole = undisturbed.directory / "run" / "checkpoint-3"
    assert detox_ppo.damage(whole) is None
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(names) == 8
    for name in names:
        for kind in ("truncated", "emptied", "missing", "one bit"):
            broken = tmp_path / "checkpoint-3"
            shutil.copytree(whole, broken)
            content = bytearray((broken / name).read_bytes())
            content[len(content) // 2] ^= 1
            path = broken / name
            if kind == "missing":
                path.unlink()
            else:
                path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b""}.get(kind, content))
            assert detox_ppo.damage(broken), (name, kind)
            shutil.rmtree(broken)


def test_a_damaged_checkpoint_that_was_named_is_refused(copy, undisturbed, capsys, monkeypatch):
    (copy / "run" / "checkpoint-3" / "state.json").write_text("{}")
    monkeypatch.chdir(copy)
    for name, reason in (
        ("run/checkpoint-3", "state.json is damaged"),
        ("run/checkpoint-9", "there is no such directory"),
        ("run/adapter", "or it is no checkpoint of a run"),
    ):
        assert reason in complaint([*undisturbed.args, "--resume", name], capsys)


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(copy, undisturbed, capsys, monkeypatch):
    """The disk may come back; what is damaged is replaced."""
    (copy / "run" / "checkpoint-3" / "checksums.json").unlink()
    (copy / "run" / "checkpoint-3" / "checksums.json").mkdir()  # no permission binds whoever runs this as root
    monkeypatch.chdir(copy)
    line = complaint([*undisturbed.args, "--resume"], capsys)
    assert "run/checkpoint-3 can't be read: " in line and "Is a directory" in line


def test_where_no_checkpoint_is_whole_a_resume_starts_from_the_beginning(undisturbed, copy, forked):
    """As on a new machine, to which a part of the only checkpoint came."""
    shutil.rmtree(copy / "run" / "checkpoint-2")
    (copy / "run" / "checkpoint-3" / "optimizer.pt").unlink()
    run = forked.run([*undisturbed.args, "--resume"], copy, [FAST])
    assert run.code == 0
    assert "run/checkpoint-3 is not used: optimizer.pt is missing" in run.output
    assert "no whole checkpoint in run, starting from the beginning" in run.output
    assert differences(undisturbed.left, left(copy / "run")) == []


def test_a_named_checkpoint_is_gone_on_from(undisturbed, copy, forked):
    run = forked.run([*undisturbed.args, "--resume", "run/checkpoint-2"], copy, [FAST])
    assert run.code == 0 and "step    2/3" not in run.output and "step    3/3" in run.output
    assert differences(undisturbed.left, left(copy / "run")) == []


def test_a_resume_before_the_first_checkpoint_starts_from_the_beginning(small_config, tmp_path, capsys):
    assert detox_ppo.choose_checkpoint(small_config(resume="true"), tmp_path, False) is None
    assert "starting from the beginning" in capsys.readouterr().out
    assert detox_ppo.choose_checkpoint(small_config(), tmp_path, False) is None


# Which run


def test_another_configuration_is_refused_with_the_options_that_differ(undisturbed, copy, capsys, monkeypatch):
    monkeypatch.chdir(copy)
    line = complaint([*undisturbed.args, "--resume", "--seed", "7", "--learning_rate", "0.5"], capsys)
    assert "seed was 0 and is 7" in line and "learning_rate was 0.001 and is 0.5" in line and "batch_size" not in line
    line = complaint([*undisturbed.args, "--resume", "--max_ppo_steps", "2"], capsys)
    assert "checkpoint-3: it is beyond --max_ppo_steps 2" in line


def test_every_option_either_may_change_or_is_refused(undisturbed, small_config):
    """What may change is what the steps up to the checkpoint don't depend on."""
    checkpoint = undisturbed.directory / "run" / "checkpoint-3"
    same = json.loads((checkpoint / "state.json").read_text())["config"]
    assert same.keys() == vars(small_config()).keys()
    free = set(detox_ppo.MAY_CHANGE.split())
    assert free == {"resume", "output_dir", "save_steps", "save_total_limit", "max_ppo_steps", "compare_samples"} | {
        "report_to",
        "dynamodb_table",
        "gradient_checkpointing",  # the same gradients, bit by bit
    }
    for name in same:
        changed = detox_ppo.DetoxConfig(**same | {name: 99 if name != "max_ppo_steps" else 4})
        if name in free:
            assert detox_ppo.read_state(checkpoint, changed)["step"] == 3
        else:
            with pytest.raises(detox_ppo.UserError, match=f"options: {name} was"):
                detox_ppo.read_state(checkpoint, changed)


def test_changed_data_is_refused(undisturbed, forked, tmp_path):
    """The same path, as the run knows it, with one human summary changed."""
    shutil.copytree(undisturbed.dialogues, tmp_path / "data")
    args = arguments("data", sft_steps=0)
    assert forked.run(args, tmp_path, [strike("update", 3)]).code == -9
    table = pd.read_csv(tmp_path / "data" / "train.csv")
    table.loc[3, "summary"] += " Or not."
    table.to_csv(tmp_path / "data" / "train.csv", index=False)
    run = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert run.code == 2 and "models or data have changed since: dataset fingerprint was" in run.error


def test_another_commit_of_a_model_is_refused(undisturbed, copy, capsys, monkeypatch):
    state = copy / "run" / "checkpoint-3" / "state.json"
    told = json.loads(state.read_text())
    assert told["commits"]["model_name"] is None  # local directories have none
    monkeypatch.chdir(copy)
    monkeypatch.setattr(detox_ppo, "hub_commit", lambda *_: "c0ffee")
    with pytest.raises(SystemExit):
        detox_ppo.main([*undisturbed.args, "--resume"])
    assert "models or data have changed since: commits was" in capsys.readouterr().err


def test_an_unfinished_run_is_not_overwritten(undisturbed, copy, capsys, monkeypatch):
    monkeypatch.chdir(copy)
    line = complaint(undisturbed.args, capsys)
    assert "run holds an unfinished run (checkpoint-3): --resume, without a name, goes on with it" in line
    # Nor by a run that goes on from elsewhere.
    shutil.copytree(undisturbed.directory / "run" / "checkpoint-2", copy / "elsewhere" / "checkpoint-2")
    assert "holds an unfinished run" in complaint([*undisturbed.args, "--resume", "elsewhere/checkpoint-2"], capsys)


def test_a_finished_run_may_be_done_anew_and_that_one_resumed(undisturbed, forked, tmp_path):
    """With another seed in the same directory, killed while it tunes: what is resumed is the new run."""
    shutil.copytree(undisturbed.directory, tmp_path / "again")
    args = [*undisturbed.args, "--seed", "1"]
    fresh = forked.start(args, tmp_path / "fresh", [FAST])
    killed = forked.run(args, tmp_path / "again", [strike("tuning", 8)])
    assert killed.code == -9 and fresh.wait() == 0
    resumed = forked.run([*args, "--resume"], tmp_path / "again", [FAST])
    assert resumed.code == 0 and "going on from run/sft_checkpoint/checkpoint-" in resumed.output
    expected = left(tmp_path / "fresh" / "run")
    assert differences(expected, left(tmp_path / "again" / "run")) == []
    assert "adapter/adapter_model.safetensors" in differences(expected, undisturbed.left)


def test_more_steps_by_a_resume_are_the_longer_run(undisturbed, forked, tmp_path):
    short = forked.run([*undisturbed.args, "--max_ppo_steps", "2"], tmp_path, [FAST])
    assert short.code == 0
    # It counts as unfinished from its first new step on, though it had been finished before.
    killed = forked.run([*undisturbed.args, "--resume"], tmp_path, [strike("update", 2)])
    assert killed.code == -9 and not (tmp_path / "run" / "results.json").exists()
    resumed = forked.run([*undisturbed.args, "--resume"], tmp_path, [FAST])
    assert resumed.code == 0 and "going on from run/checkpoint-2" in resumed.output
    # The older checkpoint tells of the shorter run.
    assert differences(undisturbed.left, left(tmp_path / "run")) == ["checkpoint-2/state.json"]


# What is kept


def test_only_the_newest_checkpoints_are_kept(tmp_path, capsys):
    for name in (
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-10",
        "checkpoint-x",
        ".checkpoint-5.partial",
    ):
        (tmp_path / name).mkdir()
    detox_ppo.prune_checkpoints(tmp_path, step=4, limit=2)  # 10 is of a run that went on from 2 again
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-x"}
    detox_ppo.prune_checkpoints(tmp_path, step=4, limit=1)
    assert [path.name for path in detox_ppo.find_checkpoints(tmp_path)] == ["checkpoint-4"]
    assert capsys.readouterr().out == ""


def test_a_finished_run_leaves_its_results_and_as_many_checkpoints_as_it_may(undisturbed):
    assert {name for name in undisturbed.left if "/" not in name} == {
        ".lock",
        "README.md",
        "adapter",
        "checkpoint-2",
        "checkpoint-3",
        "comparison.csv",
        "metrics.jsonl",
        "results.json",
        "sft_adapter",
        "toxicity.png",
        "training.png",
    }
    assert [line["step"] for line in undisturbed.left["metrics.jsonl"]] == [1, 2, 3]


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    """While it is written its name is not a checkpoint's, and what was under the name stays until then."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "old").touch()
    with detox_ppo.written_aside(tmp_path / "checkpoint-1") as aside:
        aside.mkdir()
        (aside / "new").touch()
        assert [path.name for path in detox_ppo.find_checkpoints(tmp_path)] == ["checkpoint-1"]
        assert (tmp_path / "checkpoint-1" / "old").exists()
    assert [path.name for path in Path(tmp_path).rglob("*")] == ["checkpoint-1", "new"]
