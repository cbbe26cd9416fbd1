"""Run the real command with every fault of the hub in everything that a run loads, all in one process.

`python tests/hub_faults.py DIR` prints a JSON line for each: fault, repository, exit code, stderr and stdout.
tests/test_hub_faults.py checks them. The libraries read HF_ENDPOINT once, when they are imported, so the hub starts
before them. The caller checks that neither the password in the hub's URL nor its HF_TOKEN is printed.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path

from hub import ADAPTER, BASE, CLASSIFIER, DIALOGUES, StandInHub, hub_environment, small_repositories
from kill_points import make_dialogues

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {BASE: "model_name", ADAPTER: "adapter_name", CLASSIFIER: "reward_model_name", DIALOGUES: "dataset_name"}
# Faults of the requests for a repository's files or, with "api", of the request for its commit.
FAULTS = ("401", "404", "500", "half", "silent", "api 401", "api 404", "api 500", "api silent")
# Repositories that do not exist.
UNKNOWN = {"model_name": "example/none", "dataset_name": "example/none", "adapter_name": "a/b/c"}
PASSWORD = "battery-staple"
PROGRAM = "example/program"


class Trap:
    """An object that creates a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_program(directory, trap):
    """Write a dataset of a script, as `datasets` once supported, and a pickle. If run, they create trap."""
    directory.mkdir(parents=True)
    (directory / "program.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    (directory / "train.pkl").write_bytes(pickle.dumps(Trap(trap)))
    return directory


def with_short_timeout(request):
    """Wrap a request to the hub with a timeout of half a second."""
    return lambda *args, **kwargs: request(*args, **kwargs | {"timeout": 0.5})


def main(directory):
    models, datasets = small_repositories(directory / "repositories", ROOT / "checkpoints" / "tiny")
    make_dialogues(datasets[DIALOGUES])  # few, as they are read forty times
    datasets[PROGRAM] = write_program(directory / "repositories" / PROGRAM, directory / "trap")
    with StandInHub(models, datasets) as hub:
        os.environ |= hub_environment(hub.url.replace("://", f"://user:{PASSWORD}@"), directory / "home")
        os.environ.pop("HF_HUB_OFFLINE", None)
        sys.path.insert(0, str(ROOT))
        import huggingface_hub.file_download

        import detox_ppo

        # The libraries still retry, but without their pauses and long timeouts.
        time.sleep = lambda seconds: None
        constants = huggingface_hub.constants
        constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.1
        huggingface_hub.file_download._ETAG_RETRY_TIMEOUT = 0.1
        huggingface_hub.HfApi.repo_info = with_short_timeout(huggingface_hub.HfApi.repo_info)
        args = ["--adapter_name", ADAPTER, "--output_dir", str(directory / "out"), "--device", "cpu"]

        def record(name, repo_id, *more):
            shutil.rmtree(directory / "home", ignore_errors=True)
            code, printed, messages = 0, io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(messages):
                try:
                    detox_ppo.main([*args, *more])
                except SystemExit as stop:
                    code = stop.code
                except Exception as error:
                    code = repr(error)
            print(json.dumps([name, repo_id, code, messages.getvalue(), printed.getvalue()]), flush=True)

        for option, repo_id in UNKNOWN.items():
            record(f"unknown {option}", repo_id, f"--{option}", repo_id)
        record("program", PROGRAM, "--dataset_name", PROGRAM)
        for name in FAULTS:
            for repo_id in OPTIONS:
                hub.api, hub.fault, hub.only = name.startswith("api "), name.removeprefix("api "), repo_id
                record(name, repo_id)
    record("gone", BASE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
