"""Kill a small run at many points, resume it, and compare everything it leaves with a run that was never stopped.

    python tests/kill_points.py                   # 132 points, some minutes on 2 cores
    python tests/kill_points.py --points 11       # as many as the tests do

The run tunes an adapter and trains it by PPO on the bundled small world, with a checkpoint after every step. A point
is a counted event in it, so each run passes through the same ones: a file of the run that is opened for writing,
renamed or deleted; a file half written; a sampled position; a batch scored; an optimizer step begun or done. Points
are spread over all phases of a run. At its point the process sends itself SIGKILL. Every third run is killed again
after it was resumed. What has to be the same at the end: every file in the run's directory, byte for byte; what is
in JSON and in checkpoints, value for value, but for timings.

It prints a line for each phase and, last, a line of JSON; its exit code is 1 where a run was lost.
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
    "tuning": "tuning steps",
    "tuning checkpoint": "writing the tuning's checkpoints",
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
    """Counts the events of a run by phase, and at one of them sends its own process a signal.

    Args:
        phase, number: the event to strike at; without them all are counted and the counts written to `counts`.
        signals: names of the signals to send.
        root: the run's output directories, below the current one.
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
            if tear and signal.SIGKILL in self.signals:  # who lives on goes on writing
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
        """function, in another phase; an evaluation's parts stay in it."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            kept = "evaluation" in self.phases[-1] and phase in ("sampling", "scoring")
            self.phases.append(self.phases[-1] if kept else phase)
            if event:
                self.event()
            try:
                return function(*args, **kwargs)
            finally:
                self.phases.pop()

        return wrapped

    def around(self, function):
        """function, with an event before and one after it."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            self.event()
            result = function(*args, **kwargs)
            self.event()
            return result

        return wrapped

    def torn(self, function, path_of):
        """A function that writes a file, with an event at which half of it is there."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            path = path_of(*args)
            if os.path.abspath(str(path)).startswith(self.root):
                self.event(lambda: os.truncate(path, os.path.getsize(path) // 2))
            return result

        return wrapped


def watch(**kwargs):
    """Prepare a run: see Watch."""
    import torch

    import detox_ppo

    fast()
    told = Watch(**kwargs)
    evaluate = detox_ppo.evaluate_policy

    def evaluate_policy(*args):
        desc = args[5]
        phase = "final evaluation" if desc.startswith("after") else "evaluation"
        found = told.inside(phase, evaluate, event=True)(*args)
        if desc == "after, greedy":
            told.phases[:] = ["final files"]
        return found

    detox_ppo.evaluate_policy = evaluate_policy
    detox_ppo.load_policy = told.inside("start", detox_ppo.load_policy, event=True)
    detox_ppo.sft_step = told.inside("tuning", detox_ppo.sft_step, event=True)
    detox_ppo.generate = told.inside("sampling", detox_ppo.generate)
    detox_ppo.sample_tokens = told.around(detox_ppo.sample_tokens)
    detox_ppo.Policy.logprobs_and_values = told.inside("scoring", detox_ppo.Policy.logprobs_and_values, event=True)
    detox_ppo.ToxicityClassifier.scores = told.inside("scoring", detox_ppo.ToxicityClassifier.scores, event=True)
    detox_ppo.policy_loss = told.inside("update", detox_ppo.policy_loss, event=True)
    step = torch.optim.Adam.step  # AdamW's too
    update = told.inside("update", told.around(step))
    torch.optim.Adam.step = lambda *args, **kwargs: (told.around(step) if told.phases[-1] == "tuning" else update)(
        *args, **kwargs
    )
    save_checkpoint, save_adapter = detox_ppo.Checkpoints.save, detox_ppo.save_adapter

    def save(checkpoints, policy, optimizer, state):
        phase = "checkpoint" if state.phase == "ppo" else "tuning checkpoint"
        told.inside(phase, save_checkpoint)(checkpoints, policy, optimizer, state)

    def save_trained(policy, directory, *adapter):
        if not adapter:  # the trained one is saved at the end
            told.phases[:] = ["final evaluation"]
        save_adapter(policy, directory, *adapter)

    detox_ppo.Checkpoints.save, detox_ppo.save_adapter = save, save_trained
    detox_ppo.Checkpoints.prune = told.inside("pruning", detox_ppo.Checkpoints.prune)
    detox_ppo.save_file = told.torn(detox_ppo.save_file, lambda tensors, path: path)
    for name in ("write_bytes", "write_text"):
        setattr(Path, name, told.torn(getattr(Path, name), lambda path, *_: path))
    if kwargs.get("counts"):
        write_report = detox_ppo.write_report

        def counted(*args):
            write_report(*args)
            told.phases[:] = [None]
            Path(told.counts).write_text(json.dumps(told.seen))

        detox_ppo.write_report = counted
    sys.addaudithook(told.audit)


def fast(put=setattr):
    """Prepare a run: spend no time on what can't matter here, such as 10,000 resamples of four prompts.

    put may be a MonkeyPatch's setattr, which takes it back afterwards.
    """
    from matplotlib.figure import Figure

    import detox_ppo

    put(detox_ppo.paired_statistics, "__defaults__", (20,))
    for name in ("draw_training", "draw_toxicity"):
        put(detox_ppo, name, lambda *_: Figure(figsize=(1, 1)))


# In the process that watches

FAST = ["kill_points:fast", {}]  # for forks.Server.start


def strike(phase: str, number: int, *signals: str) -> list:
    """What prepares a run to send itself signals at an event; without any, SIGKILL."""
    return ["kill_points:watch", {"phase": phase, "number": number, "root": "run", "signals": signals or ["SIGKILL"]}]


def make_dialogues(directory: Path, rows: int = 30) -> Path:
    """The first of the small world's dialogues."""
    directory.mkdir(parents=True, exist_ok=True)
    with (
        open(TINY / "dialogues" / "train.csv", newline="", encoding="utf-8") as source,
        open(directory / "train.csv", "w", newline="", encoding="utf-8") as target,
    ):
        csv.writer(target).writerows(row for row, _ in zip(csv.reader(source), range(rows + 1), strict=False))
    return directory


def arguments(dialogues, **overrides) -> list[str]:
    """The options of a run of seconds, which tunes and trains."""
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


def untimed(found):
    """A run's JSON, or what is in a checkpoint, without what depends on the clock; tensors as their hashes."""
    if isinstance(found, dict):
        return {k: untimed(v) for k, v in found.items() if not str(k).startswith("time/") and k != "timings"}
    if hasattr(found, "numpy"):
        numbers = found.numpy()
        return [str(numbers.dtype), numbers.shape, hashlib.sha256(numbers.tobytes()).hexdigest()]
    return [untimed(value) for value in found] if isinstance(found, list) else found


def content(checkpoint: Path) -> dict:
    """What is in a checkpoint: all but the checksum at its end."""
    import torch

    return torch.load(io.BytesIO(checkpoint.read_bytes()[:-32]), weights_only=True)


def left(directory: Path) -> dict:
    """Everything in a run's directory, by name, but for timings."""
    found = {}
    for path in sorted(Path(directory).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            found[name] = None
        elif path.suffix == ".pt":
            found[name] = untimed(content(path))
        elif path.name == "results.json":
            found[name] = untimed(json.loads(path.read_text(encoding="utf-8")))
        elif path.name == "metrics.jsonl":
            found[name] = [untimed(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(expected: dict, found: dict) -> list[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name, "?") != found.get(name, "?"))


def survive(server, args, directory, points, expected) -> tuple[int, list[str]]:
    """Kill a run at each of the points, the later ones after it was resumed; then let it end.

    Returns:
        how many kills there were, and in words what is not as it has to be.
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
    """That many events, spread evenly over each phase, phases taking turns."""
    wanted = {phase: 0 for phase in counts}
    while sum(wanted.values()) < min(points, sum(counts.values())):
        for phase in counts:
            if wanted[phase] < counts[phase] and sum(wanted.values()) < points:
                wanted[phase] += 1
    return [
        (phase, 1 + (2 * i + 1) * counts[phase] // (2 * many)) for phase, many in wanted.items() for i in range(many)
    ]


def main(points: int, server: forks.Server, scratch: Path, jobs: int = 2, **options) -> dict:
    """Kill at that many points; options go to the run.

    Returns:
        counts, and under "lost" what was not the same at the end.
    """
    started = time.perf_counter()
    args = arguments(make_dialogues(scratch / "dialogues"), **options)
    whole = server.run(args, scratch / "whole", [FAST])
    # Counted in a second run, so that the first shows that watching changes nothing.
    watched = server.run(
        args, scratch / "watched", [["kill_points:watch", {"root": "run", "counts": str(scratch / "counts")}]]
    )
    if whole.code or watched.code:
        raise RuntimeError(f"a run that nobody killed failed: {whole.output if whole.code else watched.output}")
    expected = left(scratch / "whole" / "run")
    changed = differences(expected, left(scratch / "watched" / "run"))
    if changed:
        raise RuntimeError(f"two runs that nobody killed differ in {changed}")
    counts = json.loads((scratch / "counts").read_text())
    chosen = choose({phase: counts[phase] for phase in PHASES}, points)

    def one(i):
        directory = scratch / f"killed-{i}"
        # Every third is killed again, at the next point or, where that is past, further on.
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
        found = main(options.points, server, Path(scratch), options.jobs)
    print(f"{'phase':<20}{'events':>8}{'points':>8}{'lost':>6}  what is going on")
    for phase, row in found["phases"].items():
        print(f"{phase:<20}{row['events']:>8}{row['points']:>8}{row['lost']:>6}  {PHASES[phase]}")
    for phase, number, wrong in found["lost"]:
        print(f"lost: {phase} {number}: {wrong}")
    print(json.dumps({name: value for name, value in found.items() if name != "lost"}))
    sys.exit(bool(found["lost"]))
