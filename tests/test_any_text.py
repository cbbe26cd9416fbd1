"""Prompts, masks and scores stay finite and aligned for any text. hypothesis searches for counterexamples."""

import csv
import json

import pandas as pd
import torch
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from detox_ppo import build_dataset, build_prompt, load_dialogues, parse_config

# Special cases for tokenizers, csv files and prompts, mixed with texts of any UTF-8 character.
PIECES = [
    "</s>",
    "<pad>",
    "<s>",
    "<unk>",
    "<extra_id_0>",
    "\nSummary:\n",
    "\0",
    "\r\n",
    '"',
    "'",
    ",",
    "\\",
    " ",
    "\ufeff",
]
PIECES += [
    "\u202e",
    "\u200d",
    "\u2028",
    "\x1b[31m",
    "שלום",
    "مرحبا",
    "👩‍👩‍👧",
    "e\u0301",
    "{}",
    "%s",
    "NaN",
    "#Person1#:",
]
texts = st.lists(st.text(max_size=20) | st.sampled_from(PIECES), min_size=1, max_size=12).map("".join).filter(len)
repeated = st.builds(lambda text, times: (text * times)[:2000], texts, st.sampled_from([1, 1, 3, 40, 400]))
rows = st.lists(st.tuples(repeated, texts), min_size=2, max_size=4)
# The same examples every time, limited to a few seconds.
bounded = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def options(**overrides):
    chosen = {"batch_size": 1, "mini_batch_size": 1, "eval_samples": 1, "input_min_text_length": 0} | overrides
    return parse_config([str(part) for name, value in chosen.items() for part in (f"--{name}", value)])


@bounded
@given(rows)
def test_prompts_and_masks(small, rows):
    dialogues, summaries = (list(column) for column in zip(*rows, strict=True))
    read = Dataset.from_dict({"row": range(len(rows)), "dialogue": dialogues, "summary": summaries})
    splits = build_dataset(read, small.tokenizer, options(input_max_text_length=2000, test_size=0.5))
    prepared = [*splits["train"], *splits["test"]]
    assert [row["row"] for row in prepared] == list(range(len(rows)))
    assert [(row["dialogue"], row["summary"]) for row in prepared] == rows
    assert [row["query"] for row in prepared] == [build_prompt(dialogue) for dialogue in dialogues]

    prompts, tokenizer = [row["input_ids"] for row in prepared], small.tokenizer
    size = small.policy.base.get_input_embeddings().num_embeddings
    for prompt in prompts:
        assert prompt[-1] == tokenizer.eos_token_id and prompt.count(tokenizer.eos_token_id) == 1
        assert tokenizer.pad_token_id not in prompt and 0 <= min(prompt) and max(prompt) < size
    ids, mask = small.policy.pad(prompts)
    assert ids.shape == mask.shape and ids.shape[1] >= max(map(len, prompts))
    for row, keep, prompt in zip(ids, mask.bool(), prompts, strict=True):
        assert row[keep].tolist() == prompt
        assert (row[~keep] == tokenizer.pad_token_id).all() and not keep[len(prompt) :].any()
    shortest = min(prompts, key=len)[:64]
    assert torch.isfinite(small.policy.encode([shortest])).all()


@bounded
@given(rows)
def test_scores(classifier, rows):
    joined = [classifier.join(dialogue, summary) for dialogue, summary in rows]
    for text, (dialogue, summary) in zip(joined, rows, strict=True):
        assert text.endswith(summary.strip())
        assert dialogue.strip().startswith(text.removesuffix(summary.strip()).rstrip())
    scores, toxicity = classifier.scores(joined), classifier.toxicity(classifier.logits(joined), "hate")
    assert scores.shape == (len(rows),) and scores.isfinite().all() and all(0 <= value <= 1 for value in toxicity)
    # The score of a text does not depend on the rest of the batch.
    alone = torch.cat([classifier.scores([text]) for text in joined])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-3)


@bounded
@given(rows)
def test_files(tmp_path_factory, rows):
    """Texts survive a csv or jsonl file character by character."""
    assume(all(text.strip() for row in rows for text in row))  # a text of only spaces is an empty cell
    directory = tmp_path_factory.mktemp("files")
    table = pd.DataFrame(rows, columns=["dialogue", "summary"])
    table.to_csv(directory / "a.csv", index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)
    lines = [json.dumps(row, ensure_ascii=len(rows) % 2 == 0) for row in table.to_dict("records")]
    (directory / "a.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    for name in ("a.csv", "a.jsonl"):
        assert [(row["dialogue"], row["summary"]) for row in load_dialogues(str(directory / name))] == rows
