"""Many small PPO steps in one process: does memory or the number of open files grow?

    python benchmarks/soak.py --steps 500       # a few minutes
    python benchmarks/soak.py --minutes 60      # one hour

Runs detox_ppo.py's command line on the toy example with a checkpoint every ten steps. After each step it records
resident memory, open files, threads and live tensors, and it prints a line 20 times during the run. With --minutes it
sends itself SIGTERM when the time is over, like a preempted machine. The last line of the output is one JSON object:
`growth` is memory at the end minus memory after a tenth of the steps; `slope` is MiB per hundred steps over the second
half, by least squares.
"""

import argparse
import gc
import json
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # such small models gain nothing from more threads

import numpy as np  # noqa: E402
import torch  # noqa: E402

import detox_ppo  # noqa: E402


def measure(step, started):
    """The process's current resources."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return {
        "step": step,
        "seconds": round(time.perf_counter() - started, 1),
        "memory": int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(re.search(r"Threads:\s+(\d+)", status).group(1)),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
    }


def format_line(sample):
    return (
        f"step {sample['step']:>6} | {sample['seconds']:>7.1f} s | {sample['memory']:>7.1f} MiB "
        f"| {sample['files']} files | {sample['threads']} threads | {sample['tensors']} tensors"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="number of steps (default 500)")
    parser.add_argument("--minutes", type=float, help="run for this long instead")
    options, others = parser.parse_known_args()  # others: options of detox_ppo.py
    gc.freeze()  # gc.collect need not scan the imported modules after each step
    samples, printed, started = [], 0, time.perf_counter()
    tiny, steps = ROOT / "checkpoints" / "tiny", 10**9 if options.minutes else options.steps
    print_step = detox_ppo.print_step

    def measuring_print_step(*args, **kwargs):
        nonlocal printed
        print_step(*args, **kwargs)
        seconds = time.perf_counter() - started
        samples.append(measure(len(samples) + 1, started))
        progress = seconds / (60 * options.minutes) if options.minutes else len(samples) / steps
        if int(20 * progress) > printed:
            printed = int(20 * progress)
            print(format_line(samples[-1]), file=sys.stderr, flush=True)
        if progress >= 1 and options.minutes:
            os.kill(os.getpid(), signal.SIGTERM)

    with tempfile.TemporaryDirectory(prefix="soak_") as scratch:
        run = Path(scratch, "run")
        models = {"model_name": "base", "adapter_name": "adapter", "reward_model_name": "classifier"}
        settings = {name: tiny / place for name, place in models.items()}
        settings |= {"dataset_name": tiny / "dialogues", "dtype": "float32", "device": "cpu", "output_dir": run}
        settings |= {"max_ppo_steps": steps, "batch_size": 8, "mini_batch_size": 4, "save_steps": 10}
        settings |= {"output_min_length": 8, "output_max_length": 40, "eval_samples": 8, "eval_max_new_tokens": 24}
        code = 0
        arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        try:
            with open(Path(scratch, "output"), "w") as output, redirect_stdout(output):
                with mock.patch.object(detox_ppo, "print_step", measuring_print_step):  # called once per step
                    detox_ppo.main([*arguments, *others])
        except SystemExit as end:
            code = end.code
        if code == 2:  # a user error, which is already printed
            sys.exit(code)
        checkpoints = detox_ppo.Checkpoints(run, limit=1)
        paths = checkpoints.paths()
        with redirect_stdout(None):
            valid = paths[0].name == f"checkpoint-{checkpoints.load()['state'].step}.pt"
        size = paths[0].stat().st_size / 2**20
    gc.unfreeze()
    memory = [sample["memory"] for sample in samples]
    half = memory[len(memory) // 2 :]
    # The first update creates Adam's state, so the counts start after it.
    counted = samples[2:] or samples
    result = {
        "steps": len(samples),
        "seconds": samples[-1]["seconds"],
        "exit_code": code,
        "memory": {"first": memory[0], "tenth": memory[len(memory) // 10], "last": memory[-1], "peak": max(memory)},
        "growth": memory[-1] - memory[len(memory) // 10],
        "slope": float(np.polyfit(np.arange(len(half)), half, 1)[0]) * 100 if len(half) > 1 else 0.0,
        **{name: sorted({sample[name] for sample in counted}) for name in ("files", "threads", "tensors")},
        "checkpoints": len(paths),
        "newest_is_whole": valid,
        "checkpoint_size": size,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
