"""A hub that fails, at any point and for anything that a run loads: one line that says what, exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import ADAPTER, StandInHub, hub_environment, small_repositories
from hub_faults import FAULTS, OPTIONS, PASSWORD, ROOT, UNKNOWN

TINY = ROOT / "checkpoints" / "tiny"


SECRETS = {
    "HF_TOKEN": "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "SOME_PASSWORD": "correct-horse",
    # The libraries tell of every request.
    "HF_HUB_VERBOSITY": "debug",
    "TRANSFORMERS_VERBOSITY": "debug",
}


def no_secret_in(told):
    for secret in (*list(SECRETS.values())[:-2], PASSWORD):
        assert secret not in told


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What each fault came to: {(fault, repository): (exit code, messages)}."""
    directory = tmp_path_factory.mktemp("faults")
    command = [sys.executable, str(Path(__file__).with_name("hub_faults.py")), str(directory)]
    done = subprocess.run(command, env=os.environ | SECRETS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    no_secret_in(done.stdout + done.stderr)
    assert "***@127.0.0.1" in done.stdout
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


# Secrets

FEW = [
    *("--max_ppo_steps", "1", "--batch_size", "2", "--mini_batch_size", "1", "--eval_samples", "2"),
    *("--output_min_length", "4", "--output_max_length", "6", "--eval_max_new_tokens", "6", "--dtype", "float32"),
    *("--adapter_name", ADAPTER, "--report_to", "tensorboard", "--output_dir", "out"),
]


def test_no_secret_is_told_or_written(tmp_path):
    """By a run that succeeds; ended looks for them in all that fail."""
    repositories = small_repositories(tmp_path / "repositories", TINY)
    with StandInHub(*repositories) as hub:
        url = hub.url.replace("://", f"://user:{PASSWORD}@")
        environment = hub_environment(url, tmp_path / "home") | SECRETS
        command = [sys.executable, ROOT / "detox_ppo.py", *FEW]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    no_secret_in(done.stdout + done.stderr)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"results.json", "README.md"} <= {path.name for path in files}
    for path in files:
        no_secret_in(path.read_bytes().decode(errors="replace"))


@pytest.mark.parametrize("where", ["environment", "token file", "URL", "query", "token"])
def test_masking(where, monkeypatch, tmp_path):
    import huggingface_hub.constants

    from detox_ppo import UserError

    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    secret = {"token": SECRETS["HF_TOKEN"]}.get(where, "s3cret+v%2Flue")
    text = {"URL": f"https://me:{secret}@host/path", "query": f"https://host/x?a=1&X-Amz-Signature={secret}&b=2"}
    message = text.get(where, f"refused {secret}")
    if where == "environment":
        monkeypatch.setenv("SOME_API_KEY", secret)
    if where == "token file":
        (tmp_path / "token").write_text(secret)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    masked = str(UserError(f"before {message} after"))
    assert secret not in masked and "***" in masked and masked.startswith("before ") and masked.endswith(" after")
    plain = "Set HF_ENDPOINT or HF_HUB_OFFLINE=1, see https://host/path?page=2 and mail me@host"
    assert str(UserError(plain)) == plain
