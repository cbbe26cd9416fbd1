"""How the cost of a PPO step grows with the batch and with the prompt length: a table, a fit and a plot.

    python benchmarks/growth.py              # true shapes, ten to thirty minutes on 2 cores
    python benchmarks/growth.py --short      # smoke test: narrow models, two points per line, in this process

Each point is measured in its own process: one warm-up step and one timed step, with FLAN-T5-base's shapes and random
weights (see step_time.py). One line varies the batch size with DialogSum's prompts, the other the prompt length with
a batch of 8. The model of the cost is

    seconds = a * TFLOP + b * decoded positions

The first term is the step's arithmetic (step_time.step_flop) at a constant speed. The second is a constant time per
decoded position: each one reads all weights of the decoder, whatever the batch size. a and b are fitted to all points
by least squares of the relative errors.
The last line of the output is one JSON object.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import step_time

BATCHES, PROMPTS = (8, 16, 32, 64), (100, 200, 400, 700, 1000)


def measure(options, models, shapes, batch_size, prompt_tokens, scratch):
    """Time one step of ours: seconds, peak memory in MiB, arithmetic in TFLOP, and decoded positions."""
    options.batch_size, options.prompt_tokens = batch_size, prompt_tokens
    dataset, steps = step_time.make_plan(options, models, scratch)
    plan = {"dtype": options.dtype, "device": options.device, "steps": steps, **models}
    plan["arguments"] = step_time.our_arguments(options, models, dataset, scratch / "run", options.dtype)
    label = f"batch {batch_size}, prompts of {prompt_tokens or 'DialogSum'} tokens"
    if options.short:
        with contextlib.redirect_stdout(io.StringIO()):
            result = step_time.ours(plan)
    else:
        command = [sys.executable, step_time.__file__, "--child", "ours"]
        result = step_time.run_child(command, plan, scratch, options, label)
    prompts, timed = [len(prompt) for prompt in steps[-1]["prompts"]], result["steps"][-1]
    return {
        "batch_size": batch_size,
        "prompt_tokens": statistics.mean(prompts),
        "seconds": timed["seconds"]["step"],
        "memory": result["peak_memory"] / 2**20,
        "tflop": step_time.step_flop(shapes, prompts, timed["responses"], timed["classified"]) / 1e12,
        "positions": max(timed["responses"]),
    }


def fit(points):
    """Fit the two coefficients, and add the expected seconds to each point."""
    import numpy as np

    features = np.array([[point["tflop"], point["positions"]] for point in points])
    seconds = np.array([point["seconds"] for point in points])
    coefficients, *_ = np.linalg.lstsq(features / seconds[:, None], np.ones(len(points)), rcond=None)
    for point, expected in zip(points, features @ coefficients, strict=True):
        point["expected"] = float(expected)
    per_tflop, per_position = coefficients.tolist()
    return {"seconds_per_tflop": per_tflop, "seconds_per_position": per_position}


def draw(series, path):
    """Plot seconds (measured and fitted) and memory over the batch size and over the prompt length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    titles = {"batch_size": "prompts per batch", "prompt_tokens": "tokens per prompt"}
    for column, (name, title) in enumerate(titles.items()):
        points = series[name]
        xs = [point[name] for point in points]
        axes[0][column].plot(xs, [point["expected"] for point in points], "--", color="#0072B2", label="fit")
        axes[0][column].plot(xs, [point["seconds"] for point in points], "o", color="#D55E00", label="measured")
        axes[1][column].plot(xs, [point["memory"] for point in points], "o-", color="#D55E00")
        axes[1][column].set_xlabel(title)
    for row in axes:
        row[0].set_ylim(bottom=0)  # shared by both columns, so only after both are plotted
    axes[0][0].legend(frameon=False)
    axes[0][0].set_ylabel("seconds per step")
    axes[1][0].set_ylabel("peak memory, MiB")
    figure.savefig(path, dpi=120)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="DIR", help="directory written by tests/hub.py (default: create models)")
    parser.add_argument("--output_dir", default="checkpoints/growth", help="for growth.png and growth.json")
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--short", action="store_true", help="smoke test for CI: narrow models, two points per line")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    options = parser.parse_args()
    options.steps, options.seed, options.mini_batch_size, options.dialogues = 1, 0, 4, None
    options.response_lengths = [8, 12] if options.short else [25, 70]
    return options


@step_time.user_errors()
def main():
    options = parse_options()
    batches, prompts = (BATCHES[:2], PROMPTS[:2]) if options.short else (BATCHES, PROMPTS)
    with tempfile.TemporaryDirectory(prefix="growth_") as scratch:
        scratch = Path(scratch)
        directory, models = step_time.prepare(options, scratch)
        shapes = {name: json.loads((Path(path) / "config.json").read_text()) for name, path in models.items()}
        series = {
            "batch_size": [measure(options, models, shapes, batch, None, scratch) for batch in batches],
            "prompt_tokens": [measure(options, models, shapes, batches[0], tokens, scratch) for tokens in prompts],
        }
    coefficients = fit(series["batch_size"] + series["prompt_tokens"])
    print("\n| batch | tokens a prompt | TFLOP | seconds | fit | measured / fit | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for point in series["batch_size"] + series["prompt_tokens"]:
        print(
            f"| {point['batch_size']} | {point['prompt_tokens']:.0f} | {point['tflop']:.2f} | {point['seconds']:.1f} "
            f"| {point['expected']:.1f} | {point['seconds'] / point['expected']:.2f} | {point['memory']:.0f} |"
        )
    draw(series, directory / "growth.png")
    last = {"dtype": options.dtype, "short": options.short, **coefficients, **series}
    (directory / "growth.json").write_text(json.dumps(last, indent=2) + "\n")
    print(json.dumps(last))


if __name__ == "__main__":
    main()
