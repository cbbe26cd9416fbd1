"""Kill a small run at many points, resume it, and compare its output with that of an uninterrupted run.

    python tests/kill_points.py                   # 132 points, a few minutes on 2 cores
    python tests/kill_points.py --points 11       # as many as in the test suite

The run trains an adapter by SFT and PPO on the bundled toy example, with a checkpoint after every step. A point is a
counted event, so that all runs pass through the same points: a file opened for writing, renamed or deleted; a file
half written; a sampled position; a scored batch; the start or end of an optimizer step. The points are spread over all
phases of a run. At its point the process sends itself SIGKILL. Every third run is killed again after it was resumed.
At the end, all files in the run's directory must be the same byte for byte; JSON files and checkpoints must have the
same values, except for timings.

It prints a line per phase and a final line of JSON. The exit code is 1 if a run could not be resumed exactly.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forks

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
PHASES = {
    "start": "loading",
    "tuning": "SFT steps",
    "tuning checkpoint": "writing SFT checkpoints",
    "evaluation": "the evaluations before and between",
    "sampling": "sampling responses",
    "scoring": "log-probabilities and scores",
    "update": "optimizer steps",
    "checkpoint": "writing PPO checkpoints",
    "pruning": "deleting old checkpoints",
    "final evaluation": "saving the adapter, evaluating it",
    "final files": "comparison, pictures, card, results",
}


# In the run's process


class Watch:
    """Counts the events of a run by phase and sends its own process a signal at one of them.

    Args:
        phase, number: the event at which to send the signals. By default none are sent.
        signals: names of the signals to send.
        root: parent of the run's output directories.
        counts: file to which the number of events per phase is written.
    """

    def __init__(self, phase=None, number=None, signals=("SIGKILL",), root=".", counts=None):
        self.target = (phase, number)
        self.signals = [getattr(signal, name) for name in signals]
        self.root, self.counts = str(Path(root).resolve()) + os.sep, counts
        self.phases, self.seen, self.busy = ["start"], {}, False

    def event(self, tear=None):
        phase = self.phases[-1]
        if phase is None:
            return
        self.seen[phase] = self.seen.get(phase, 0) + 1
        if (phase, self.seen[phase]) == self.target:
            if tear and signal.SIGKILL in self.signals:  # a surviving process needs the full file
                tear()
            for number in self.signals:
                os.kill(os.getpid(), number)

    def audit(self, name, args):
        if self.busy:
            return
        if name == "open":
            path, mode, flags = args
            changes = flags & (os.O_WRONLY | os.O_RDWR)
        elif name in ("os.rename", "os.mkdir", "os.remove"):
            path, changes = args[0], True
        else:
            return
        if changes and os.path.abspath(str(path)).startswith(self.root):
            self.busy = True
            self.event()
            self.busy = False

    def inside(self, phase, function, event=False):
        """Wrap a function so that it runs in another phase. Parts of an evaluation stay in that phase."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            in_evaluation = "evaluation" in self.phases[-1] and phase in ("sampling", "scoring")
            self.phases.append(self.phases[-1] if in_evaluation else phase)
            if event:
                self.event()
            try:
                return function(*args, **kwargs)
            finally:
                self.phases.pop()

        return wrapped

    def around(self, function):
        """Wrap a function with an event before and after it."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            self.event()
            result = function(*args, **kwargs)
            self.event()
            return result

        return wrapped

    def torn(self, function, path_of):
        """Wrap a function that writes a file with an event at which the file is half written."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            path = path_of(*args)
            if os.path.abspath(str(path)).startswith(self.root):
                self.event(lambda: os.truncate(path, os.path.getsize(path) // 2))
            return result

        return wrapped


def watch(**kwargs):
    """Setup call of a run: see Watch."""
    import torch

    import detox_ppo

    fast()
    watcher = Watch(**kwargs)
    evaluate = detox_ppo.evaluate_policy

    def evaluate_policy(*args):
        desc = args[5]
        phase = "final evaluation" if desc.startswith("after") else "evaluation"
        result = watcher.inside(phase, evaluate, event=True)(*args)
        if desc == "after, greedy":
            watcher.phases[:] = ["final files"]
        return result

    detox_ppo.evaluate_policy = evaluate_policy
    detox_ppo.load_policy = watcher.inside("start", detox_ppo.load_policy, event=True)
    detox_ppo.sft_step = watcher.inside("tuning", detox_ppo.sft_step, event=True)
    detox_ppo.generate = watcher.inside("sampling", detox_ppo.generate)
    detox_ppo.sample_tokens = watcher.around(detox_ppo.sample_tokens)
    detox_ppo.Policy.logprobs_and_values = watcher.inside("scoring", detox_ppo.Policy.logprobs_and_values, event=True)
    detox_ppo.ToxicityClassifier.scores = watcher.inside("scoring", detox_ppo.ToxicityClassifier.scores, event=True)
    detox_ppo.policy_loss = watcher.inside("update", detox_ppo.policy_loss, event=True)
    step = torch.optim.Adam.step  # AdamW's too
    update = watcher.inside("update", watcher.around(step))

    def optimizer_step(*args, **kwargs):
        watched = watcher.around(step) if watcher.phases[-1] == "tuning" else update
        return watched(*args, **kwargs)

    torch.optim.Adam.step = optimizer_step
    save_checkpoint, save_adapter = detox_ppo.Checkpoints.save, detox_ppo.save_adapter

    def save(checkpoints, policy, optimizer, state):
        phase = "checkpoint" if state.phase == "ppo" else "tuning checkpoint"
        watcher.inside(phase, save_checkpoint)(checkpoints, policy, optimizer, state)

    def save_trained(policy, directory, *adapter):
        if not adapter:  # the trained adapter, saved at the end
            watcher.phases[:] = ["final evaluation"]
        save_adapter(policy, directory, *adapter)

    detox_ppo.Checkpoints.save, detox_ppo.save_adapter = save, save_trained
    detox_ppo.Checkpoints.prune = watcher.inside("pruning", detox_ppo.Checkpoints.prune)
    detox_ppo.save_file = watcher.torn(detox_ppo.save_file, lambda tensors, path: path)
    for name in ("write_bytes", "write_text"):
        setattr(Path, name, watcher.torn(getattr(Path, name), lambda path, *_: path))
    if kwargs.get("counts"):
        write_report = detox_ppo.write_report

        def counted(*args):
            write_report(*args)
            watcher.phases[:] = [None]
            Path(watcher.counts).write_text(json.dumps(watcher.seen))

        detox_ppo.write_report = counted
    sys.addaudithook(watcher.audit)


def fast(put=setattr):
    """Setup call of a run: skip slow parts that do not matter here, such as 10,000 resamples of four prompts.

    put: setattr, or a MonkeyPatch's setattr, which is undone afterwards.
    """
    from matplotlib.figure import Figure

    import detox_ppo

    put(detox_ppo.paired_statistics, "__defaults__", (20,))
    for name in ("draw_training", "draw_toxicity"):
        put(detox_ppo, name, lambda *_: Figure(figsize=(1, 1)))


# In the process that starts the runs

FAST = ["kill_points:fast", {}]  # for forks.Server.start


def strike(phase: str, number: int, *signals: str) -> list:
    """The setup call with which a run sends itself signals at an event (default: SIGKILL)."""
    return ["kill_points:watch", {"phase": phase, "number": number, "root": "run", "signals": signals or ["SIGKILL"]}]


def make_dialogues(directory: Path, rows: int = 30) -> Path:
    """Write the first rows of the toy example's dialogues."""
    directory.mkdir(parents=True, exist_ok=True)
    with (
        open(TINY / "dialogues" / "train.csv", newline="", encoding="utf-8") as source,
        open(directory / "train.csv", "w", newline="", encoding="utf-8") as target,
    ):
        csv.writer(target).writerows(row for row, _ in zip(csv.reader(source), range(rows + 1), strict=False))
    return directory


def arguments(dialogues, **overrides) -> list[str]:
    """The options of a run of a few seconds with SFT and PPO."""
    options = {
        "model_name": TINY / "base",
        "adapter_name": TINY / "adapter",
        "reward_model_name": TINY / "classifier",
        "dataset_name": dialogues,
        "device": "cpu",
        "dtype": "float32",
        "sft_steps": 3,
        "sft_batch_size": 4,
        "max_ppo_steps": 3,
        "batch_size": 4,
        "mini_batch_size": 2,
        "learning_rate": 1e-3,
        "output_min_length": 2,
        "output_max_length": 4,
        "eval_samples": 3,
        "eval_max_new_tokens": 4,
        "save_steps": 1,
        "output_dir": "run",
    }
    return [str(part) for name, value in (options | overrides).items() for part in (f"--{name}", value)]


def wait_for_steps(directory: Path, steps: int) -> None:
    """Wait until the run with this output_dir has done some steps."""
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, f"no step {steps}"
        time.sleep(0.05)


def untimed(data):
    """The data of a JSON file or checkpoint without timings and with tensors replaced by their hashes."""
    if isinstance(data, dict):
        return {k: untimed(v) for k, v in data.items() if not str(k).startswith("time/") and k != "timings"}
    if hasattr(data, "numpy"):
        numbers = data.numpy()
        return [str(numbers.dtype), numbers.shape, hashlib.sha256(numbers.tobytes()).hexdigest()]
    return [untimed(value) for value in data] if isinstance(data, list) else data


def content(checkpoint: Path) -> dict:
    """The content of a checkpoint without the checksum at its end."""
    import torch

    return torch.load(io.BytesIO(checkpoint.read_bytes()[:-32]), weights_only=True)


def left(directory: Path) -> dict:
    """The content of each file in a run's directory by name, without timings."""
    files = {}
    for path in sorted(Path(directory).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            files[name] = None
        elif path.suffix == ".pt":
            files[name] = untimed(content(path))
        elif path.name == "results.json":
            files[name] = untimed(json.loads(path.read_text(encoding="utf-8")))
        elif path.name == "metrics.jsonl":
            files[name] = [untimed(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


def differences(expected: dict, actual: dict) -> list[str]:
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name, "?") != actual.get(name, "?"))


def survive(server, args, directory, points, expected) -> tuple[int, list[str]]:
    """Kill a run at the first point, resume it, kill it at the next one and so on; then let it finish.

    Returns:
        the number of kills, and a list of what differs from the expected files.
    """
    kills, resume = 0, []
    for phase, number in points:
        run = server.run([*args, *resume], directory, [strike(phase, number)])
        resume = ["--resume"]
        if run.code == 0:
            continue  # a resumed run may be past that point
        if run.code != -signal.SIGKILL:
            return kills, [f"exit code {run.code} before the kill: {run.error}"]
        kills += 1
    run = server.run([*args, "--resume"], directory, [FAST])
    if run.code:
        return kills, [f"exit code {run.code} after the kill: {run.error}"]
    return kills, differences(expected, left(directory / "run"))


def choose(counts: dict, points: int) -> list[tuple[str, int]]:
    """Choose events, in equal numbers per phase and evenly spread over each phase."""
    chosen = {phase: 0 for phase in counts}
    while sum(chosen.values()) < min(points, sum(counts.values())):
        for phase in counts:
            if chosen[phase] < counts[phase] and sum(chosen.values()) < points:
                chosen[phase] += 1
    return [
        (phase, 1 + (2 * i + 1) * counts[phase] // (2 * count))
        for phase, count in chosen.items()
        for i in range(count)
    ]


def main(points: int, server: forks.Server, scratch: Path, jobs: int = 2, **options) -> dict:
    """Kill runs at a number of points.

    Args:
        options: options of the runs.

    Returns:
        counts, and under "lost" the runs whose output differs.
    """
    started = time.perf_counter()
    args = arguments(make_dialogues(scratch / "dialogues"), **options)
    undisturbed = server.run(args, scratch / "whole", [FAST])
    # The events are counted in a second run, to check that counting does not change the results.
    watched = server.run(
        args, scratch / "watched", [["kill_points:watch", {"root": "run", "counts": str(scratch / "counts")}]]
    )
    if undisturbed.code or watched.code:
        raise RuntimeError(
            f"a run that nobody killed failed: {undisturbed.output if undisturbed.code else watched.output}"
        )
    expected = left(scratch / "whole" / "run")
    changed = differences(expected, left(scratch / "watched" / "run"))
    if changed:
        raise RuntimeError(f"two runs that nobody killed differ in {changed}")
    counts = json.loads((scratch / "counts").read_text())
    chosen = choose({phase: counts[phase] for phase in PHASES}, points)

    def one(i):
        directory = scratch / f"killed-{i}"
        # Every third run is killed again, at the next points that it reaches.
        more = [chosen[(i + step) % len(chosen)] for step in (1, 2)] if i % 3 == 2 else []
        kills, wrong = survive(server, args, directory, [chosen[i], *more], expected)
        if not wrong:
            shutil.rmtree(directory)
        return kills, wrong

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(one, range(len(chosen))))
    table = {phase: {"events": counts[phase], "points": 0, "lost": 0} for phase in PHASES}
    for (phase, _), (_, wrong) in zip(chosen, outcomes, strict=True):
        table[phase]["points"] += 1
        table[phase]["lost"] += bool(wrong)
    return {
        "points": len(chosen),
        "kills": sum(kills for kills, _ in outcomes),
        "survived": sum(not wrong for _, wrong in outcomes),
        "lost": [[*point, wrong] for point, (_, wrong) in zip(chosen, outcomes, strict=True) if wrong],
        "phases": table,
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=132, help="how many points (default 132)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_points_") as scratch, forks.Server() as server:
        outcome = main(options.points, server, Path(scratch), options.jobs)
    print(f"{'phase':<20}{'events':>8}{'points':>8}{'lost':>6}  during")
    for phase, row in outcome["phases"].items():
        print(f"{phase:<20}{row['events']:>8}{row['points']:>8}{row['lost']:>6}  {PHASES[phase]}")
    for phase, number, wrong in outcome["lost"]:
        print(f"lost: {phase} {number}: {wrong}")
    print(json.dumps({name: value for name, value in outcome.items() if name != "lost"}))
    sys.exit(bool(outcome["lost"]))
