"""Runs of detox_ppo.main in processes of their own, each forked from one that has imported it already.

An import takes longer than a small run, so a server imports once and forks. Runs are real processes: they can be
killed, stopped by a signal, or started twice at once.

    with Server() as server:
        run = server.start(["--seed", "1"], directory)      # in that directory; output goes to its file "output"
        code = run.wait()                                   # exit code, or minus the signal that ended it
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Run:
    def __init__(self, server, pid, directory):
        self.server, self.pid, self.directory, self.code = server, pid, Path(directory), None

    def wait(self) -> int:
        # Asked again and again, so that threads can wait for several runs of one server.
        while self.code is None:
            time.sleep(0.02)
            self.code = self.server.ask(poll=self.pid)
        return self.code

    @property
    def output(self) -> str:
        """What it printed, stdout and stderr together."""
        return (self.directory / "output").read_text(encoding="utf-8", errors="replace")

    @property
    def error(self) -> str:
        """The line that a failed run ends with."""
        return self.output.splitlines()[-1]


class Server:
    def __init__(self):
        settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **request):
        with self.lock:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())

    def start(self, args, directory, prepare=(), env=None) -> Run:
        """Start main(args) in a directory.

        Args:
            prepare: calls to make first, as ["module:function", keyword arguments]; modules of this directory.
            env: environment variables to set.
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        request = {"args": [str(arg) for arg in args], "directory": str(directory), "prepare": list(prepare)}
        return Run(self, self.ask(start=request | {"env": env or {}}), directory)

    def run(self, *args, **kwargs) -> Run:
        """Start and wait."""
        run = self.start(*args, **kwargs)
        run.wait()
        return run


def ranks(processes):
    """The environment of each of some processes of a run, as a launcher sets it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common["ACCELERATE_USE_CPU"] = "true"
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def child(args, directory, prepare, env):
    """What a forked process does; gives its exit code."""
    import detox_ppo

    os.chdir(directory)
    os.environ.update(env)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)

    def prepared():
        for name, kwargs in prepare:
            module, function = name.split(":")
            getattr(importlib.import_module(module), function)(**kwargs)
        detox_ppo.main(args)

    return exit_code(prepared)


def exit_code(program):
    """Call it and give the exit code with which an interpreter would end."""
    try:
        program()
        return 0
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def sagemaker(root):
    """Prepare a run: the container's /opt/ml is this directory."""
    import detox_ppo

    detox_ppo.SAGEMAKER = Path(root)


def ignore(name):
    """Prepare a run: it is to live on when it gets this signal."""
    signal.signal(signal.Signals[name], signal.SIG_IGN)


def short_of_memory():
    """Prepare a run: its first PPO step asks for more memory than any machine has."""
    import torch

    import detox_ppo

    sample = detox_ppo.generate

    def generate(policy, prompts, generators, caps):
        if caps[0] != caps[1]:  # not in the evaluation
            torch.empty(2**58)
        return sample(policy, prompts, generators, caps)

    detox_ppo.generate = generate


def mistaken(rank):
    """Prepare a run: this one of several processes can't load its policy."""
    import detox_ppo

    def load_policy(*_):
        raise detox_ppo.UserError("only here")

    if os.environ["RANK"] == str(rank):
        detox_ppo.load_policy = load_policy


def serve():
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import gc

    import datasets
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, logging

    import detox_ppo  # noqa: F401

    # What a first load imports and compiles is then done for all.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()  # what a run prints is then the same every time, but for its numbers
    tiny = HERE.parent / "checkpoints" / "tiny"
    AutoModelForSeq2SeqLM.from_pretrained(tiny / "base")
    AutoModelForSequenceClassification.from_pretrained(tiny / "classifier")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()  # else every full collection of a child walks all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if not answer:
                # Without the pipes, so that the server's end is seen even while a run lives on.
                answers.close()
                os.close(0)
                os._exit(child(**request["start"]))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
