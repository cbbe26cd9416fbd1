"""The default names through the real download code, against a stand-in hub that serves the toy example."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
from hub import ADAPTER, BASE, CLASSIFIER, DIALOGUES, StandInHub, hub_environment, small_repositories
from kill_points import make_dialogues

TOKEN, PASSWORD = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567", "battery-staple"
SCRIPT = Path(__file__).resolve().parent.parent / "detox_ppo.py"
ARGUMENTS = [
    *("--adapter_name", ADAPTER, "--max_ppo_steps", "1", "--batch_size", "2", "--mini_batch_size", "1"),
    *("--output_min_length", "4", "--output_max_length", "6", "--eval_max_new_tokens", "6", "--eval_samples", "2"),
    *("--dtype", "float32", "--report_to", "tensorboard", "--output_dir", "out"),
]


def detox(environment, work, *more):
    """Run the script in a directory outside the repository."""
    command = [sys.executable, "-B", str(SCRIPT), *ARGUMENTS, *more]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done, json.loads((work / "out" / "results.json").read_text())


def test_default_names_are_downloaded_and_their_commits_recorded(tmp_path):
    repositories = small_repositories(tmp_path / "served", SCRIPT.parent / "checkpoints" / "tiny")
    make_dialogues(repositories[1][DIALOGUES])
    work, caches = tmp_path / "a" / "work", tmp_path / "caches"
    folders = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "xdg", "MPLCONFIGDIR": "matplotlib"}
    for directory in (work, *(caches / name for name in folders.values())):
        directory.mkdir(parents=True)

    # Without a cached list Matplotlib scans all fonts.
    shutil.copytree(matplotlib.get_cachedir(), caches / "matplotlib", dirs_exist_ok=True)

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    with StandInHub(*repositories) as hub:
        environment = hub_environment(hub.url.replace("://", f"://user:{PASSWORD}@"), caches / "hub")
        environment |= {name: str(caches / folder) for name, folder in folders.items()} | {"HF_TOKEN": TOKEN}
        done, results = detox(environment, work)
        names = {"model_name": BASE, "adapter_name": ADAPTER, "reward_model_name": CLASSIFIER}
        expected = {option: hub.sha(name) for option, name in (names | {"dataset_name": DIALOGUES}).items()}
    assert results["environment"]["commits"] == expected
    assert results["config"]["model_name"] == "google/flan-t5-base"
    assert "data: 30 rows, 30 with 200 < characters" in done.stdout
    assert "24 rows to train on, 6 held out" in done.stdout

    # The script writes only into its output directory, and the libraries into the caches set in the environment.
    changed = [path for path, when in files().items() if before.get(path) != when]
    left = [path for path in changed if path.is_relative_to(work / "out")]
    assert {"results.json", "README.md"} <= {path.name for path in left}
    assert not [path for path in changed if path not in left and not path.is_relative_to(caches)]
    # Neither the token nor the hub's password is printed or written.
    for text in (done.stdout, done.stderr, *(path.read_bytes().decode(errors="replace") for path in left)):
        assert TOKEN not in text and PASSWORD not in text

    # With HF_HUB_OFFLINE=1 the downloaded files are used. An unreachable hub: test_hub_faults.py.
    (tmp_path / "b").mkdir()
    same = ["--dataset_name", f"{DIALOGUES}@{expected['dataset_name']}", "--max_ppo_steps", "0"]
    again = detox(environment | {"HF_HUB_OFFLINE": "1"}, tmp_path / "b", *same, "--report_to", "none")[1]
    assert again["environment"]["commits"] == expected and again["config"]["max_ppo_steps"] == 0
