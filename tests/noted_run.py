"""The real command, which also records its process ID, the tokens that it samples and the texts that it scores.

python tests/noted_run.py DIRECTORY ARGUMENTS   # writes process.RANK, sampled.RANK.jsonl and scored.RANK.jsonl there
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import detox_ppo  # noqa: E402


def note(directory):
    """Setup call of a run (see forks.py)."""
    rank, sample = os.environ.get("RANK", 0), detox_ppo.generate
    logits = detox_ppo.ToxicityClassifier.logits
    (Path(directory) / f"process.{rank}").write_text(str(os.getpid()))

    def noted(policy, prompts, *args):
        responses = sample(policy, prompts, *args)
        with open(Path(directory) / f"sampled.{rank}.jsonl", "a") as file:
            for prompt, tokens, length in zip(
                prompts, responses.tokens.tolist(), responses.lengths.tolist(), strict=True
            ):
                print(json.dumps([prompt, tokens[:length]]), file=file)
        return responses

    def noted_logits(classifier, texts, *args):
        with open(Path(directory) / f"scored.{rank}.jsonl", "a") as file:
            file.writelines(json.dumps(text) + "\n" for text in texts)
        return logits(classifier, texts, *args)

    detox_ppo.generate, detox_ppo.ToxicityClassifier.logits = noted, noted_logits


if __name__ == "__main__":
    note(sys.argv[1])
    detox_ppo.main(sys.argv[2:])
