"""From rows of DialogSum to prompts: reading, length filter and split. Invalid files: test_bad_input.py."""

import json

import pandas as pd
import pytest
from datasets import Dataset
from transformers import BatchEncoding

from detox_ppo import UserError, build_dataset, build_prompt, load_dialogues, parse_config

ROWS = [
    {"dialogue": '#Person1#: "Hello", he said.\n#Person2#: Hi, you.', "summary": "They greet."},
    {"dialogue": "NA", "summary": "null"},  # pandas parses these as missing values by default
    {"dialogue": " 0012 ", "summary": "1e3"},
    {"dialogue": "שלום עולם 😀\u2028</s> <pad>", "summary": "naïve"},
]


class CountingTokenizer:
    """A cheap tokenizer: the only token of a text is its length."""

    all_special_ids, unk_token_id = (), None

    def __call__(self, texts, **kwargs):
        ids = [[len(text)] for text in texts]
        return BatchEncoding({"input_ids": ids, "special_tokens_mask": [[0]] * len(ids)})


def config(**overrides):
    options = {"batch_size": 1, "mini_batch_size": 1, "eval_samples": 1} | overrides
    return parse_config([str(part) for name, value in options.items() for part in (f"--{name}", value)])


def as_rows(dialogues, summaries):
    """A dataset as load_dialogues returns it."""
    return Dataset.from_dict({"row": range(len(dialogues)), "dialogue": dialogues, "summary": summaries})


def built(lengths, **overrides):
    dialogues = [chr(97 + i % 26) * length for i, length in enumerate(lengths)]
    summaries = [f"summary {i}" for i in range(len(lengths))]
    return build_dataset(as_rows(dialogues, summaries), CountingTokenizer(), config(**overrides))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# Reading


def test_csv_jsonl_and_directory_give_the_same_texts(tmp_path):
    expected = [{"row": i, **row, "references": [row["summary"]]} for i, row in enumerate(ROWS)]
    for kind in ("csv", "jsonl"):
        directory = tmp_path / kind
        directory.mkdir()
        path = directory / f"train.{kind}"
        if kind == "csv":
            pd.DataFrame(ROWS).to_csv(path, index=False)
        else:
            write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
        assert load_dialogues(str(path)).to_list() == expected
        assert load_dialogues(str(directory)).to_list() == expected


def test_other_columns_byte_order_mark_and_blank_lines_are_ignored(tmp_path):
    expected = [{"row": 0, "dialogue": "hello", "summary": "greeting", "references": ["greeting"]}]
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbfdialogue,id,summary\nhello,7,greeting\n")
    assert load_dialogues(path).to_list() == expected
    path = write(tmp_path / "a.jsonl", '\ufeff{"summary": "greeting", "id": 7, "dialogue": "hello"}\n\n \n')
    assert load_dialogues(path).to_list() == expected


def test_directory_uses_only_the_training_file(tmp_path):
    write(tmp_path / "train.csv", "dialogue,summary\ntraining,a\n")
    write(tmp_path / "test.csv", "dialogue,summary\ntest,b\n")
    write(tmp_path / "README.md", "x")
    assert load_dialogues(str(tmp_path))["dialogue"] == ["training"]


# Prompts and splits


def test_length_filter_is_open_below_and_closed_above():
    splits = built([199, 200, 201, 500, 999, 1000, 1001])
    rows = [*splits["train"], *splits["test"]]
    assert [row["row"] for row in rows] == [2, 3, 4, 5]
    assert [len(row["dialogue"]) for row in rows] == [201, 500, 999, 1000]
    assert [row["summary"] for row in rows] == ["summary 2", "summary 3", "summary 4", "summary 5"]


def test_length_filter_follows_the_options():
    splits = built([9, 10, 11, 12, 13], input_min_text_length=10, input_max_text_length=12)
    assert [*splits["train"]["row"], *splits["test"]["row"]] == [2, 3]


def test_prompt_text():
    expected = "\nSummarize the following conversation.\n\n#Person1#: Hi.\n#Person2#: Ho.\n\nSummary:\n"
    assert build_prompt("#Person1#: Hi.\n#Person2#: Ho.") == expected


def test_columns_hold_the_prompt_and_its_ids():
    splits = built([250, 300])
    assert set(splits) == {"train", "test"}
    assert set(splits["train"].column_names) == {"row", "dialogue", "summary", "query", "input_ids"}
    row = splits["train"][0]
    assert row["query"] == "\nSummarize the following conversation.\n\n" + "a" * 250 + "\n\nSummary:\n"
    assert row["input_ids"] == [len(row["query"])]


def test_dialogsum_splits_into_8017_and_2005_in_file_order():
    # As DialogSum's 12,460 training rows: 10,022 of them have an accepted length.
    lengths = [300 if i % 5 else 1500 for i in range(12460)]
    lengths[:540:5] = [300] * 54 + [150] * 54
    assert sum(200 < length <= 1000 for length in lengths) == 10022
    splits = built(lengths)
    assert (len(splits["train"]), len(splits["test"])) == (8017, 2005)
    rows = [*splits["train"]["row"], *splits["test"]["row"]]
    assert rows == sorted(rows)


def test_split_follows_test_size():
    splits = built([300] * 20, test_size=0.25)
    assert [*splits["train"]["row"]] == [*range(15)] and [*splits["test"]["row"]] == [*range(15, 20)]


def data_complaint(lengths, **overrides):
    with pytest.raises(UserError) as error:
        built(lengths, **overrides)
    return str(error.value)


def test_no_rows_left_after_the_filter():
    message = data_complaint([10, 20, 3000], dataset_name="some/where")
    for word in ("some/where", "3 rows, 0 with 200 <", "<= 1000", "input_min_text_length", "input_max_text_length"):
        assert word in message
    assert "0 rows" in data_complaint([])


@pytest.mark.parametrize("without", [[3, *range(10, 20)], [1, 3], range(20)], ids=str)
def test_sft_needs_summaries_in_the_training_rows_alone(without, capsys):
    """Of 20 rows the last 10 are evaluated."""
    rows = as_rows(["x" * 300] * 20, ["" if i in without else "summary" for i in range(20)])

    def split(**options):
        return build_dataset(rows, CountingTokenizer(), config(test_size=0.5, **options))

    assert len(split()["train"]) == 10  # PPO needs none
    empty = [i for i in without if i < 10]
    if len(empty) > 1:
        words = rf"{len(empty)} of 10 rows have no summary \(rows {empty[0] + 1}, {empty[1] + 1}"
        with pytest.raises(UserError, match=f"--dataset_name .*{words}"):
            split(sft_steps=1, sft_batch_size=1)
        return
    splits = split(sft_steps=1, sft_batch_size=1)
    assert splits["train"]["row"] == [i for i in range(10) if i not in empty]
    assert splits["test"]["row"] == [*range(10, 20)]
    assert "1 of 10 rows have no summary (rows 4 ...): left out" in capsys.readouterr().out


def test_fewer_rows_than_the_options_ask_for():
    asked = {"eval_samples": 5, "batch_size": 17, "sft_batch_size": 17}
    for (name, size), there in zip(asked.items(), ("4 test rows", "16 train rows", "16 train rows"), strict=True):
        message = data_complaint([300] * 20, sft_steps=1, **{name: size})
        assert f"--{name} {size}" in message and there in message
    built([300] * 20, eval_samples=4, batch_size=16, sft_steps=1, sft_batch_size=16)  # just enough
    built([300] * 20, sft_batch_size=17)  # without SFT it uses no rows
    built([300] * 20, batch_size=17, max_ppo_steps=0)  # without PPO steps there is no batch


def test_test_size_that_leaves_no_training_rows():
    assert "test_size" in data_complaint([300] * 3, test_size=0.9)


def test_prompt_has_one_eos_even_if_the_dialogue_spells_it(small):
    texts = ["</s>", "<pad>", "a </s> b <pad></s>", "😀👩‍👩‍👧", "שלום עולם", "مرحبا", "<unk>", "\u0000\u200f"]
    dialogues = [f"#Person1#: {text} {'and so on ' * 25}{text}" for text in texts]
    splits = build_dataset(as_rows(dialogues, texts), small.tokenizer, config())
    prompts = [*splits["train"]["input_ids"], *splits["test"]["input_ids"]]
    assert len(prompts) == len(texts)
    for ids in prompts:
        assert ids.count(small.tokenizer.eos_token_id) == 1 and ids[-1] == small.tokenizer.eos_token_id
        assert small.tokenizer.pad_token_id not in ids


def test_bundled_dialogues_are_prompts(small, splits):
    assert (len(splits["train"]), len(splits["test"])) == (32, 8)
    for row in splits["test"]:
        assert row["query"].startswith("\nSummarize the following conversation.\n\n#Person1#:")
        assert row["input_ids"] == small.tokenizer(row["query"]).input_ids
