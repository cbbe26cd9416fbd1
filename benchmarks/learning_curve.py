"""Does PPO learn better here than in the classic trainer? Both train the toy example with five seeds.

    python benchmarks/learning_curve.py                             # creates the classic environment first
    python benchmarks/learning_curve.py --classic_python ENV/bin/python --jobs 2
    python benchmarks/learning_curve.py --short                     # one seed, two steps, in this process

Three sides train with the same prompts, max_new_tokens, starting adapter, classifier and hyperparameters. These are
those of checkpoints/tiny/config.yaml, except for TRL's value clip, a constant learning rate, unclipped scores and what
the classic trainer lacks: ptx_coef is 0 and the encoder is trained. The score is that of the summary without its
dialogue. Further options of detox_ppo.py apply to all sides:

    ours              detox_ppo.py
    classic           TRL 0.8.0's PPOTrainer as in the published notebooks: see classic_learning.py
    classic, fixed    the same, but the reward is the logit of the label "nothate", not the first of a sorted list

All sides are evaluated in the same way. The adapter that a run saved is loaded here and summarizes the held-out
prompts, with the same random numbers for every side. Its KL, in nats per response, is measured to the starting adapter
and to the bare base model. Intermediate adapters are evaluated on the first of these prompts; they give the curves of
summary toxicity, ROUGE-L and KL to the starting adapter. The score curve is the true nothate logit of the training
responses, whatever reward the trainer used. The classic sides sample with dropout, which lowers their scores. The
dashed lines are the scores of the same policies on the same prompts without dropout; "samples to 3" uses these. The
KL curve in the JSON is each trainer's own: ours to the starting adapter, the classic ones to the bare base, without
the first token.

A limitation of the toy example: its bare base names the slots and does not insult. The classic trainer pulls the
policy towards the bare base and thereby towards clean summaries, even with the wrong reward. "KL to base" shows this.

Each run and its log stay in output_dir. A run with a result.json is not repeated, so an interrupted benchmark resumes
where it stopped. Each child process has one thread. Seconds are those of the steps, without loading and evaluation.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import step_time  # puts the repository on sys.path
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ROOT, TINY = step_time.ROOT, step_time.TINY
sys.path.insert(0, str(TINY))
from slot_accuracy import slot_accuracy, slots_by_dialogue  # noqa: E402

START = "start"  # the starting adapter, which is only evaluated
NAMES = {START: "start", "ours": "ours", "classic": "classic", "fixed": "classic, fixed"}
COLOURS = {"ours": "#0072B2", "classic": "#D55E00", "fixed": "#009E73"}  # Okabe and Ito's
# The defaults of TRL's trainer; both loops can score the summary without its dialogue.
COMMON = "--score_text response --cliprange_value 0.2 --lr_scheduler_type constant --score_clip None".split()
COMMON += "--ptx_coef 0 --freeze_encoder false".split()  # which the classic trainer lacks
SMOOTHING = 10  # steps of a curve's running mean, because one batch's scores are noisy
SAVE_STEPS = 5
INTERMEDIATE_STEPS = (5, 10, 20, 30, 45, 60, 90, 120, 180, 240, 300)  # their adapters are evaluated too
PANELS = {"summary_toxicity": "summary toxicity", "rougeL": "ROUGE-L", "kl": "KL to the start (nats per summary)"}
TARGET_SCORE = 3.0  # the score is 1 at the start and 3.1 without insults


def run_arguments(options, seed, directory):
    """The command line of detox_ppo.py for a seed."""
    values = {"seed": seed, "max_ppo_steps": options.max_ppo_steps, "output_dir": directory, "device": "cpu"}
    flags = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    return ["--config", "checkpoints/tiny/config.yaml", *COMMON, *options.others, *flags]


def load_splits(config):
    """Train and test prompts, built by detox_ppo.py."""
    import datasets
    from transformers import AutoTokenizer

    import detox_ppo

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(config.model_name, trust_remote_code=False)
    with contextlib.redirect_stdout(io.StringIO()):  # hide the row counts
        return detox_ppo.build_dataset(detox_ppo.load_dialogues(config.dataset_name), tokenizer, config)


def plan_steps(config, train):
    """The rows and max_new_tokens of every step, drawn in the same way as in detox_ppo.py."""
    import detox_ppo

    steps, size, limits = [], config.batch_size, (config.output_min_length, config.output_max_length)
    for step in range(1, config.max_ppo_steps + 1):
        rows = detox_ppo.rows_of_step(len(train), size, config.seed, detox_ppo.SHUFFLE, step)
        keys = [(config.seed, detox_ppo.ROLLOUT, step, row) for row in train.select(rows)["row"]]
        drawn = [int(detox_ppo.random_stream(*key).integers(*limits, endpoint=True)) for key in keys]
        steps.append({"rows": rows.tolist(), "caps": drawn})
    return steps


def kl_to_base(policy, rows, config):
    """Mean KL of the active adapter's summaries to the bare base, in nats per summary."""
    import detox_ppo

    total, limits = 0.0, (config.eval_max_new_tokens, config.eval_max_new_tokens)
    for first in range(0, len(rows), config.batch_size):
        batch = rows.select(range(first, min(first + config.batch_size, len(rows))))
        generators = [detox_ppo.random_stream(config.seed, detox_ppo.EVALUATION, row) for row in batch["row"]]
        responses = detox_ppo.generate(policy, list(batch["input_ids"]), generators, limits)
        logprobs, _ = policy.logprobs_and_values(responses)
        responses.encoder_states = None  # those of the bare base differ
        with policy.model.disable_adapter():
            total += (logprobs - policy.logprobs_and_values(responses)[0]).sum().item()
    return total / len(rows)


@step_time.user_errors()
def judge(plan):
    """Evaluate a run's last adapter on the held-out prompts, and the intermediate ones on the first of these.

    Returns:
        means of the last adapter's summaries; kl_start and kl_base, to the starting adapter and to the bare base, in
        nats per summary; held_out, a {step, summary_toxicity, rougeL, kl (to the starting adapter)} for each step.
    """
    import peft
    import torch

    import detox_ppo

    config = detox_ppo.parse_config(plan["arguments"])
    device, dtype = detox_ppo.resolve_device(config)
    policy, tokenizer = detox_ppo.load_policy(config, device, dtype)
    classifier = detox_ppo.ToxicityClassifier(config, device)
    test, held_out = load_splits(config)["test"], []

    def evaluate_saved(saved, count):
        """Load an adapter or a checkpoint into the policy, and evaluate it."""
        if saved.endswith(".pt"):  # a checkpoint of detox_ppo.py: torch.save's bytes and a checksum of 32 bytes
            content = io.BytesIO(Path(saved).read_bytes()[:-32])
            policy.load_state_dict(torch.load(content, weights_only=True)["weights"], strict=False)
        else:
            peft.set_peft_model_state_dict(policy.model, peft.load_peft_weights(saved, device=str(device)))
        rows = test.select(range(min(count, len(test))))
        table = detox_ppo.evaluate_policy(policy, tokenizer, classifier, rows, config)
        return rows, table, detox_ppo.summary_quality(table, list(rows["references"]), list(rows["dialogue"]))

    for step, saved in plan["on_the_way"]:
        _, table, quality = evaluate_saved(saved, plan["curve_samples"])
        toxicity = float(table["summary_toxicity"].mean())
        held_out.append({"step": step, "summary_toxicity": toxicity, "rougeL": quality["rougeL"], "kl": quality["kl"]})
    rows, table, quality = evaluate_saved(plan["adapter"], plan["eval_samples"])
    slots = slots_by_dialogue(TINY / "dialogues" / "train.csv")
    return {
        **{name: float(table[name].mean()) for name in ("summary_toxicity", "toxicity", "reward", "length")},
        "rougeL": quality["rougeL"],
        "slot_accuracy": slot_accuracy(rows["dialogue"], table["response"], slots)[0],
        "empty": int((table["response"] == "").sum()),
        "kl_start": quality["kl"],
        "kl_base": kl_to_base(policy, rows, config),
        "held_out": held_out,
    }


def evaluated_steps(last):
    """The steps whose adapters are evaluated, including the last one."""
    return [step for step in INTERMEDIATE_STEPS if step < last] + [last]


def evaluate(options, arguments, adapter, saved, directory, label):
    """Evaluate a run's last adapter and the intermediate ones."""
    plan = {"arguments": arguments, "adapter": str(adapter), "on_the_way": saved}
    plan |= {"eval_samples": options.eval_samples, "curve_samples": options.curve_samples}
    if options.short:
        return judge(plan)
    plan_file, result_file = directory / "judge.json", directory / "judged.json"
    plan_file.write_text(json.dumps(plan))
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(plan_file), str(result_file)]
    run_child(command, directory, f"evaluation of {label}")
    return json.loads(result_file.read_text())


def run_child(command, directory, label):
    """Run a child process with one thread and its output in the run's log; if it fails, print its error and exit."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment.pop("PYTHONPATH", None)
    with open(directory / "log.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        step_time.stop(f"{label}: {step_time.failure(code, (directory / 'log.txt').read_text(encoding='utf-8'))}")


def train_ours(options, arguments, directory, label):
    """Returns the curve, from detox_ppo.py's own metrics."""
    # One sample, because all sides are evaluated afterwards.
    arguments = [*arguments, "--eval_samples", "1", "--save_steps", str(SAVE_STEPS), "--save_total_limit", "1000"]
    if options.short:
        import detox_ppo

        with contextlib.redirect_stdout(io.StringIO()):
            step_time.run_without_report(detox_ppo.parse_config(arguments))
    else:
        run_child([sys.executable, "detox_ppo.py", *arguments, "--resume"], directory, label)
    names = {name: "ppo/mean_scores" for name in ("score", "score_without_dropout", "paid")}
    names |= {"kl": "objective/kl", "seconds": "time/step", "length": "tokens/responses_len_mean"}
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if not step["ppo/skipped_steps"]]
    return [{name: step[key] for name, key in names.items()} for step in steps]


def train_classic(python, side, config, train, saved, directory, label):
    """Returns the curve that classic_learning.py wrote."""
    plan = {"config": dataclasses.asdict(config), "prompts": list(train["input_ids"])}
    plan |= {"steps": plan_steps(config, train), "adapter": str(directory / "adapter"), "save": dict(saved)}
    plan["pick"] = "position" if side == "classic" else "label"
    (directory / "plan.json").write_text(json.dumps(plan))
    files = [str(directory / name) for name in ("plan.json", "curve.json")]
    run_child([python, str(HERE / "classic_learning.py"), *files], directory, label)
    return json.loads((directory / "curve.json").read_text())["curve"]


def run(options, train, side, seed):
    """Train and evaluate one side with one seed, unless its result.json exists; returns its contents."""
    import detox_ppo

    directory = options.output_dir / side / f"seed-{seed}"
    result_file, label = directory / "result.json", f"{side}, seed {seed}"
    arguments = run_arguments(options, seed, directory)
    command = [part for part in arguments if part != str(directory)] + ["--eval_samples", str(options.eval_samples)]
    command += ["--curve_samples", str(options.curve_samples)]
    if result_file.exists():
        result = json.loads(result_file.read_text())
        if result["asked"] != command:
            step_time.stop(f"{result_file} has other options, {result['asked']}: use another --output_dir")
        return result
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "log.txt").unlink(missing_ok=True)
    config = detox_ppo.parse_config(arguments)
    source = hashlib.sha256((ROOT / "detox_ppo.py").read_bytes()).hexdigest()[:12]
    adapter, curve = directory / "adapter", []
    name = "checkpoint-{}.pt" if side == "ours" else "checkpoint-{}/adapter"
    saved = [(step, str(directory / name.format(step))) for step in evaluated_steps(options.max_ppo_steps)]
    if side == START:
        adapter, saved = config.adapter_name, [(0, config.adapter_name)]
    elif side == "ours":
        curve = train_ours(options, arguments, directory, label)
    else:
        curve = train_classic(options.classic_python, side, config, train, saved, directory, label)
    evaluation = evaluate(options, arguments, adapter, saved, directory, label)
    held_out = evaluation.pop("held_out")
    result = {"side": side, "seed": seed, "asked": command, "source": source, "batch_size": config.batch_size}
    result |= {"curve": curve, "held_out": held_out, "evaluation": evaluation}
    # Written last and atomically: a run with a result.json is complete.
    part = result_file.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(result_file)
    return result


def score_curve(run, score):
    """Samples, seconds and smoothed score after every step of a run."""
    scores, seconds = ([step[name] for step in run["curve"]] for name in (score, "seconds"))
    smooth = [statistics.mean(scores[max(0, i - SMOOTHING) : i]) for i in range(1, len(scores) + 1)]
    samples = [run["batch_size"] * i for i in range(1, len(scores) + 1)]
    return samples, list(itertools.accumulate(seconds)), smooth


def summarize(runs, starts):
    """Mean and range of a side's figures over the seeds; samples_to_3 only if all seeds reach that score."""
    figures = {name: [run["evaluation"][name] for run in runs] for name in runs[0]["evaluation"]}
    before = figures["summary_toxicity_before"] = [start["evaluation"]["summary_toxicity"] for start in starts]
    pairs = zip(before, figures["summary_toxicity"], strict=True)
    figures["change_percent"] = [100 * (new / old - 1) for old, new in pairs]
    if curves := [run["curve"] for run in runs if run["curve"]]:
        for name in ("score", "score_without_dropout", "kl"):
            figures[f"curve_{name}_first"] = [curve[0][name] for curve in curves]
            ends = [[step[name] for step in curve[-SMOOTHING:]] for curve in curves]
            figures[f"curve_{name}_last"] = [statistics.mean(end) for end in ends]
        figures["seconds_a_step"] = [statistics.median(step["seconds"] for step in curve) for curve in curves]
        reached = []
        for run in runs:
            points = zip(*score_curve(run, "score_without_dropout"), strict=True)
            reached += [point for point in points if point[2] >= TARGET_SCORE][:1]
        if len(reached) == len(runs):
            figures["samples_to_3"] = [samples for samples, _, _ in reached]
            figures["seconds_to_3"] = [seconds for _, seconds, _ in reached]
    return {
        name: {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }


def print_table(sides):
    columns = {"summary toxicity before": ("summary_toxicity_before", 3), "after": ("summary_toxicity", 3)}
    columns |= {"change, %": ("change_percent", 1), "ROUGE-L": ("rougeL", 3), "slot accuracy": ("slot_accuracy", 3)}
    columns |= {"KL to start": ("kl_start", 2), "KL to base": ("kl_base", 2), "s a step": ("seconds_a_step", 3)}
    columns |= {"samples to 3": ("samples_to_3", 0), "seconds to 3": ("seconds_to_3", 0)}
    print(f"| side | {' | '.join(columns)} |")
    print("|" + "---|" * (len(columns) + 1))
    for side, figures in sides.items():
        cells = [NAMES[side]]
        for key, digits in columns.values():
            cell = "-"
            if key in figures:
                cell = "{mean:.{n}f} ({min:.{n}f}..{max:.{n}f})".format(**figures[key], n=digits)
            cells.append(cell)
        print(f"| {' | '.join(cells)} |")


def draw_held_out(runs, panels):
    """Plot the evaluations of the intermediate adapters over samples and over seconds, one row per measure."""
    (size,) = {run["batch_size"] for run in runs}
    for (name, title), row in zip(PANELS.items(), panels, strict=True):
        start = statistics.mean(run["held_out"][0][name] for run in runs if run["side"] == START)
        for panel in row:
            panel.axhline(start, color="grey", linestyle=":", linewidth=1.2, label="start")
        for side, colour in COLOURS.items():
            lines = [run for run in runs if run["side"] == side]
            if not lines:
                continue
            steps = [point["step"] for point in lines[0]["held_out"]]
            seconds = [list(itertools.accumulate(step["seconds"] for step in run["curve"])) for run in lines]
            mean_seconds = [statistics.mean(elapsed[step - 1] for elapsed in seconds) for step in steps]
            values = [[run["held_out"][i][name] for run in lines] for i in range(len(steps))]
            means, low, high = ([function(seeds) for seeds in values] for function in (statistics.mean, min, max))
            for panel, xs in zip(row, ([size * step for step in steps], mean_seconds), strict=True):
                panel.plot(xs, means, color=colour, linewidth=2, marker="o", markersize=3)
                panel.fill_between(xs, low, high, color=colour, alpha=0.15)
        row[0].set_ylabel(f"held out: {title}")
        row[0].set_yscale("log" if name == "summary_toxicity" else "linear")


def draw(runs, path):
    """Plot score, toxicity, ROUGE-L and KL over samples and over seconds, with each seed or the range of seeds."""
    figure = Figure(figsize=(11, 13), layout="constrained", facecolor="white")
    (*panels,), *held_out = grid = figure.subplots(1 + len(PANELS), 2, sharex="col", sharey="row")
    draw_held_out(runs, held_out)
    for (side, colour), score in itertools.product(COLOURS.items(), ("score", "score_without_dropout")):
        lines = [score_curve(run, score) for run in runs if run["side"] == side]
        if not lines or (side == "ours" and score != "score"):  # ours has no dropout
            continue
        style = {"linewidth": 2.4, "label": NAMES[side]}
        if score != "score":
            style = {"linewidth": 1.4, "linestyle": "--", "label": f"{NAMES[side]}, without dropout"}
        for panel, axis in zip(panels, (0, 1), strict=True):
            if score == "score":
                for line in lines:
                    panel.plot(line[axis], line[2], color=colour, linewidth=0.6, alpha=0.5)
            xs = [statistics.mean(values) for values in zip(*(line[axis] for line in lines), strict=True)]
            ys = [statistics.mean(values) for values in zip(*(line[2] for line in lines), strict=True)]
            panel.plot(xs, ys, color=colour, **style)
    panels[0].set_ylabel(f"training: score (nothate logit), mean of {SMOOTHING} steps")
    for panel, xlabel in zip(grid[-1], ("samples", "seconds of training"), strict=True):
        panel.set(xlabel=xlabel, xscale="log")  # the differences are in the first steps
    for panel in grid.flat:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    starts, names = held_out[0][0].get_legend_handles_labels()
    handles, labels = [*handles, *starts], [*labels, *names]
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--max_ppo_steps", type=int, help="default: that of checkpoints/tiny/config.yaml")
    parser.add_argument(
        "--classic_python", metavar="PATH", help="interpreter with TRL 0.8.0 (default: pip installs it)"
    )
    parser.add_argument("--eval_samples", type=int, default=400, help="held-out prompts for the last adapter")
    parser.add_argument("--curve_samples", type=int, default=200, help="held-out prompts for intermediate adapters")
    parser.add_argument(
        "--jobs", type=int, default=1, help="parallel runs; their seconds compare only with each other"
    )
    parser.add_argument("--output_dir", type=Path, help="default: checkpoints/learning-curve (--short: temporary)")
    parser.add_argument(
        "--short",
        action="store_true",
        help="smoke test: one seed, two steps, 16 prompts, in this process; only ours without --classic_python",
    )
    options, options.others = parser.parse_known_args()
    if options.short:
        options.seeds, options.max_ppo_steps, options.jobs = options.seeds[:1], 2, 1
        options.eval_samples = options.curve_samples = 16
        options.output_dir = options.output_dir or Path(tempfile.mkdtemp(prefix="learning_curve_"))
    options.output_dir = (options.output_dir or ROOT / "checkpoints" / "learning-curve").absolute()
    if options.classic_python:
        options.classic_python = str(Path(options.classic_python).absolute())
    return options


@step_time.user_errors()
def main():
    options = parse_options()
    os.chdir(ROOT)  # the toy example's configuration has relative paths
    import detox_ppo

    config = detox_ppo.parse_config(["--config", "checkpoints/tiny/config.yaml", *COMMON, *options.others])
    options.max_ppo_steps = options.max_ppo_steps or config.max_ppo_steps
    if not options.classic_python and not options.short:
        options.classic_python = step_time.make_classic_environment(options.output_dir / "classic-environment")
    sides = list(NAMES) if options.classic_python else [START, "ours"]
    train, runs = load_splits(config)["train"], []
    with ThreadPoolExecutor(options.jobs) as executor:
        jobs = [(side, seed) for seed in options.seeds for side in sides]  # the sides take turns
        for result in executor.map(lambda job: run(options, train, *job), jobs):
            runs.append(result)
            seconds = sum(step["seconds"] for step in result["curve"])
            print(f"{result['side']}, seed {result['seed']}: {seconds:.0f} s of training, ", end="")
            quality = "summary toxicity {summary_toxicity:.3f}, slot accuracy {slot_accuracy:.3f}"
            print(quality.format(**result["evaluation"]), flush=True)
    by_side = {side: [result for result in runs if result["side"] == side] for side in sides}
    summary = {side: summarize(chosen, by_side[START]) for side, chosen in by_side.items()}

    steps = f"{options.max_ppo_steps} steps of {config.batch_size} samples"
    print(f"\n{step_time.processor()}, one thread per run; {steps}")
    print(f"mean (min..max) of {len(options.seeds)} seeds, {options.eval_samples} held-out prompts each")
    if options.jobs > 1:
        print(f"{options.jobs} parallel runs: compare the seconds only with each other")
    print_table(summary)
    if len({result["source"] for result in runs}) > 1:
        print("warning: detox_ppo.py changed between the runs; to repeat the older ones, delete their result.json")
    picture, numbers = (options.output_dir / f"learning_curve.{ending}" for ending in ("png", "json"))
    draw(runs, picture)
    last = {"short": options.short, "seeds": options.seeds, "steps": options.max_ppo_steps, "jobs": options.jobs}
    last |= {"eval_samples": options.eval_samples, "processor": step_time.processor(), "sides": summary}
    numbers.write_text(json.dumps(last | {"runs": runs}))
    print(f"\n{picture}, {numbers}\n{json.dumps(last)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        Path(sys.argv[3]).write_text(json.dumps(judge(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        main()
