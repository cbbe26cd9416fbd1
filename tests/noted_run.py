"""The real command, which also records its process ID and the tokens that it samples.

python tests/noted_run.py DIRECTORY ARGUMENTS       # writes process.RANK and sampled.RANK.jsonl to the directory
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
    (Path(directory) / f"process.{rank}").write_text(str(os.getpid()))

    def noted(policy, prompts, *args):
        responses = sample(policy, prompts, *args)
        with open(Path(directory) / f"sampled.{rank}.jsonl", "a") as file:
            for prompt, tokens, length in zip(
                prompts, responses.tokens.tolist(), responses.lengths.tolist(), strict=True
            ):
                print(json.dumps([prompt, tokens[:length]]), file=file)
        return responses

    detox_ppo.generate = noted


if __name__ == "__main__":
    note(sys.argv[1])
    detox_ppo.main(sys.argv[2:])
