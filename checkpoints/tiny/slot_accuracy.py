"""Share of the dialogues' slots (item, place, time, ...) that a run's summaries mention, before and after.

    python checkpoints/tiny/slot_accuracy.py checkpoints/tiny-run/comparison.csv

Each dialogue is looked up in dialogues/train.csv. Its slots are the words of its human summary that are in the topic's
word lists in build.py.
"""

import argparse
import csv
import importlib.util
import itertools
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load_build():
    spec = importlib.util.spec_from_file_location("tiny_build", HERE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


def squeeze(text):
    return " ".join(text.split())


def slots_by_dialogue(train_csv):
    """The slot values of every dialogue, taken from its human summary."""
    slots = {}
    with open(train_csv, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = itertools.chain(*build.TOPICS[row["topic"]]["slots"].values())
            slots[squeeze(row["dialogue"])] = [value for value in values if build.mentions(row["summary"], value)]
    return slots


def slot_accuracy(dialogues, summaries, slots):
    """(share of the slots that the summaries mention, number of summaries); `slots` is by dialogue."""
    hits = total = count = 0
    for dialogue, summary in zip(dialogues, summaries, strict=True):
        values = slots.get(squeeze(dialogue))
        if values is None:
            continue
        count += 1
        total += len(values)
        hits += sum(build.mentions(squeeze(summary), value) for value in values)
    return (hits / total if total else float("nan")), count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path, help="comparison.csv of a run")
    parser.add_argument("--dialogues", type=Path, default=HERE / "dialogues" / "train.csv")
    args = parser.parse_args()
    with open(args.comparison, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    slots = slots_by_dialogue(args.dialogues)
    dialogues, shares = [row["dialogue"] for row in rows], {}
    for name in ("response_before", "response_after", "greedy_response_before", "greedy_response_after"):
        shares[name], shares["n"] = slot_accuracy(dialogues, [row[name] for row in rows], slots)
    if shares["n"] < len(rows):
        print(f"{len(rows) - shares['n']} of {len(rows)} dialogues are not in {args.dialogues}")
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
