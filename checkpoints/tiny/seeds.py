"""Run the toy example with several seeds and print their results as a Markdown table.

    python checkpoints/tiny/seeds.py [--seeds 0 1 2 3 4] [--output_dir DIR] [options of detox_ppo.py]

Each run has its own process. Its directory and its log stay in output_dir, and an interrupted run resumes there.
"values explain" is the share of the returns' variance that the value head explains in the last 50 steps.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
from slot_accuracy import slot_accuracy, slots_by_dialogue

REPOSITORY = Path(__file__).resolve().parents[2]
LAST = 50  # steps over which the value head is evaluated


def summarize(directory: Path) -> dict[str, str]:
    """One row of the table, from the files of a run."""
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").open(encoding="utf-8")]
    steps = [step for step in steps if not step["ppo/skipped_steps"]]
    kl = [step["objective/kl"] for step in steps]
    # Pooled over the last steps, because one batch of equal rewards has almost no variance to explain.
    variance = [step["ppo/returns/var"] for step in steps[-LAST:]]
    unexplained = [(1 - step["ppo/val/var_explained"]) * step["ppo/returns/var"] for step in steps[-LAST:]]
    comparison = pd.read_csv(directory / "comparison.csv", keep_default_na=False)
    slots = slots_by_dialogue(Path(__file__).resolve().parent / "dialogues" / "train.csv")

    def slots_of(kind):
        accuracies = []
        for when in ("before", "after"):
            accuracy, _ = slot_accuracy(comparison["dialogue"], comparison[f"{kind}_{when}"], slots)
            accuracies.append(accuracy)
        return change(*accuracies)

    def change(before, after, digits=3):
        return f"{before:.{digits}f} → {after:.{digits}f}"

    def toxicity(block):
        statistics = block["summary_toxicity"]
        interval = "[{ci_low:+.2f}, {ci_high:+.2f}]".format(**statistics["paired_difference"])
        return f"{-statistics['reduction_percent']['mean']:+.1f}% {interval}"

    def rouge(block):
        return change(*(block["rouge"][when]["rougeL"] for when in ("before", "after")))

    def retrieval(block):
        return change(*(block["quality"][when]["retrieval_at_1"] for when in ("before", "after")))

    row = {"seed": str(results["config"]["seed"]), "sampled": toxicity(results), "greedy": toxicity(results["greedy"])}
    if "judge" in results:
        row |= {"judge, sampled": toxicity(results["judge"]), "judge, greedy": toxicity(results["judge"]["greedy"])}
    if "retrieval_at_1" in results["quality"]["after"]:
        row |= {"R@1": retrieval(results), "R@1, greedy": retrieval(results["greedy"])}
    return row | {
        "ROUGE-L": rouge(results),
        "ROUGE-L, greedy": rouge(results["greedy"]),
        "slots": slots_of("response"),
        "slots, greedy": slots_of("greedy_response"),
        "length": change(*(results["length"][when]["mean"] for when in ("before", "after")), 1),
        "KL last / largest": f"{kl[-1]:.2f} / {max(kl):.2f}",
        "values explain": f"{1 - sum(unexplained) / sum(variance):.0%}",
        "seconds": f"{results['timings']['total']:.0f}",  # including those before an interruption
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one run each")
    parser.add_argument("--output_dir", type=Path, default=Path("checkpoints/tiny-seeds"))
    arguments, options = parser.parse_known_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in arguments.seeds:
        directory = (arguments.output_dir / f"seed-{seed}").resolve()
        command = [sys.executable, "detox_ppo.py", "--config", "checkpoints/tiny/config.yaml", "--resume", *options]
        command += ["--seed", str(seed), "--output_dir", str(directory)]
        with open(arguments.output_dir / f"seed-{seed}.log", "w", encoding="utf-8") as log:
            subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, check=True)
        rows.append(summarize(directory))
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
