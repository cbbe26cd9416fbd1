"""A simulated SageMaker training job: its variables, directories, SIGTERM and restart."""

import json
import shutil
from types import SimpleNamespace

import pytest
from kill_points import FAST, left

import detox_ppo


@pytest.fixture
def container(tmp_path, undisturbed):
    """The content of /opt/ml and the environment variables of a container."""
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
    """The command-line flags that the SageMaker training toolkit creates: sorted, with str() of each value."""
    pairs = sorted(hyperparameters.items())
    return [part for name, value in pairs for part in (f"--{name}", "" if value is None else str(value))]


@pytest.fixture
def job(undisturbed):
    """The undisturbed run's options as hyperparameters; the job sets the directories."""
    given = dict(zip(undisturbed.args[::2], undisturbed.args[1::2], strict=True))
    given = {name.removeprefix("--"): value for name, value in given.items()}
    del given["output_dir"], given["dataset_name"]
    return flags(given | {"adaptive_kl": True})


def test_a_restarted_job_matches_an_uninterrupted_run(container, job, undisturbed, forked):
    watch = {"phase": "update", "number": 7, "root": str(container.ml), "signals": ["SIGTERM"]}
    code = container.ml / "code"
    stopped = forked.run(job, code, [container.prepare, ["kill_points:watch", watch]], container.env)
    assert stopped.code == 0, stopped.output
    assert stopped.error.startswith("stopped by SIGTERM")
    synced = {path.name for path in (container.ml / "checkpoints").glob("*.pt")}
    assert "checkpoint-5.pt" in synced and "checkpoint-6.pt" not in synced
    assert not (container.ml / "output" / "failure").exists()

    # A new machine with the same command, and with the checkpoints only.
    for name in ("model", "output"):
        shutil.rmtree(container.ml / name)
    (container.ml / "model").mkdir()
    (container.ml / "output" / "data").mkdir(parents=True)
    again = forked.run(job, code, [container.prepare, FAST], container.env)
    assert again.code == 0, again.output
    assert f"resuming from {container.ml}/checkpoints/checkpoint-5.pt" in again.output
    model, data = left(container.ml / "model"), left(container.ml / "output" / "data")
    pictures = {"training.png", "toxicity.png"}
    adapters = {name for name in undisturbed.left if name.startswith(("adapter", "sft_adapter"))}
    assert model.keys() - {".lock"} == adapters | pictures | {"README.md"}
    assert data.keys() - {".lock"} == pictures | {"results.json", "metrics.jsonl", "comparison.csv"}
    for name in [*adapters, "metrics.jsonl", "comparison.csv"]:
        assert (model | data)[name] == undisturbed.left[name], name
    results, expected = data["results.json"], undisturbed.left["results.json"]
    assert results == expected | {"config": expected["config"] | directories(container)}


def directories(container):
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


def test_directories_of_a_job(container, monkeypatch, tmp_path):
    def chosen(*args):
        return vars(detox_ppo.parse_config([*args]))

    without = chosen()
    in_process(container, monkeypatch)
    assert chosen() == without | directories(container) | {"resume": True}
    # The job overrides the file, and flags override both.
    (tmp_path / "options.yaml").write_text("output_dir: elsewhere\ndataset_name: other\nresume: false\n")
    assert chosen("--config", str(tmp_path / "options.yaml")) == without | directories(container) | {"resume": True}
    flags = ["--output_dir=a", "--dataset_name", "b", "--model_dir", "c", "--checkpoint_dir", "d", "--resume", "False"]
    given = {"output_dir": "a", "dataset_name": "b", "model_dir": "c", "checkpoint_dir": "d", "resume": False}
    assert chosen(*flags) == without | given
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
def test_list_formats(text):
    assert detox_ppo.parse_config(["--lora_target_modules", text]).lora_target_modules == ["q", "v"]
    assert detox_ppo.parse_config(["--lora_target_modules", ""]).lora_target_modules is None


def test_errors_are_written_to_the_failure_file(container, monkeypatch, capsys):
    in_process(container, monkeypatch)
    failure = container.ml / "output" / "failure"
    with pytest.raises(SystemExit) as end:
        detox_ppo.main(["--batch_size", "7"])
    assert end.value.code == 2
    assert failure.read_text() == "--batch_size 7 is not a multiple of --mini_batch_size 4"
    assert failure.read_text() in capsys.readouterr().err

    def buggy(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(detox_ppo, "parse_config", buggy)
    with pytest.raises(ValueError):
        detox_ppo.main([])
    assert "Traceback" in failure.read_text() and "ValueError: a bug" in failure.read_text()


def test_requirements_are_next_to_the_entry_point():
    """source_dir is the repository, so the toolkit installs its requirements.txt."""
    root = detox_ppo.Path(detox_ppo.__file__).parent
    assert "torch==" in (root / "requirements.txt").read_text()
    assert json.dumps("detox_ppo.py") in (root / "README.md").read_text()
