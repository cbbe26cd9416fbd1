"""Many small PPO steps in one process: does memory or the number of open files grow?

    python benchmarks/soak.py --steps 500       # some minutes
    python benchmarks/soak.py --minutes 60      # a soak of an hour

It runs the script's own command line on the bundled small world, with a checkpoint every ten steps, and notes after
each step the resident memory, the open files, the threads and the tensors that are alive. With --minutes it sends
itself SIGTERM when the time is over, as a machine that is taken away would. It prints a line every twentieth of the
way and, last, one JSON object: `growth` is memory at the end less that after a tenth, `slope` the MiB a hundred steps
over the second half, by least squares.
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
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing from more

import numpy as np  # noqa: E402
import torch  # noqa: E402

import detox_ppo  # noqa: E402


def note(step, started):
    """What the process holds now."""
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


def told(notes):
    return (
        f"step {notes['step']:>6} | {notes['seconds']:>7.1f} s | {notes['memory']:>7.1f} MiB | {notes['files']} files "
        f"| {notes['threads']} threads | {notes['tensors']} tensors"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="how many steps (default 500)")
    parser.add_argument("--minutes", type=float, help="instead: for how long")
    options, others = parser.parse_known_args()  # others: options of detox_ppo.py
    gc.freeze()  # what was imported stays, and is not looked through after each step
    notes, started = [], time.perf_counter()
    tiny, steps = ROOT / "checkpoints" / "tiny", 10**9 if options.minutes else options.steps
    print_step = detox_ppo.print_step

    def noted(*args, **kwargs):
        print_step(*args, **kwargs)
        seconds = time.perf_counter() - started
        notes.append(note(len(notes) + 1, started))
        part = seconds / (60 * options.minutes) if options.minutes else len(notes) / steps
        if int(20 * part) > noted.shown:
            noted.shown = int(20 * part)
            print(told(notes[-1]), file=sys.stderr, flush=True)
        if part >= 1 and options.minutes:
            os.kill(os.getpid(), signal.SIGTERM)

    noted.shown = 0
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
                with mock.patch.object(detox_ppo, "print_step", noted):  # called once a step
                    detox_ppo.main([*arguments, *others])
        except SystemExit as end:
            code = end.code
        if code == 2:  # it told why
            sys.exit(code)
        checkpoints = detox_ppo.Checkpoints(run, limit=1)
        kept = checkpoints.paths()
        with redirect_stdout(None):
            whole = kept[0].name == f"checkpoint-{checkpoints.load()['state'].step}.pt"
        size = kept[0].stat().st_size / 2**20
    gc.unfreeze()
    memory = [step["memory"] for step in notes]
    half = memory[len(memory) // 2 :]
    found = {
        "steps": len(notes),
        "seconds": notes[-1]["seconds"],
        "exit_code": code,
        "memory": {"first": memory[0], "tenth": memory[len(memory) // 10], "last": memory[-1], "peak": max(memory)},
        "growth": memory[-1] - memory[len(memory) // 10],
        "slope": float(np.polyfit(np.arange(len(half)), half, 1)[0]) * 100 if len(half) > 1 else 0.0,
        # Adam's state comes with the first update.
        **{name: sorted({step[name] for step in notes[2:] or notes}) for name in ("files", "threads", "tensors")},
        "checkpoints": len(kept),
        "newest_is_whole": whole,
        "checkpoint_size": size,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
