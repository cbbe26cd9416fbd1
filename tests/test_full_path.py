"""The default names through the real download code, against a stand-in hub that serves the small world."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub import ADAPTER, BASE, CLASSIFIER, DIALOGUES, StandInHub, hub_environment, small_repositories

SCRIPT = Path(__file__).resolve().parent.parent / "detox_ppo.py"
TINY = SCRIPT.parent / "checkpoints" / "tiny"
FEW = [
    *("--max_ppo_steps", "1", "--batch_size", "2", "--mini_batch_size", "1", "--eval_samples", "2"),
    *("--output_min_length", "4", "--output_max_length", "6", "--eval_max_new_tokens", "6", "--dtype", "float32"),
]


def detox(arguments, environment, cwd):
    """Run the script in a directory that holds nothing of the repository."""
    command = [sys.executable, str(SCRIPT), *arguments, "--output_dir", "out"]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


def complaint(finished):
    """The one line of a user's mistake."""
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    return next(line for line in finished.stderr.splitlines() if line.startswith("detox_ppo.py: error:"))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    return small_repositories(tmp_path_factory.mktemp("repositories"), TINY)


def test_default_names_download_train_and_tell_their_commits(repositories, tmp_path):
    with StandInHub(*repositories) as hub:
        finished = detox([*FEW, "--adapter_name", ADAPTER], hub.environment(tmp_path / "home"), tmp_path)
        assert finished.returncode == 0, finished.stderr
        expected = {
            "model_name": hub.sha(BASE),
            "adapter_name": hub.sha(ADAPTER),
            "reward_model_name": hub.sha(CLASSIFIER),
            "dataset_name": hub.sha(DIALOGUES),
        }
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["environment"]["commits"] == expected
    assert results["config"]["model_name"] == "google/flan-t5-base"
    assert "data: 2,000 rows, 2,000 with 200 < characters" in finished.stdout
    assert "1,600 rows to train on, 400 held out" in finished.stdout

    # What was downloaded serves without the hub when the user says so, and a hub that is gone is not passed over.
    offline = hub_environment(hub.url, tmp_path / "home")
    again = detox([*FEW, "--adapter_name", ADAPTER], offline | {"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["environment"]["commits"] == expected
    gone = detox(FEW, offline, tmp_path)
    message = complaint(gone)
    assert "google/flan-t5-base" in message and "HF_ENDPOINT for another hub, HF_HUB_OFFLINE=1" in message
    assert hub.url in message and "python detox_ppo.py --config checkpoints/tiny/config.yaml" in message
    assert len(gone.stderr.splitlines()) == 1  # one message, not one for each retry
