"""Share of a dialogue's slots (item, place, time, ...) that a run's summaries name, before and after.

    python checkpoints/tiny/slot_accuracy.py checkpoints/tiny-run/comparison.csv

The dialogue in a query is looked up in dialogues/train.csv; its slots are the words that the human summary of
that row has in common with the topic's word lists in build.py.
"""

import argparse
import csv
import importlib.util
import json
import re
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
    """The slot values of every dialogue, read off its human summary."""
    found = {}
    with open(train_csv, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            lists = build.TOPICS[row["topic"]]["slots"].values()
            found[squeeze(row["dialogue"])] = [
                value for values in lists for value in values if build.names(row["summary"], value)
            ]
    return found


def dialogue_of(query):
    """The dialogue inside the prompt, or the query itself where it is the bare dialogue."""
    match = re.search(r"conversation\.\s*(.*?)\s*Summary:\s*$", query, re.DOTALL)
    return squeeze(match.group(1) if match else query)


def slot_accuracy(queries, summaries, slots):
    """(share of the slots that the summaries name, number of summaries); `slots` is by dialogue."""
    hits = total = count = 0
    for query, summary in zip(queries, summaries, strict=True):
        values = slots.get(dialogue_of(query))
        if values is None:
            continue
        count += 1
        total += len(values)
        hits += sum(build.names(squeeze(summary), value) for value in values)
    return (hits / total if total else float("nan")), count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path, help="comparison.csv of a run")
    parser.add_argument("--dialogues", type=Path, default=HERE / "dialogues" / "train.csv")
    args = parser.parse_args()
    with open(args.comparison, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    slots = slots_by_dialogue(args.dialogues)
    queries = [row["query"] for row in rows]
    before, count = slot_accuracy(queries, [row["response_before"] for row in rows], slots)
    after, _ = slot_accuracy(queries, [row["response_after"] for row in rows], slots)
    if count < len(rows):
        print(f"{len(rows) - count} of {len(rows)} queries are not in {args.dialogues}")
    print(f"slot accuracy before: {before:.4f} (n = {count})")
    print(f"slot accuracy after:  {after:.4f} (n = {count})")
    print(json.dumps({"before": before, "after": after, "n": count}))


if __name__ == "__main__":
    main()
