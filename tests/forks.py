"""Run detox_ppo.main in separate processes, each forked from a server that has already imported it.

An import takes longer than a small run, so the server imports once and forks. Runs are real processes: they can be
killed, stopped by a signal, or run concurrently.

    with Server() as server:
        run = server.start(["--seed", "1"], directory)      # runs in that directory, prints to its file "output"
        code = run.wait()                                   # exit code, or minus the number of the signal
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
        # Polls, so that threads can wait for several runs of one server.
        while self.code is None:
            time.sleep(0.02)
            self.code = self.server.ask(poll=self.pid)
        return self.code

    @property
    def output(self) -> str:
        """stdout and stderr together."""
        return (self.directory / "output").read_text(encoding="utf-8", errors="replace")

    @property
    def error(self) -> str:
        """The last line of output."""
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
            prepare: setup calls to make first, as ["module:function", keyword arguments]; modules in tests/.
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
    """The environment variables that a launcher sets in each process of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common["ACCELERATE_USE_CPU"] = "true"
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def child(args, directory, prepare, env):
    """Run the program in a forked process and return its exit code."""
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
    """Call a program and return the exit code that the interpreter would end with."""
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
    """Setup call of a run: use this directory as the container's /opt/ml."""
    import detox_ppo

    detox_ppo.SAGEMAKER = Path(root)


def ignore(name):
    """Setup call of a run: ignore this signal."""
    signal.signal(signal.Signals[name], signal.SIG_IGN)


def short_of_memory():
    """Setup call of a run: its first PPO step allocates more memory than any machine has."""
    import torch

    import detox_ppo

    sample = detox_ppo.generate

    def generate(policy, prompts, generators, limits, *args):
        if limits[0] != limits[1]:  # not in the evaluation
            torch.empty(2**58)
        return sample(policy, prompts, generators, limits, *args)

    detox_ppo.generate = generate


def mistaken(rank):
    """Setup call of a run: the process with this rank raises a user error."""
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

    # Load once, so that the runs need not repeat what a first load imports and compiles.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()  # their output is not deterministic
    tiny = HERE.parent / "checkpoints" / "tiny"
    AutoModelForSeq2SeqLM.from_pretrained(tiny / "base")
    AutoModelForSequenceClassification.from_pretrained(tiny / "classifier")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()  # otherwise every full collection of a child traverses all imported objects
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if not answer:
                # Close the pipes, so that the end of the server is noticed even while a run continues.
                answers.close()
                os.close(0)
                os._exit(child(**request["start"]))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
