"""A SageMaker training job, played: its variables, its directories, its SIGTERM and its second start."""

import json
import shutil
from types import SimpleNamespace

import pytest
from kill_points import FAST, left

import detox_ppo


@pytest.fixture
def container(tmp_path, undisturbed):
    """What a container finds under /opt/ml, and its environment."""
    ml = tmp_path / "opt-ml"
    for name in ("checkpoints", "model", "output/data", "code"):
        (ml / name).mkdir(parents=True)
    shutil.copytree(undisturbed.dialogues, ml / "input" / "data" / "training")
    env = {
        "SM_MODEL_DIR": str(ml / "model"),
        "SM_OUTPUT_DATA_DIR": str(ml / "output" / "data"),
        "SM_CHANNEL_TRAINING": str(ml / "input" / "data" / "training"),
    }
    return SimpleNamespace(ml=ml, env=env, prepare=["forks:sagemaker", {"root": str(ml)}])


def flags(hyperparameters):
    """As the SageMaker training toolkit passes them on: sorted, each value as Python's str() writes it."""
    pairs = sorted(hyperparameters.items())
    return [part for name, value in pairs for part in (f"--{name}", "" if value is None else str(value))]


@pytest.fixture
def job(undisturbed):
    """The undisturbed run's options as a job's hyperparameters; the job itself says where things are."""
    given = dict(zip(undisturbed.args[::2], undisturbed.args[1::2], strict=True))
    given = {name.removeprefix("--"): value for name, value in given.items()}
    del given["output_dir"], given["dataset_name"]
    return flags(given | {"adaptive_kl": True})


def test_a_job_that_loses_its_machine_ends_as_one_that_kept_it(container, job, undisturbed, forked):
    watch = {"phase": "update", "number": 7, "root": str(container.ml), "signals": ["SIGTERM"]}
    code = container.ml / "code"
    stopped = forked.run(job, code, [container.prepare, ["kill_points:watch", watch]], container.env)
    assert stopped.code == 0, stopped.output
    assert stopped.error.startswith("stopped by SIGTERM")
    synced = {path.name for path in (container.ml / "checkpoints").glob("*.pt")}
    assert "checkpoint-5.pt" in synced and "checkpoint-6.pt" not in synced
    assert not (container.ml / "output" / "failure").exists()

    # The new machine has the checkpoints back and nothing else; the command is the same.
    for name in ("model", "output"):
        shutil.rmtree(container.ml / name)
    (container.ml / "model").mkdir()
    (container.ml / "output" / "data").mkdir(parents=True)
    again = forked.run(job, code, [container.prepare, FAST], container.env)
    assert again.code == 0, again.output
    assert f"going on from {container.ml}/checkpoints/checkpoint-5.pt" in again.output
    model, data = left(container.ml / "model"), left(container.ml / "output" / "data")
    pictures = {"training.png", "toxicity.png"}
    adapters = {name for name in undisturbed.left if name.startswith(("adapter", "sft_adapter"))}
    assert model.keys() - {".lock"} == adapters | pictures | {"README.md"}
    assert data.keys() - {".lock"} == pictures | {"results.json", "metrics.jsonl", "comparison.csv"}
    for name in [*adapters, "metrics.jsonl", "comparison.csv"]:
        assert (model | data)[name] == undisturbed.left[name], name
    results, expected = data["results.json"], undisturbed.left["results.json"]
    assert results == expected | {"config": expected["config"] | places(container)}


def places(container):
    return {
        "dataset_name": container.env["SM_CHANNEL_TRAINING"],
        "output_dir": container.env["SM_OUTPUT_DATA_DIR"],
        "model_dir": container.env["SM_MODEL_DIR"],
        "checkpoint_dir": str(container.ml / "checkpoints"),
    }


def in_process(container, monkeypatch):
    monkeypatch.setattr(detox_ppo, "SAGEMAKER", container.ml)
    for name, value in container.env.items():
        monkeypatch.setenv(name, value)


def test_what_a_job_says_of_its_places(container, monkeypatch, tmp_path):
    def chosen(*args):
        return vars(detox_ppo.parse_config([*args]))

    without = chosen()
    in_process(container, monkeypatch)
    assert chosen() == without | places(container) | {"resume": True}
    # It wins over the file, and flags win over both.
    (tmp_path / "options.yaml").write_text("output_dir: elsewhere\ndataset_name: other\nresume: false\n")
    assert chosen("--config", str(tmp_path / "options.yaml")) == without | places(container) | {"resume": True}
    flags = ["--output_dir=a", "--dataset_name", "b", "--model_dir", "c", "--checkpoint_dir", "d", "--resume", "False"]
    mine = {"output_dir": "a", "dataset_name": "b", "model_dir": "c", "checkpoint_dir": "d", "resume": False}
    assert chosen(*flags) == without | mine
    (container.ml / "checkpoints").rmdir()  # a job without checkpoint_s3_uri
    assert chosen()["checkpoint_dir"] is None
    monkeypatch.delenv("SM_CHANNEL_TRAINING")  # a job without a channel
    assert chosen()["dataset_name"] == "knkarthick/dialogsum"


def test_hyperparameters_of_every_type():
    given = {
        "adaptive_kl": False,
        "adapter_name": None,
        "batch_size": 8,
        "eval_samples": -1,
        "learning_rate": 1e-05,
        "lora_target_modules": ["q", "v"],
        "model_name": "google/flan-t5-base",
        "score_text": "response",
    }
    args = flags(given)
    assert args[args.index("--lora_target_modules") + 1] == "['q', 'v']" and "False" in args
    config = detox_ppo.parse_config(args)
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize("text", ['["q", "v"]', "q v", "q, v", "q,v", "['q','v']"])
def test_other_ways_to_write_a_list(text):
    assert detox_ppo.parse_config(["--lora_target_modules", text]).lora_target_modules == ["q", "v"]
    assert detox_ppo.parse_config(["--lora_target_modules", ""]).lora_target_modules is None


def test_a_failure_is_told_where_the_job_shows_it(container, monkeypatch, capsys):
    in_process(container, monkeypatch)
    failure = container.ml / "output" / "failure"
    with pytest.raises(SystemExit) as end:
        detox_ppo.main(["--batch_size", "7"])
    assert end.value.code == 2
    assert failure.read_text() == "--batch_size 7 is not a multiple of --mini_batch_size 4"
    assert failure.read_text() in capsys.readouterr().err

    def defective(*args):
        raise ValueError("a defect")

    monkeypatch.setattr(detox_ppo, "parse_config", defective)
    with pytest.raises(ValueError):
        detox_ppo.main([])
    assert "Traceback" in failure.read_text() and "ValueError: a defect" in failure.read_text()


def test_an_entry_point_finds_its_requirements_beside_it():
    """source_dir is the repository: the toolkit installs the requirements.txt that lies in it."""
    root = detox_ppo.Path(detox_ppo.__file__).parent
    assert "torch==" in (root / "requirements.txt").read_text()
    assert json.dumps("detox_ppo.py") in (root / "README.md").read_text()
