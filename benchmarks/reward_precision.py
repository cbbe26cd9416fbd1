"""How far do a classifier's answers move when its products are of bfloat16, as a bfloat16 policy's rewards are?

    python benchmarks/reward_precision.py --reward_model_name MODEL --texts FILE [FILE ...]

scores every text of these csv and jsonl files (each column of text) in float32 and in bfloat16, and prints how far
P(toxic) and the logits move, in how many texts P(toxic) crosses 0.5, and the seconds of both. Exit code 1: some
P(toxic) moves by 0.01 or more. On a CPU without units for bfloat16 nothing moves.
"""

import argparse
import sys
import time
from pathlib import Path

import step_time  # puts the repository on sys.path
import torch

LARGEST = 0.01


def texts_of(path: Path, rows: int) -> list[str]:
    """The texts of each column in the first rows of a file."""
    import pandas as pd

    import detox_ppo

    with detox_ppo.as_user_error(str(path), "texts"):
        table = (pd.read_json(path, lines=True) if path.suffix == ".jsonl" else pd.read_csv(path)).head(rows)
    return [value for name in table for value in table[name] if isinstance(value, str) and " " in value]


@step_time.refusals()
def main():
    import detox_ppo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_model_name", default=detox_ppo.DetoxConfig.reward_model_name)
    parser.add_argument("--reward_label", default=detox_ppo.DetoxConfig.reward_label)
    parser.add_argument("--toxic_label", default=detox_ppo.DetoxConfig.toxic_label)
    parser.add_argument("--texts", metavar="FILE", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=400, help="at most, of each file")
    options = parser.parse_args()
    labels = {"reward_label": options.reward_label, "toxic_label": options.toxic_label}
    config = detox_ppo.DetoxConfig(reward_model_name=options.reward_model_name, **labels)
    classifier = detox_ppo.ToxicityClassifier(config, torch.device("cpu"))
    texts = [text for path in options.texts for text in texts_of(path, options.rows)]
    if not texts:
        step_time.stop("--texts: no text of two words or more in these files")
    found, seconds = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        start = time.perf_counter()
        logits = classifier.logits(texts, dtype)
        seconds[dtype] = time.perf_counter() - start
        found[dtype] = logits, torch.tensor(classifier.toxicity(logits))
    (logits, exact), (rounded_logits, rounded) = found.values()
    moved, logits_moved = (rounded - exact).abs(), (rounded_logits - logits).abs()
    print(f"{len(texts)} texts, {torch.get_num_threads()} threads, {step_time.processor()}")
    print(f"P({classifier.labels[classifier.toxic_index]}): mean {exact.mean():.4f}, std {exact.std():.4f}")
    print(f"  moves by {moved.mean():.5f} in the mean, {moved.quantile(0.99):.5f} in 99%, {moved.max():.5f} at most")
    crossed, bias = ((exact > 0.5) != (rounded > 0.5)).sum(), (rounded - exact).mean()
    print(f"  crosses 0.5 in {crossed} of them; their mean moves by {bias:+.6f}")
    print(f"logits move by {logits_moved.mean():.4f} in the mean, {logits_moved.max():.4f} at most")
    print(f"seconds: {seconds[torch.float32]:.1f} in float32, {seconds[torch.bfloat16]:.1f} in bfloat16")
    sys.exit(0 if moved.max() < LARGEST else 1)


if __name__ == "__main__":
    main()
