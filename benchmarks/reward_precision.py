"""How much does a classifier's output change with bfloat16 products, as used for the rewards of a bfloat16 policy?

    python benchmarks/reward_precision.py --reward_model_name MODEL --texts FILE [FILE ...]

Scores all text columns of csv and jsonl files in float32 and in bfloat16. Prints the change of P(toxic) and of the
logits, the number of texts whose P(toxic) crosses 0.5, and the seconds of both. Exit code 1 means that P(toxic) of a
text changes by 0.01 or more. On a CPU without bfloat16 units nothing changes.
"""

import argparse
import sys
import time
from pathlib import Path

import step_time  # puts the repository on sys.path
import torch

LARGEST = 0.01


def texts_of(path: Path, rows: int) -> list[str]:
    """The values with a space in the first rows of a csv or jsonl file."""
    import pandas as pd

    import detox_ppo

    with detox_ppo.as_user_error(str(path), "texts"):
        table = pd.read_json(path, lines=True) if path.suffix == ".jsonl" else pd.read_csv(path)
    table = table.head(rows)
    return [value for name in table for value in table[name] if isinstance(value, str) and " " in value]


@step_time.user_errors()
def main():
    import detox_ppo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_model_name", default=detox_ppo.DetoxConfig.reward_model_name)
    parser.add_argument("--reward_label", default=detox_ppo.DetoxConfig.reward_label)
    parser.add_argument("--toxic_label", default=detox_ppo.DetoxConfig.toxic_label)
    parser.add_argument("--texts", metavar="FILE", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=400, help="maximum per file")
    options = parser.parse_args()
    labels = {"reward_label": options.reward_label, "toxic_label": options.toxic_label}
    config = detox_ppo.DetoxConfig(reward_model_name=options.reward_model_name, **labels)
    classifier = detox_ppo.ToxicityClassifier(config, torch.device("cpu"))
    texts = [text for path in options.texts for text in texts_of(path, options.rows)]
    if not texts:
        step_time.stop("--texts: these files have no text of two words or more")
    results, seconds = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        start = time.perf_counter()
        logits = classifier.logits(texts, dtype)
        seconds[dtype] = time.perf_counter() - start
        results[dtype] = logits, torch.tensor(classifier.toxicity(logits))
    (logits, exact), (rounded_logits, rounded) = results.values()
    change, logits_change = (rounded - exact).abs(), (rounded_logits - logits).abs()
    print(f"{len(texts)} texts, {torch.get_num_threads()} threads, {step_time.processor()}")
    print(f"P({classifier.labels[classifier.toxic_index]}): mean {exact.mean():.4f}, std {exact.std():.4f}")
    print(f"  change: mean {change.mean():.5f}, 99% quantile {change.quantile(0.99):.5f}, maximum {change.max():.5f}")
    crossed, bias = ((exact > 0.5) != (rounded > 0.5)).sum(), (rounded - exact).mean()
    print(f"  {crossed} texts cross 0.5; the mean over all texts changes by {bias:+.6f}")
    print(f"logits: mean change {logits_change.mean():.4f}, maximum {logits_change.max():.4f}")
    print(f"seconds: {seconds[torch.float32]:.1f} in float32, {seconds[torch.bfloat16]:.1f} in bfloat16")
    sys.exit(0 if change.max() < LARGEST else 1)


if __name__ == "__main__":
    main()
