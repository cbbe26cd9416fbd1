"""Nothing that is loaded is run, nothing is written where it does not belong, and every dependency is pinned."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import CLASSIFIER, DIALOGUES, StandInHub, small_repositories
from safetensors.torch import load_file

from detox_ppo import main

pytestmark = pytest.mark.usefixtures("quick")


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny"
PARTS = {"model_name": "base", "adapter_name": "adapter", "reward_model_name": "classifier"}


class Trap:
    """Unpickling this creates a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path):
    path = tmp_path / "trap"
    pickle.loads(pickle.dumps(Trap(path)))
    assert path.exists()  # so the trap works
    path.rmdir()
    return path


def refusal(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    (found,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("detox_ppo.py: error: ")]
    return found


def copied(option, tmp_path):
    return Path(shutil.copytree(TINY / PARTS[option], tmp_path / PARTS[option]))


# Pickles


@pytest.mark.parametrize("forced", [False, True], ids=["", "with torch told to trust"])
@pytest.mark.parametrize("option", PARTS)
def test_pickle_that_runs_code_is_refused(option, forced, trap, tmp_path, small_arguments, capsys, monkeypatch):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    directory = copied(option, tmp_path)
    (weights,) = directory.glob("*.safetensors")
    name = "adapter_model.bin" if option == "adapter_name" else "pytorch_model.bin"
    torch.save(load_file(weights) | {"trap": Trap(trap)}, directory / name)
    weights.unlink()
    message = refusal(small_arguments(**{option: directory, "output_dir": tmp_path / "run"}), capsys)
    assert not trap.exists()
    assert f"--{option} {directory}" in message and "pickle" in message and "safetensors" in message


@pytest.mark.parametrize("option", ["model_name", "reward_model_name"])
def test_pickle_of_tensors_alone_is_read(option, tmp_path, small_arguments):
    directory = copied(option, tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    main(small_arguments(**{option: directory, "output_dir": tmp_path / "run", "max_ppo_steps": 0}))
    assert (tmp_path / "run" / "results.json").exists()


# Code that comes with a model

CODE = "import os\nos.mkdir({!r})\nclass Anything:\n    pass\n"
AUTO = "AutoConfig AutoTokenizer AutoModel AutoModelForSeq2SeqLM AutoModelForSequenceClassification".split()


@pytest.mark.parametrize(
    "option, model_type",
    [(option, None) for option in PARTS] + [("model_name", "invented"), ("reward_model_name", "invented")],
)
def test_code_beside_a_model_is_not_run(option, model_type, trap, tmp_path, small_arguments, capsys, monkeypatch):
    directory = copied(option, tmp_path)
    (directory / "evil.py").write_text(CODE.format(str(trap)))
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        path = directory / name
        if path.exists():
            content = json.loads(path.read_text()) | {"auto_map": {kind: "evil.Anything" for kind in AUTO}}
            if model_type and name == "config.json":
                content["model_type"] = model_type
            path.write_text(json.dumps(content))
    # Somebody at the keyboard, or a pipe, says yes to whatever is asked.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    args = small_arguments(**{option: directory, "output_dir": tmp_path / "run", "max_ppo_steps": 0})
    if model_type:  # a kind that only the code knows
        assert str(directory) in refusal(args, capsys)
    else:
        main(args)
        assert (tmp_path / "run" / "results.json").exists()
    assert not trap.exists()


def test_nothing_trusts_remote_code():
    """The word stands in the sources only to forbid it, and wherever transformers might ask for it."""
    for path in (ROOT / "detox_ppo.py", *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "checkpoints").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if (
                path.name == "detox_ppo.py"
                and isinstance(node, ast.Call)
                and ast.unparse(node.func).startswith("Auto")
            ):
                assert "trust_remote_code=False" in ast.unparse(node), ast.unparse(node)
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "pickle.load")), path


def test_script_of_a_dataset_is_not_run(trap, tmp_path):
    """A repository of dialogues that is a program, as they once could be, and a pickle."""
    models, datasets = small_repositories(tmp_path / "repositories", TINY)
    repository = datasets[DIALOGUES]
    (repository / "train.csv").unlink()
    (repository / "dialogsum.py").write_text(CODE.format(str(trap)))
    (repository / "train.pkl").write_bytes(pickle.dumps(Trap(trap)))
    with StandInHub(models, datasets) as hub:
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, str(ROOT / "detox_ppo.py"), "--output_dir", "run"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and f"--dataset_name {DIALOGUES}" in done.stderr and "Traceback" not in done.stderr
    assert not trap.exists()


# Where a run writes


def test_a_run_writes_into_its_output_directory_alone(tmp_path):
    """Whatever the configuration names: beside the output only the libraries' caches, which the environment places."""
    models, datasets = small_repositories(tmp_path / "served", TINY)
    work = tmp_path / "a" / "b" / "work"
    work.mkdir(parents=True)
    shutil.copytree(TINY, work / "world")
    config = work / "config.yaml"
    options = {
        "model_name": "world/../world/base",
        "adapter_name": "../work/world/adapter",
        "reward_model_name": CLASSIFIER,
        "dataset_name": "world/dialogues/../dialogues/train.csv",
        "report_to": "tensorboard",
        "output_dir": "out",
        "sft_steps": 1,
        **{"max_ppo_steps": 1, "batch_size": 2, "mini_batch_size": 1, "eval_samples": 2, "dtype": "float32"},
        **{"output_min_length": 4, "output_max_length": 6, "eval_max_new_tokens": 6, "device": "cpu"},
    }
    config.write_text(json.dumps(options))

    def contents():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    with StandInHub(models, datasets) as hub:
        environment = hub.environment(tmp_path / "caches" / "hub")
        places = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "xdg", "MPLCONFIGDIR": "matplotlib"}
        for name, folder in places.items():
            (tmp_path / "caches" / folder).mkdir(parents=True, exist_ok=True)
            environment[name] = str(tmp_path / "caches" / folder)
        command = [sys.executable, "-B", str(ROOT / "detox_ppo.py"), "--config", "config.yaml"]
        done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    changed = [path for path, when in contents().items() if before.get(path) != when]
    assert (work / "out" / "results.json") in changed
    strays = [path for path in changed if not path.is_relative_to(work / "out")]
    assert not [path for path in strays if not path.is_relative_to(tmp_path / "caches")]
    assert not list((tmp_path / "caches" / "tmp").rglob("*.json"))


# Dependencies


def test_every_dependency_is_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+(\[\w+\])?==\d+(\.\d+)*", line), line
