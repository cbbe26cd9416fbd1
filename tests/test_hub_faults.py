"""A hub that fails at any point, for everything that a run loads: one clear line and exit code 2.

The line contains neither the token nor the password of a URL. test_full_path.py checks the output of a finished run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_faults import BASE, FAULTS, OPTIONS, PASSWORD, PROGRAM, UNKNOWN

from detox_ppo import UserError, explain

TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The result of each fault: {(fault, repository): (exit code, messages)}. No script was run."""
    directory = tmp_path_factory.mktemp("faults")
    command = [sys.executable, str(Path(__file__).with_name("hub_faults.py")), str(directory)]
    done = subprocess.run(command, env=os.environ | {"HF_TOKEN": TOKEN}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not (directory / "trap").exists()
    assert TOKEN not in done.stdout and PASSWORD not in done.stdout
    results = map(json.loads, done.stdout.splitlines())
    return {(fault, repo_id): (code, messages) for fault, repo_id, code, messages, _ in results}


def complaint(ended, fault, repo_id, option):
    code, messages = ended[fault, repo_id]
    assert code == 2, messages
    errors = [line for line in messages.splitlines() if line.startswith("detox_ppo.py: error: ")]
    assert len(errors) == 1 and errors[0] == messages.splitlines()[-1] and "Traceback" not in messages
    assert f"--{option} {repo_id}" in errors[0]
    return errors[0]


@pytest.mark.parametrize("repo_id", OPTIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(ended, fault, repo_id):
    assert "hub at http://***@127.0.0.1:" in complaint(ended, fault, repo_id, OPTIONS[repo_id])


@pytest.mark.parametrize("option", UNKNOWN)
def test_a_missing_repository_is_named(ended, option):
    complaint(ended, f"unknown {option}", UNKNOWN[option], option)


def test_a_dataset_script_is_an_error(ended):
    complaint(ended, "program", PROGRAM, "dataset_name")


def test_an_unreachable_hub_is_an_error(ended):
    """One message with a solution, not one per retry."""
    message = complaint(ended, "gone", BASE, "model_name")
    assert ended["gone", BASE][1].splitlines() == [message]
    for word in ("HF_ENDPOINT", "HF_HUB_OFFLINE=1", "python detox_ppo.py --config checkpoints/tiny/config.yaml"):
        assert word in message


@pytest.mark.parametrize(
    "text",
    [
        "https://me:{}@host/path",
        "https://host/x?a=1&X-Amz-Signature={}&b=2",
        "https://host/x?access_token={}",
        "refused hf_{}abcdefghijklmnopqrstuvwxyzAB",
    ],
)
def test_masking(text):
    masked = str(UserError(f"before {text.format('s3cret')} after"))
    assert "s3cret" not in masked and "***" in masked and masked.startswith("before ") and masked.endswith(" after")


def test_masking_of_library_errors():
    message = explain(OSError("Permission denied: https://me:s3cret@host/x?token=s3cret"))
    assert "Permission denied" in message and "s3cret" not in message


def test_text_without_secrets_is_not_masked():
    plain = "Set HF_ENDPOINT or HF_HUB_OFFLINE=1, see https://host/path?page=2 and mail me@host"
    assert str(UserError(plain)) == plain
