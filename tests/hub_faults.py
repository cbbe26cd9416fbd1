"""Every fault of the hub against everything that a run loads: the real command, over and over in one process.

`python tests/hub_faults.py DIR` prints a JSON line for each: the fault, the repository that it befell, the exit code,
the messages, and what else was printed. tests/test_hub_faults.py holds them to account. The libraries read HF_ENDPOINT
once, when they are imported, so that the hub has to be there before them. The password in its URL, and the caller's
HF_TOKEN, are for the caller to look for in all of that.
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
# What befalls the files of a repository, or, with "api", already the question for its commit.
FAULTS = ("401", "404", "500", "half", "silent", "api 401", "api 404", "api 500", "api silent")
# Repositories that are not there.
UNKNOWN = {"model_name": "example/none", "dataset_name": "example/none", "adapter_name": "a/b/c"}
PASSWORD = "battery-staple"
PROGRAM = "example/program"


class Trap:
    """Unpickling this creates a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_program(directory, trap):
    """Dialogues that are a program, as they once could be, and a pickle. If they are run, they create trap."""
    directory.mkdir(parents=True)
    (directory / "program.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    (directory / "train.pkl").write_bytes(pickle.dumps(Trap(trap)))
    return directory


def hurried(question):
    """The same question to the hub, with half a second for its answer."""
    return lambda *args, **kwargs: question(*args, **kwargs | {"timeout": 0.5})


def main(directory):
    models, datasets = small_repositories(directory / "repositories", ROOT / "checkpoints" / "tiny")
    make_dialogues(datasets[DIALOGUES])  # as many as are read forty times in no time
    datasets[PROGRAM] = write_program(directory / "repositories" / PROGRAM, directory / "trap")
    with StandInHub(models, datasets) as hub:
        os.environ |= hub_environment(hub.url.replace("://", f"://user:{PASSWORD}@"), directory / "home")
        os.environ.pop("HF_HUB_OFFLINE", None)
        sys.path.insert(0, str(ROOT))
        import huggingface_hub.file_download

        import detox_ppo

        # The libraries' attempts stay, their patience goes: minutes for a file that never comes.
        time.sleep = lambda seconds: None
        constants = huggingface_hub.constants
        constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.1
        huggingface_hub.file_download._ETAG_RETRY_TIMEOUT = 0.1
        huggingface_hub.HfApi.repo_info = hurried(huggingface_hub.HfApi.repo_info)
        args = ["--adapter_name", ADAPTER, "--output_dir", str(directory / "out"), "--device", "cpu"]

        def print_wrapped(name, repo_id, *more):
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
            print_wrapped(f"unknown {option}", repo_id, f"--{option}", repo_id)
        print_wrapped("program", PROGRAM, "--dataset_name", PROGRAM)
        for name in FAULTS:
            for repo_id in OPTIONS:
                hub.api, hub.fault, hub.only = name.startswith("api "), name.removeprefix("api "), repo_id
                print_wrapped(name, repo_id)
    print_wrapped("gone", BASE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
