"""No loaded code is run, and every dependency is pinned.

Dataset scripts: test_hub_faults.py. Where a run writes: test_full_path.py and test_cli.py.
"""

import ast
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from hub_faults import Trap
from safetensors.torch import load_file

from detox_ppo import Checkpoints, main

pytestmark = pytest.mark.usefixtures("quick")


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny"
PARTS = {"model_name": "base", "adapter_name": "adapter", "reward_model_name": "classifier"}


@pytest.fixture
def trap(tmp_path):
    path = tmp_path / "trap"
    pickle.loads(pickle.dumps(Trap(path)))
    assert path.exists()  # the trap works
    path.rmdir()
    return path


@pytest.fixture(scope="module")
def options(small_arguments):
    """Arguments of a run that only evaluates; keywords override options."""
    return lambda **overrides: small_arguments(max_ppo_steps=0, **overrides)


def error_line(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("detox_ppo.py: error: ")]
    return message


def copied(option, tmp_path):
    return Path(shutil.copytree(TINY / PARTS[option], tmp_path / PARTS[option]))


# Pickles


@pytest.mark.parametrize("option", PARTS)
def test_pickle_that_runs_code_is_an_error(option, trap, tmp_path, options, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # makes torch trust pickles
    directory = copied(option, tmp_path)
    (weights,) = directory.glob("*.safetensors")
    name = "adapter_model.bin" if option == "adapter_name" else "pytorch_model.bin"
    torch.save(load_file(weights) | {"trap": Trap(trap)}, directory / name)
    weights.unlink()
    message = error_line(options(**{option: directory, "output_dir": tmp_path / "run"}), capsys)
    assert not trap.exists()
    assert f"--{option} {directory}" in message and "pickle" in message and "safetensors" in message


def test_pickle_of_only_tensors_is_read(tmp_path, options):
    directories = {option: copied(option, tmp_path) for option in ("model_name", "reward_model_name")}
    for directory in directories.values():
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    main(options(**directories, output_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "results.json").exists()


def test_checkpoint_that_runs_code_is_skipped(trap, tmp_path, options, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"weights": {}, "optimizer": {}, "state": {"trap": Trap(trap)}}, tmp_path / "checkpoint-1.pt")
    assert Checkpoints(tmp_path, 2).load() is None and not trap.exists()
    assert f"no valid checkpoint in {tmp_path}" in " ".join(capsys.readouterr().out.split())


# Code that comes with a model

CODE = "import os\nos.mkdir({!r})\nclass Anything:\n    pass\n"
AUTO = "AutoConfig AutoTokenizer AutoModel AutoModelForSeq2SeqLM AutoModelForSequenceClassification".split()


def with_code(option, tmp_path, trap, **changes):
    """A copy of a model with code that every configuration file requires."""
    directory = copied(option, tmp_path)
    (directory / "evil.py").write_text(CODE.format(str(trap)))
    for path in directory.glob("*config.json"):
        content = json.loads(path.read_text()) | {"auto_map": {kind: "evil.Anything" for kind in AUTO}}
        path.write_text(json.dumps(content | (changes if path.name == "config.json" else {})))
    return directory


@pytest.fixture
def yes(monkeypatch):
    """Answers every prompt with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def test_code_next_to_a_model_is_not_run(trap, tmp_path, options, yes):
    directories = {option: with_code(option, tmp_path, trap) for option in PARTS}
    main(options(**directories, output_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "results.json").exists() and not trap.exists()


@pytest.mark.parametrize("option", ["model_name", "reward_model_name"])
def test_model_that_needs_custom_code_is_an_error(option, trap, tmp_path, options, capsys, yes):
    directory = with_code(option, tmp_path, trap, model_type="invented")
    assert str(directory) in error_line(options(**{option: directory, "output_dir": tmp_path / "run"}), capsys)
    assert not trap.exists()


def test_nothing_trusts_remote_code():
    """trust_remote_code only occurs as False, and in every call of a transformers Auto class."""
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


# Dependencies


def test_every_dependency_is_pinned():
    for path in (ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"|#.*|-r .*|[\w.-]+(\[\w+\])?==\d+(\.\d+)*", line), line
