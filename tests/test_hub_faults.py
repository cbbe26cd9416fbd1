"""A hub that fails, at any point and for anything that a run loads: one line that says what, exit code 2.

Neither the token nor a URL's password is in it; test_full_path.py looks for them in what a run leaves that succeeds.
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
    """What each fault came to: {(fault, repository): (exit code, messages)}; none ran a program."""
    directory = tmp_path_factory.mktemp("faults")
    command = [sys.executable, str(Path(__file__).with_name("hub_faults.py")), str(directory)]
    done = subprocess.run(command, env=os.environ | {"HF_TOKEN": TOKEN}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not (directory / "trap").exists()
    assert TOKEN not in done.stdout and PASSWORD not in done.stdout
    found = map(json.loads, done.stdout.splitlines())
    return {(fault, repo_id): (code, messages) for fault, repo_id, code, messages, _ in found}


def complaint(ended, fault, repo_id, option):
    code, messages = ended[fault, repo_id]
    assert code == 2, messages
    found = [line for line in messages.splitlines() if line.startswith("detox_ppo.py: error: ")]
    assert len(found) == 1 and found[0] == messages.splitlines()[-1] and "Traceback" not in messages
    assert f"--{option} {repo_id}" in found[0]
    return found[0]


@pytest.mark.parametrize("repo_id", OPTIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(ended, fault, repo_id):
    assert "hub at http://***@127.0.0.1:" in complaint(ended, fault, repo_id, OPTIONS[repo_id])


@pytest.mark.parametrize("option", UNKNOWN)
def test_repository_that_is_not_there_is_named(ended, option):
    complaint(ended, f"unknown {option}", UNKNOWN[option], option)


def test_dialogues_that_are_a_program_are_refused(ended):
    complaint(ended, "program", PROGRAM, "dataset_name")


def test_hub_that_is_gone(ended):
    """Though all that it once served is there, it is not passed over; one message tells so, not one for each retry."""
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


def test_masking_of_a_failure_that_libraries_tell():
    told = explain(OSError("Permission denied: https://me:s3cret@host/x?token=s3cret"))
    assert "Permission denied" in told and "s3cret" not in told


def test_what_is_no_secret_is_told():
    plain = "Set HF_ENDPOINT or HF_HUB_OFFLINE=1, see https://host/path?page=2 and mail me@host"
    assert str(UserError(plain)) == plain
