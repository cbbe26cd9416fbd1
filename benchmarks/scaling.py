"""How a PPO step scales over processes: measured for a few on this machine, modelled for more.

    python benchmarks/scaling.py --models DIR --output_dir DIR      # true shapes, 1 and 2 processes, A B A B, minutes
    python benchmarks/scaling.py --short --output_dir DIR           # smoke test: narrow models, one round
    python benchmarks/scaling.py --device cuda --processes 1 2 4 8 --batch_size 256 --mini_batch_size 64    # on GPUs

Each run is detox_ppo.py with the same prompts and max_new_tokens; accelerate launches it if it has several processes.
Each process has one thread (--threads). A run's first step is a warm-up and is not counted. The efficiency of N
processes is the seconds of one process divided by N times the seconds of N.

The model of a step's seconds with N processes:

    whole + shared / N + updates * (2 (N - 1) / N * gradients / bandwidth + 2 (N - 1) * latency)
          + (N - 1) / N * batch / bandwidth + (N - 1) * latency

`whole` does not shrink with N: rewards, Adam, and decoding, which runs position by position until the longest response
ends, however few rows there are. `whole` and `shared` are fitted to the two smallest measured numbers of processes,
less their modelled communication. In each update a ring passes the gradients (trained parameters in float32, 14 MB for
FLAN-T5-base) around twice. The batch (tokens, log-probabilities, values; 20 bytes per position) is gathered once per
step. The model assumes that all processes have the same speed and that communication does not overlap with
computation, which is true here. The last line of the output is one JSON object.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import memory
import step_time

LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --main_process_port 0 --mixed_precision no"
LAUNCH += " --dynamo_backend no --num_processes"
# (bandwidth in bytes per second, latency in seconds)
NETWORKS = {
    "1 Gbit/s Ethernet": (125e6, 100e-6),
    "10 Gbit/s Ethernet": (1.25e9, 50e-6),
    "NVLink, 100 GB/s": (100e9, 10e-6),
}
LOOPBACK = (2e9, 30e-6)  # an estimate for this machine
MODELLED = (1, 2, 4, 8, 16, 32)
PHASES = ("rollout", "reward", "gather", "optimize", "step")


def communication(processes, network, gradients, batch, updates):
    """Seconds of communication per step; gradients and batch in bytes, network as in NETWORKS."""
    bandwidth, latency = network
    share, hops = (processes - 1) / processes, processes - 1
    update = 2 * share * gradients / bandwidth + 2 * hops * latency
    gather = share * batch / bandwidth + hops * latency
    return updates * update + gather


def fit(seconds, sizes):
    """(whole, shared) seconds of a step, from the measurements with the two smallest numbers of processes."""
    few, more = sorted(seconds)[:2]
    seconds_few = seconds[few] - communication(few, LOOPBACK, **sizes)
    seconds_more = seconds[more] - communication(more, LOOPBACK, **sizes)
    shared = max(0.0, (seconds_few - seconds_more) / (1 / few - 1 / more))
    return max(0.0, seconds_few - shared / few), shared


def expected(processes, whole, shared, network, sizes):
    return whole + shared / processes + communication(processes, network, **sizes)


def launch(options, processes, arguments, label):
    """Run detox_ppo.py with this number of processes."""
    launcher = [*LAUNCH.split(), str(processes)] if processes > 1 else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment["ACCELERATE_USE_CPU"] = str(options.device == "cpu").lower()
    command = [sys.executable, *launcher, str(step_time.ROOT / "detox_ppo.py"), *arguments]
    run = subprocess.run(command, env=environment, cwd=step_time.ROOT, capture_output=True, text=True)
    if run.returncode:
        step_time.stop(f"{label}: {step_time.failure(run.returncode, run.stderr)}")


def measure(options, processes, arguments, scratch, label):
    """Run detox_ppo.py with this number of processes; returns the seconds of each timed step by phase."""
    output_dir, started = scratch / "run", time.perf_counter()
    if options.short and processes == 1:
        import detox_ppo

        with contextlib.redirect_stdout(io.StringIO()):
            step_time.run_without_report(detox_ppo.parse_config(arguments))
    else:
        launch(options, processes, arguments, label)
    actual = json.loads((output_dir / "results.json").read_text())["environment"]["num_processes"]
    if actual != processes:
        step_time.stop(f"{label} ran with {actual} processes")
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [{phase: line[f"time/{phase}"] for phase in PHASES} for line in lines[1:]]
    seconds = ", ".join(f"{step['step']:.2f}" for step in steps)
    print(f"{label}: {seconds} s per step ({time.perf_counter() - started:.0f} s in total)", flush=True)
    return steps


def modelled_efficiency(seconds):
    return [seconds[0] / (n * s) for n, s in zip(MODELLED, seconds, strict=True)]


def draw(points, lines, path):
    """Plot seconds per step and efficiency over the number of processes, measured and modelled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = (("#0072B2", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
    for (name, values), (colour, style) in zip(lines.items(), styles, strict=True):
        left.plot(MODELLED, values, style, color=colour, label=f"model: {name}")
        right.plot(MODELLED, modelled_efficiency(values), style, color=colour)
    counts = [point["processes"] for point in points]
    low = [point["seconds"] - point["least"] for point in points]
    high = [point["most"] - point["seconds"] for point in points]
    left.errorbar(
        counts, [point["seconds"] for point in points], [low, high], fmt="o", color="#D55E00", label="measured"
    )
    right.plot(counts, [point["efficiency"] for point in points], "o", color="#D55E00")
    for axes, title in ((left, "seconds per step"), (right, "efficiency")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(MODELLED, [str(n) for n in MODELLED])
        axes.set_xlabel("processes")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="DIR", help="directory written by tests/hub.py (default: create models)")
    parser.add_argument("--output_dir", default="checkpoints/scaling", help="for scaling.png and scaling.json")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="at least two numbers of processes")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each number of processes")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per run, after one warm-up step")
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--batch_size", type=int, help="default 16, with --short 8")
    parser.add_argument("--mini_batch_size", type=int, help="default 8, with --short 4")
    parser.add_argument("--prompt_tokens", type=int, help="length of all prompts (default: DialogSum's distribution)")
    parser.add_argument(
        "--response_lengths", nargs=2, type=int, metavar=("MIN", "MAX"), help="range of max_new_tokens (default 25 70)"
    )
    parser.add_argument("--short", action="store_true", help="smoke test for CI: narrow models, one round, one step")
    options = parser.parse_args()
    if len(set(options.processes)) < 2:
        parser.error("--processes: at least two different numbers")
    options.batch_size = options.batch_size or (8 if options.short else 16)
    options.mini_batch_size = options.mini_batch_size or (4 if options.short else 8)
    options.response_lengths = options.response_lengths or ([8, 12] if options.short else [25, 70])
    if options.short:
        options.rounds = options.steps = 1
    options.dialogues, options.seed = None, 0
    return options


@step_time.user_errors()
def main():
    options = parse_options()
    timed = {processes: [] for processes in options.processes}
    with tempfile.TemporaryDirectory(prefix="scaling_") as scratch:
        scratch = Path(scratch)
        directory, models = step_time.prepare(options, scratch, "threads per process")
        dataset, steps = step_time.make_plan(options, models, scratch)
        arguments = step_time.our_arguments(options, models, dataset, scratch / "run", options.dtype)
        for number in range(options.rounds):
            for processes in options.processes:
                label = f"round {number + 1}, --num_processes {processes}"
                timed[processes] += measure(options, processes, arguments, scratch, label)
        shape = json.loads((Path(models["base"]) / "config.json").read_text())

    positions = statistics.mean(len(step["prompts"]) * max(step["caps"]) for step in steps)
    sizes = {
        "gradients": 4 * (memory.adapter_parameters(shape, step_time.LORA_R) + shape["d_model"] + 1),
        "batch": 20 * positions,
        "updates": options.batch_size // options.mini_batch_size,
    }
    seconds = {n: statistics.median(step["step"] for step in steps) for n, steps in timed.items()}
    whole, shared = fit(seconds, sizes)
    points = []
    print(f"\n| processes | {' | '.join(f'{phase}, s' for phase in PHASES)} | efficiency |")
    print("|" + "---|" * (len(PHASES) + 2))
    fewest = min(seconds)
    for n in sorted(seconds):
        efficiency = seconds[fewest] * fewest / n / seconds[n]
        phases = {phase: statistics.median(step[phase] for step in timed[n]) for phase in PHASES}
        times = [step["step"] for step in timed[n]]
        print(f"| {n} | {' | '.join(f'{median:.2f}' for median in phases.values())} | {efficiency:.2f} |")
        spread = {"least": min(times), "most": max(times)}
        points.append({"processes": n, "seconds": seconds[n], "efficiency": efficiency, "phases": phases} | spread)
    lines = {}
    for name, network in NETWORKS.items():
        lines[name] = [expected(n, whole, shared, network, sizes) for n in MODELLED]
    print(f"\nModel: {whole:.2f} + {shared:.2f} / N seconds, {sizes['gradients'] / 1e6:.1f} MB per update")
    print(f"\n| modelled efficiency | {' | '.join(map(str, MODELLED))} |\n" + "|---" * (len(MODELLED) + 1) + "|")
    for name, values in lines.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in modelled_efficiency(values))} |")
    draw(points, lines, directory / "scaling.png")
    last = {"dtype": options.dtype, "short": options.short, "threads": options.threads, "points": points}
    last |= {"whole": whole, "shared": shared, **sizes, "model": {"processes": MODELLED, **lines}}
    (directory / "scaling.json").write_text(json.dumps(last, indent=2) + "\n")
    print(json.dumps(last))


if __name__ == "__main__":
    main()
