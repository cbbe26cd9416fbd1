"""User errors: one clear line on stderr, exit code 2 and no stack trace.

`python -m pytest tests/test_bad_input.py -q` counts the cases; the ranges and types of single options, by the value,
are in test_cli.py, faults of the hub in test_hub_faults.py.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, PreTrainedTokenizerFast

from detox_ppo import load_dialogues, main

pytestmark = pytest.mark.usefixtures("quick")


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny"
BASE, ADAPTER, CLASSIFIER = "model_name", "adapter_name", "reward_model_name"
FOLDERS = {BASE: "base", ADAPTER: "adapter", CLASSIFIER: "classifier"}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ROW = {"dialogue": "#Person1#: " + "Hello there, how are you today? " * 10, "summary": "They greet."}


@pytest.fixture(scope="module")
def options(small_arguments, tmp_path_factory):
    """Arguments of a small run on thirty dialogues, 24 of them for training; keywords override options."""
    output_dir = tmp_path_factory.mktemp("options") / "run"
    return lambda **overrides: small_arguments(**{"output_dir": output_dir} | overrides)


def complaint(args, capsys):
    """The error line of the real command, which exits with 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    written = capsys.readouterr().err.splitlines()
    found = [line for line in written if line.startswith("detox_ppo.py: error: ")]
    assert len(found) == 1 and found[0] == written[-1]
    assert found[0].isprintable() and "Traceback" not in "".join(written)
    return found[0]


# Options, except single values out of range or of the wrong type

OPTIONS = {
    "unknown option": ({"bach_size": 8}, ["--bach_size"]),
    "half a number": ({"batch_size": 4.5}, ["--batch_size", "4.5"]),
    "a number that no model has room for": ({"lora_alpha": 10**400}, ["--lora_alpha", "2147483648"]),
    "rank above the model's size": ({"adapter_name": "", "lora_r": 1000}, ["--lora_r 1000", "128"]),
    "batch no multiple": ({"batch_size": 6, "mini_batch_size": 4}, ["--batch_size 6", "--mini_batch_size 4"]),
    "least length not below greatest": ({"output_min_length": 8}, ["--output_min_length 8", "--output_max_length 8"]),
    "more evaluated than there is": ({"eval_samples": 100_000}, ["--eval_samples 100000", "6 test rows"]),
    "more in a batch than there is": ({"batch_size": 4000}, ["--batch_size 4000", "24 train rows"]),
    "response beyond reason": ({"output_max_length": 10**9}, ["--output_max_length 1000000000", "lower it"]),
    "summary beyond reason": ({"eval_max_new_tokens": 10**9}, ["--eval_max_new_tokens 1000000000", "lower it"]),
    "toxic label is the reward's": ({"reward_label": "hate"}, ["--toxic_label", "reward_label"]),
    "label that is none": ({"toxic_label": "rude"}, ["--toxic_label 'rude'", "nothate, hate"]),
    "layer that is not there": ({"adapter_name": "", "lora_target_modules": "nowhere"}, ["--lora_target", "nowhere"]),
    "layer that takes no LoRA": ({"adapter_name": "", "lora_target_modules": "layer_norm"}, ["--lora_target_modules"]),
    "device that is none": ({"device": "quantum"}, ["--device", "quantum", "cuda:N"]),
    "GPU that is not there": ({"device": "cuda:99"}, ["--device cuda:99"]),
    "second processor": ({"device": "cpu:3"}, ["--device", "cpu:3"]),
    "model without a name": ({"model_name": ""}, ["--model_name"]),
    "name of blanks": ({"dataset_name": "  "}, ["--dataset_name"]),
    "output without a name": ({"output_dir": ""}, ["--output_dir"]),
    "null byte in a path": ({"output_dir": "run\0"}, ["--output_dir", "\\x00"]),
    "line break in a name": ({"model_name": "google\nflan"}, ["--model_name", "google\\nflan"]),
    "terminal codes in a name": ({"reward_model_name": "\x1b[31mred"}, ["--reward_model_name", "\\x1b"]),
    "name in another encoding": ({"adapter_name": "a\udcff"}, ["--adapter_name", "\\udcff"]),
    "name too long for a file": ({"model_name": "x" * 5000}, ["--model_name xxx"]),
    "password in a name": ({"dataset_name": "https://me:verysecret@host/x"}, ["--dataset_name", "HF_TOKEN"]),
    "address instead of a name": ({"dataset_name": "s3://bucket/x.csv"}, ["--dataset_name s3://bucket/x.csv"]),
    "nothing there": ({"model_name": "no/such/directory"}, ["--model_name no/such/directory"]),
    "base is a classifier": ({"model_name": TINY / "classifier"}, ["--model_name", "encoder-decoder"]),
    "base is an adapter": ({"model_name": TINY / "adapter"}, ["--model_name", "adapter"]),
    "base is a file": ({"model_name": TINY / "config.yaml"}, ["--model_name", "config.yaml"]),
    "adapter is a base": ({"adapter_name": TINY / "base"}, ["--adapter_name", "adapter_config.json"]),
    "classifier is a base": ({"reward_model_name": TINY / "base"}, ["--reward_model_name", "is missing"]),
    "classifier is an adapter": ({"reward_model_name": TINY / "adapter"}, ["--reward_model_name"]),
    "output is a file": ({"output_dir": TINY / "config.yaml"}, ["--output_dir", "config.yaml"]),
    "dialogues are a model": ({"dataset_name": TINY / "base"}, ["--dataset_name", "train.csv", "found config.json"]),
    "dialogues are weights": ({"dataset_name": TINY / "base" / "model.safetensors"}, [".csv", ".jsonl"]),
    "no tracker of that name": ({"report_to": "nobody"}, ["--report_to", "tensorboard"]),
}


@pytest.mark.parametrize("overrides, words", OPTIONS.values(), ids=OPTIONS)
def test_options(overrides, words, options, capsys):
    message = complaint(options(**overrides), capsys)
    for word in words:
        assert word in message
    assert "verysecret" not in message
    # HF_ENDPOINT is only suggested for names that were looked up on the hub.
    assert overrides.keys() & {*FOLDERS, "dataset_name"} or "HF_ENDPOINT" not in message


# The configuration file

FILES = {
    "unknown option": ("bach_size: 8\n", "bach_size"),
    # names that the parser knows, but no option of a file
    "the name of the file option": ("config: other.yaml\n", "config"),
    "help": ("help: true\n", "help"),
    "environment variables": ("env:\n  DETOX_PPO_TEST: 1\n", "env"),
    "an option twice": ("seed: 1\nseed: 2\n", "seed is given twice"),
    "no mapping": ("- batch_size\n", "mapping"),
    "nothing": ("", "mapping"),
    "a number as an option": ("1: 2\n", "1"),
    "nothing as an option": ("null: 2\n", "None"),
    "a list as an option": ("? [seed]\n: 2\n", ""),
    "broken YAML": ("batch_size: [8\n", "line 1"),
    "broken YAML, tab": ("batch_size:\n\t8\n", "line 2"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "line 2"),
    "unknown anchor": ("seed: *x\n", "line 1"),
    "Python object": ("seed: !!python/object/apply:os.mkdir [pwned]\n", "line 1"),
    "a date": ("output_dir: 2024-01-01\n", "--output_dir"),
    "an octal number": ("batch_size: 016\n", "batch_size: 016 is octal"),
    "a number of base 60": ("kl_horizon: 1:30\n", "kl_horizon: 1:30 is"),
    "a switch that YAML spells otherwise": ("adaptive-kl: true\n", "did you mean --adaptive_kl?"),
    "not a number": ("gamma: .nan\n", "--gamma"),
    "not UTF-8": (b"seed: \xff\n", "utf-8"),
    "null byte": (b"seed: 1\0\n", "#x0000"),
}


@pytest.mark.parametrize("content, word", FILES.values(), ids=FILES)
def test_configuration_file(content, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "options.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for args in (["--config", path], [f"--config={path}"]):
        message = complaint(args, capsys)
        assert word in message and ("--config" in message or word.startswith("--")) and "HF_ENDPOINT" not in message
    assert "DETOX_PPO_TEST" not in os.environ and os.listdir(tmp_path) == ["options.yaml"]


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_configuration_that_is_no_file(name, tmp_path, capsys):
    message = complaint(["--config", tmp_path / name], capsys)
    assert f"--config {tmp_path / name}:" in message and "HF_ENDPOINT" not in message


# Dialogues. The last item: words that the message must contain, besides the file's name.


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


LONG = "x" * 300
BROKEN = {
    "no dialogue column": ("a.csv", "id,text,summary\n1,a,b\n", ["'dialogue'", "id, text, summary"]),
    "no dialogue key": ("a.jsonl", '{"summary": "a"}\n', ["'dialogue'", "found summary"]),
    "a column twice": ("a.csv", "dialogue,summary,dialogue\na,b,c\n", ["more than one", "'dialogue'"]),
    "columns without names": ("a.csv", "summary,,\na,b,c\n", ["'dialogue'", "found summary"]),
    "other separator": ("a.csv", "dialogue/summary\na/b\n", ["'dialogue'", "found dialogue/summary"]),
    "no dialogue, csv": ("a.csv", "dialogue,summary\na,b\n,d\n", ["1 of 2 rows", "(rows 2 "]),
    "no dialogue, jsonl": (
        "a.jsonl",
        lines(ROW, {"dialogue": None, "summary": "d"}),
        ["1 of 2 rows", "(rows 2 "],
    ),
    "number as dialogue": ("a.jsonl", lines(ROW, ROW | {"dialogue": 5}), ["row 2", "'dialogue'", "int"]),
    "truth as dialogue": ("a.jsonl", lines(ROW, ROW | {"dialogue": False}), ["row 2", "'dialogue'", "bool"]),
    "list as dialogue": ("a.jsonl", lines(ROW | {"dialogue": ["a", 5]}), ["row 1", "'dialogue'", "list", "role"]),
    "half a character": ("a.jsonl", lines(ROW, ROW | {"summary": "\ud83d"}), ["row 2", "'summary'", "\\ud83d"]),
    "broken UTF-8, csv": ("a.csv", b"dialogue,summary\na,b\nc,\xff\n", ["line 3", "UTF-8"]),
    "broken UTF-8, jsonl": ("a.jsonl", lines(ROW).encode() + b'{"dialogue": "\xe9"}\n', ["line 2", "UTF-8"]),
    "UTF-16": ("a.csv", "dialogue,summary\na,b\n".encode("utf-16"), ["line 1", "UTF-8"]),
    "UTF-16 without a mark": ("a.csv", "dialogue,summary\na,b\n".encode("utf-16-le"), ["'dialogue'"]),
    "an archive": ("a.csv", b"PK\x03\x04" + bytes(500), ["'dialogue'"]),
    "broken line": ("a.jsonl", lines(ROW) + '\n{"dialogue": "c", "summary"\n', ["line 3", "JSON"]),
    "line break in a line": ("a.jsonl", lines(ROW) + '{"dialogue": "a\nb", "summary": "c"}\n', ["line 2", "JSON"]),
    "nesting that never ends": ("a.jsonl", "[" * 100_000, ["not a list of JSON objects"]),
    "number of 5,000 digits": ("a.jsonl", '{"dialogue": ' + "1" * 5000 + "}", ["line 1", "JSON"]),
    "line without an object": ("a.jsonl", lines(ROW, ["c", "d"]), ["line 2", "object"]),
    "one JSON list of texts": ("a.json", '["a", "b"]', ["not a list of JSON objects"]),
    "half a JSON list": ("a.json", json.dumps([ROW])[:-9], ["not a list of JSON objects", "line 1 column"]),
    "too many fields": ("a.csv", "dialogue,summary\na,b\nc,d,e\n", ["line 3", "quote"]),
    # with more fields than names from the start, pandas would shift the columns and read on
    "too many fields from the start": ("a.csv", "dialogue,summary\na,b,c\nd,e,f\n", ["line 2", "quote"]),
    "open quote": ("a.csv", 'dialogue,summary\n"a,b\n', ["csv", "quote"]),
    "empty csv": ("a.csv", "", ["No columns"]),
    "blank csv": ("a.csv", "\n\n", ["No columns"]),
    "header alone": ("a.csv", "dialogue,summary\n", ["no row"]),
    "empty jsonl": ("a.jsonl", "", ["dialogue"]),
    "wrong ending": ("a.doc", "dialogue,summary\na,b\n", [".csv", ".jsonl"]),
    "no ending": ("train", "dialogue,summary\na,b\n", [".csv", ".jsonl"]),
    "all too short": (
        "a.csv",
        "dialogue,summary\na,b\nc,d\n",
        ["2 rows, 0 with 200 < characters", "input_min_text_length"],
    ),
    "too long for the filter": (
        "a.jsonl",
        lines(*[ROW | {"dialogue": "x" * 100_000}] * 9),
        ["9 rows, 0 with", "<= 1000", "input_max_text_length"],
    ),
}


@pytest.mark.parametrize("name, content, words", BROKEN.values(), ids=BROKEN)
def test_dialogues(name, content, words, options, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = complaint(options(dataset_name=path), capsys)
    for word in (f"--dataset_name {path}", *words):
        assert word in message
    assert len(message) < 2000


def test_summaries_that_sft_needs(options, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(lines(ROW, {"dialogue": ROW["dialogue"]}, *[ROW] * 8))
    message = complaint(options(dataset_name=tmp_path / "a.jsonl", sft_steps=1), capsys)
    assert "1 of 8 rows have no summary (rows 2 " in message


def huge(units, options, tmp_path):
    """A run on four dialogues of 100,000 characters."""
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*[ROW | {"dialogue": (unit * 100_000)[:100_000]} for unit in units]))
    sizes = {"batch_size": 2, "eval_samples": 1, "input_max_text_length": 100_000, "max_ppo_steps": 0}
    return options(dataset_name=path, output_dir=tmp_path / "run", **sizes)


@pytest.mark.parametrize("names", [[], ["README.md"], ["dev.csv", "test.csv"], ["train.csv", "train.jsonl"]], ids=str)
def test_directory_without_one_usable_file(names, options, tmp_path, capsys):
    directory = tmp_path / "dialogues"
    directory.mkdir()
    for name in names:
        (directory / name).write_text("dialogue,summary\na,b\n")
    message = complaint(options(dataset_name=directory), capsys)
    assert str(directory) in message and "train.csv" in message and ".jsonl" in message
    found = message.split("found")[1]
    assert all(name in found for name in names if name.endswith(("csv", "jsonl")))


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")])
def test_training_file_that_can_not_be_read(make, options, tmp_path, capsys):
    directory = tmp_path / "dialogues"
    directory.mkdir()
    make(directory / "train.csv")
    message = complaint(options(dataset_name=directory), capsys)
    assert f"--dataset_name {directory / 'train.csv'}: can't be loaded" in message and "HF_ENDPOINT" not in message


# Models: corrupted copies of the bundled ones


def edited(name, **changes):
    def edit(directory):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def removed(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def written(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def cut(name, share=0.5):
    def edit(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * share)])

    return edit


def tensors(name, change):
    """Replace every tensor of a file by change(key, tensor), or drop it if that is None."""

    def edit(directory):
        changed = {key: change(key, tensor) for key, tensor in load_file(directory / name).items()}
        kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
        save_file(kept, directory / name, metadata={"format": "pt"})

    return edit


def without(name, part):
    return tensors(name, lambda key, tensor: None if part in key else tensor)


def not_finite(name, part):
    return tensors(name, lambda key, tensor: tensor / 0 if part in key else tensor)


def tokenizer_without(token):
    def edit(directory):
        (directory / "tokenizer_config.json").unlink()
        present = {"pad_token": "<pad>", "eos_token": "</s>"}
        del present[token]
        words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **present).save_pretrained(directory)

    return edit


def labelled(*labels):
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return edited("config.json", **names)


def other_tokenizer(directory):
    for name in TOKENIZER:
        shutil.copy(TINY / "classifier" / name, directory / name)


def other_kind_of_adapter(directory):
    peft.IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["q"], feedforward_modules=[]).save_pretrained(directory)


def no_decoder_start(directory):
    for name in ("config.json", "generation_config.json"):
        edited(name, decoder_start_token_id=None)(directory)


def wider(key, tensor):
    return torch.cat([tensor, tensor], dim=1) if "lora_A" in key else tensor


def one_more(directory):
    path = directory / "adapter_model.safetensors"
    extra = {"base_model.model.encoder.block.77.q.lora_A.weight": torch.zeros(2, 2)}
    save_file(load_file(path) | extra, path)


def as_pickle(content):
    def edit(directory):
        (directory / "adapter_model.safetensors").unlink()
        (directory / "adapter_model.bin").write_bytes(content)

    return edit


WEIGHTS, LORA = "model.safetensors", "adapter_model.safetensors"
FIT = ["does not fit", str(TINY / "base")]
DAMAGE = {
    "causal model": (BASE, lambda directory: GPT2Config(n_layer=1).save_pretrained(directory), ["encoder-decoder"]),
    "speech model": (BASE, edited("config.json", model_type="whisper"), []),
    "unknown kind of model": (BASE, edited("config.json", model_type="nothing"), ["nothing"]),
    "config that is no JSON": (BASE, written("config.json", b"{"), ["config.json"]),
    "config that is a list": (BASE, written("config.json", b"[]"), ["config.json"]),
    "config with a word as a size": (BASE, edited("config.json", vocab_size="many"), ["vocab_size"]),
    "config of another size": (BASE, edited("config.json", d_model=64), ["config.json", "shape"]),
    "config of other layers": (BASE, edited("config.json", num_layers=5), ["is missing"]),
    "no config": (BASE, removed("config.json"), ["config.json"]),
    "no start token": (BASE, no_decoder_start, ["decoder_start_token"]),
    "no pad token": (BASE, tokenizer_without("pad_token"), ["pad_token"]),
    "no end token": (BASE, tokenizer_without("eos_token"), ["eos_token"]),
    "no tokenizer at all": (BASE, removed(*TOKENIZER), ["tokenizer.json"]),
    "no tokenizer file": (BASE, removed("tokenizer.json"), ["tokenizer"]),
    "tokenizer cut off": (BASE, cut("tokenizer.json"), []),
    "tokenizer without content": (BASE, written("tokenizer.json", b"{}"), ["added_tokens"]),
    "another model's tokenizer": (BASE, other_tokenizer, ["tokenizer", "1024"]),
    "no weights": (BASE, removed(WEIGHTS), [WEIGHTS]),
    "weights cut off": (BASE, cut(WEIGHTS), ["incomplete"]),
    "weights cut off in their header": (BASE, cut(WEIGHTS, 0.0005), ["header"]),
    "empty weights": (BASE, cut(WEIGHTS, 0), ["header"]),
    "weights without a layer": (BASE, without(WEIGHTS, "encoder.block.0."), ["encoder.block.0.", "is missing"]),
    "weights that are not finite": (BASE, not_finite(WEIGHTS, "encoder.block.0."), ["not finite"]),
    "classifier without the labels": (CLASSIFIER, labelled("fine", "rude"), ["--toxic_label", "fine, rude"]),
    "classifier without names": (CLASSIFIER, labelled("LABEL_0", "LABEL_1"), ["LABEL_0, LABEL_1"]),
    "classifier with numbers for names": (CLASSIFIER, labelled(0, 1), ["0, 1"]),
    "classifier with a label too many": (CLASSIFIER, labelled("nothate", "hate", "x"), ["classifier.out_proj"]),
    "classifier with a gap": (
        CLASSIFIER,
        edited("config.json", id2label={0: "nothate", 5: "hate"}),
        ["--toxic_label"],
    ),
    "classifier without its head": (CLASSIFIER, without(WEIGHTS, "classifier."), ["classifier.", "is missing"]),
    "classifier that is not finite": (CLASSIFIER, not_finite(WEIGHTS, "classifier."), ["not finite"]),
    "classifier cut off": (CLASSIFIER, cut(WEIGHTS), ["incomplete"]),
    "classifier without a tokenizer": (CLASSIFIER, removed(*TOKENIZER), ["tokenizer.json"]),
    "classifier without a pad token": (CLASSIFIER, edited("tokenizer_config.json", pad_token=None), ["pad_token"]),
    "classifier that reads nothing": (CLASSIFIER, edited("tokenizer_config.json", model_max_length=2), ["2 tokens"]),
    "classifier that reads words": (CLASSIFIER, edited("tokenizer_config.json", model_max_length="x"), []),
    "adapter for another width": (ADAPTER, tensors(LORA, wider), [*FIT, "lora_A"]),
    "adapter with a tensor too few": (ADAPTER, without(LORA, "block.0.layer.0.SelfAttention.q.lora_A"), FIT),
    "adapter with a tensor too many": (ADAPTER, one_more, [*FIT, "block.77"]),
    "adapter for other layers": (ADAPTER, edited("adapter_config.json", target_modules=["nowhere"]), FIT),
    "adapter for fewer layers": (ADAPTER, edited("adapter_config.json", target_modules=["q"]), FIT),
    "adapter for a broken pattern": (ADAPTER, edited("adapter_config.json", target_modules="*("), FIT),
    "adapter of another rank": (ADAPTER, edited("adapter_config.json", r=3), FIT),
    "adapter of rank 0": (ADAPTER, edited("adapter_config.json", r=0), FIT),
    "adapter with a word as scale": (ADAPTER, edited("adapter_config.json", lora_alpha="x"), FIT),
    "adapter with biases": (ADAPTER, edited("adapter_config.json", bias="lora_only"), ["bias", "lora_only"]),
    "adapter with a whole layer": (ADAPTER, edited("adapter_config.json", modules_to_save=["lm_head"]), ["lm_head"]),
    "adapter that changes the base": (ADAPTER, edited("adapter_config.json", init_lora_weights="pissa"), ["pissa"]),
    "adapter of another kind": (ADAPTER, other_kind_of_adapter, ["LORA", "IA3"]),
    "adapter of an unknown kind": (ADAPTER, edited("adapter_config.json", peft_type="NEW"), ["NEW"]),
    "adapter of no kind": (ADAPTER, written("adapter_config.json", b'{"r": 4}'), []),
    "adapter config that is no JSON": (ADAPTER, written("adapter_config.json", b"{"), []),
    "adapter without weights": (ADAPTER, removed(LORA), ["is missing"]),
    "adapter cut off": (ADAPTER, cut(LORA), ["incomplete"]),
    "adapter that is not finite": (ADAPTER, not_finite(LORA, "lora_A"), ["lora_A", "not finite"]),
    "adapter that is an empty pickle": (ADAPTER, as_pickle(b""), []),
    "adapter that is no pickle": (ADAPTER, as_pickle(b"no pickle"), ["pickle"]),
}


@pytest.mark.parametrize("option, damage, words", DAMAGE.values(), ids=DAMAGE)
def test_models(option, damage, words, options, tmp_path, capsys):
    directory = tmp_path / FOLDERS[option]
    shutil.copytree(TINY / FOLDERS[option], directory)
    damage(directory)
    message = complaint(options(**{option: directory}), capsys)
    for word in (str(directory), *words):
        assert word in message


# BART counts positions, T5 doesn't

TOO_LONG = {
    "prompt": ({}, 64, ["--input_max_text_length 1000", "encoder", "64"]),
    "response": ({"output_max_length": 400}, 384, ["--output_max_length 400", "decoder", "384"]),
    "summary": ({"eval_max_new_tokens": 400}, 384, ["--eval_max_new_tokens 400", "decoder", "384"]),
    "positions that are no multiple of 16": ({"output_max_length": 390}, 390, ["--output_max_length 390", "384"]),
}


def small_bart(directory, positions):
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 1}
    config = BartConfig(vocab_size=1024, max_position_embeddings=positions, **sizes, **heads, **tokens)
    BartForConditionalGeneration(config).save_pretrained(directory)
    for name in TOKENIZER:
        shutil.copy(TINY / "base" / name, directory / name)
    return directory


@pytest.mark.parametrize("overrides, positions, words", TOO_LONG.values(), ids=TOO_LONG)
def test_longer_than_the_model_takes(overrides, positions, words, options, tmp_path, capsys):
    bart = {"model_name": small_bart(tmp_path / "bart", positions), "adapter_name": "", "lora_r": 4}
    message = complaint(options(**bart, **overrides), capsys)
    for word in words:
        assert word in message


@pytest.mark.parametrize("option", ["output_max_length", "eval_max_new_tokens"])
def test_summaries_longer_than_the_classifier_reads(option, options, capsys):
    message = complaint(options(**{option: 600}), capsys)
    for word in (f"--{option} 600", str(TINY / "classifier"), "512", "lower it"):
        assert word in message


def test_human_summary_longer_than_the_decoder_takes(options, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*[{"dialogue": "Hello.", "summary": ROW["dialogue"]}] * 20))
    bart = {"model_name": small_bart(tmp_path / "bart", 64), "adapter_name": "", "lora_r": 4, "sft_steps": 1}
    bart |= {"dataset_name": path, "input_min_text_length": 0, "sft_batch_size": 4}
    message = complaint(options(**bart), capsys)
    assert "--sft_max_target_length 128" in message and "decoder" in message and "64" in message


# Unusual, but valid

ODD = [
    "\N{GRINNING FACE} \N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL} ",
    "\u05e9\u05dc\u05d5\u05dd \u202e\u0645\u0631\u062d\u0628\u0627\u200f ",
    "\x00\x01\x07\x1b[31m\x7f\u2028\ufeff\uffff ",
    "</s> <pad> <unk> <extra_id_0> ",
    "\n\nSummary:\nSummarize the following conversation.\n\n",
    "e\u0301\U000e0041\ue000 ",
]


def test_odd_rows_run_through(options, tmp_path):
    rows = [{"dialogue": (text * 80)[:80], "summary": (text * 20)[:20]} for text in ODD] * 2
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False, encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines(*rows), encoding="utf-8")
    for name in ("a.csv", "a.jsonl"):  # Windows' ends of lines are kept within a text.
        found = load_dialogues(str(tmp_path / name))
        assert [{"dialogue": row["dialogue"], "summary": row["summary"]} for row in found] == rows
    sizes = {"test_size": 0.5, "eval_samples": -1, "sft_steps": 1, "sft_batch_size": 6, "max_ppo_steps": 1}
    sizes["input_min_text_length"] = 0
    main(options(dataset_name=tmp_path / "a.jsonl", output_dir=tmp_path / "run", **sizes))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["toxicity"]["after"]["n"] == 6 and results["config"]["eval_samples"] == -1
    assert np.isfinite([results["reward"]["after"]["mean"], results["toxicity"]["after"]["mean"]]).all()
    table = pd.read_csv(tmp_path / "run" / "comparison.csv", keep_default_na=False, lineterminator="\n")
    assert sorted(table["dialogue"]) == sorted(row["dialogue"] for row in rows[6:])


def test_100_000_characters_of_few_tokens_run_through(options, tmp_path):
    main(huge(["</s>"] * 4, options, tmp_path))
    assert (tmp_path / "run" / "results.json").exists()
