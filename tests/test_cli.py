"""The command line: options with their ranges and types, and small runs of the real command."""

import ast
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

import detox_ppo
from detox_ppo import DetoxConfig, UserError, main, parse_config, resolve_device

pytestmark = pytest.mark.usefixtures("quick")


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "detox_ppo.py"

DEFAULTS = {
    "model_name": "google/flan-t5-base",
    "adapter_name": None,
    "lora_r": 32,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "reward_model_name": "facebook/roberta-hate-speech-dynabench-r4-target",
    "reward_label": "nothate",
    "toxic_label": "hate",
    "judge_model_name": None,
    "judge_label": "toxic",
    "dataset_name": "knkarthick/dialogsum",
    "dataset_config_name": None,
    "eval_dataset_name": None,
    "dialogue_column": "dialogue",
    "summary_column": "summary",
    "prompt": "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n",
    "input_min_text_length": 200,
    "input_max_text_length": 1000,
    "test_size": 0.2,
    "sft_steps": 0,
    "sft_learning_rate": 1e-3,
    "sft_batch_size": 16,
    "sft_max_target_length": 128,
    "learning_rate": 1.41e-5,
    "lr_scheduler_type": "constant",
    "batch_size": 16,
    "mini_batch_size": 4,
    "gradient_checkpointing": False,
    "ppo_epochs": 1,
    "max_ppo_steps": 10,
    "score_clip": None,
    "init_kl_coef": 0.2,
    "adaptive_kl": True,
    "target_kl": 6,
    "kl_horizon": 10000,
    "gamma": 1,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "ratio_threshold": 10,
    "max_grad_norm": None,
    "freeze_encoder": False,
    "content_coef": 0,
    "ptx_coef": 0,
    "output_min_length": 100,
    "output_max_length": 400,
    "score_text": "query_response",
    "eval_samples": 100,
    "eval_max_new_tokens": 100,
    "seed": 0,
    "device": "auto",
    "dtype": "auto",
    "output_dir": "checkpoints/run",
    "model_dir": None,
    "checkpoint_dir": None,
    "save_steps": 10,
    "save_total_limit": 2,
    "resume": False,
    "logging_steps": 1,
    "report_to": "none",
    "hub_model_id": None,
    "dynamodb_table": None,
}

# Values just outside and just inside the range of every number; integers step by one.
RANGES = {
    "lora_r": ([0, -1], [1]),
    "lora_alpha": ([0], [1]),
    "lora_dropout": ([-0.01, 1], [0, 0.99]),
    "input_min_text_length": ([-1], [0]),
    "input_max_text_length": ([200, 0], [201]),
    "test_size": ([0, 1, -0.2, 1.5], [0.01, 0.99]),
    "sft_steps": ([-1], [0, 1]),
    "sft_learning_rate": ([0, -1e-3], [1e-9]),
    "sft_batch_size": ([0, -1], [1]),
    "sft_max_target_length": ([0, -1], [1]),
    "learning_rate": ([0, -1e-5], [1e-9]),
    "batch_size": ([0, -4], [4]),
    "mini_batch_size": ([0, -1], [1, 16]),
    "ppo_epochs": ([0], [1]),
    "max_ppo_steps": ([-1], [0]),
    "score_clip": ([0, -2], [0.1]),
    "init_kl_coef": ([-0.1], [0]),
    "target_kl": ([0, -6], [0.1]),
    "kl_horizon": ([0], [1]),
    "gamma": ([-0.01, 1.01], [0, 1]),
    "lam": ([-0.01, 1.01], [0, 1]),
    "cliprange": ([0, -0.2], [0.01]),
    "cliprange_value": ([0, -0.2], [0.01]),
    "vf_coef": ([-0.1], [0]),
    "ratio_threshold": ([1, 0, -10], [1.1]),
    "max_grad_norm": ([0, -1], [0.1]),
    "content_coef": ([-0.1], [0]),
    "ptx_coef": ([-0.1], [0]),
    "output_min_length": ([0, -1], [1]),
    "output_max_length": ([100, 0], [101]),
    "eval_samples": ([0, -2], [1, -1]),
    "eval_max_new_tokens": ([0], [1]),
    "seed": ([-1, 2**64], [0, 2**32]),
    "save_steps": ([0, -1], [1]),
    "save_total_limit": ([0, -1], [1]),
    "logging_steps": ([0, -1], [1]),
}

TYPES = typing.get_type_hints(DetoxConfig)
WHOLE = [name for name, kind in TYPES.items() if kind is int]
REAL = [name for name, kind in TYPES.items() if kind in (float, float | None)]
CHOICES = [name for name, kind in TYPES.items() if typing.get_origin(kind) is typing.Literal]


def complaint(args):
    """The one-line message of a user error, without starting a process."""
    with pytest.raises(UserError) as error:
        parse_config([str(arg) for arg in args])
    message = str(error.value)
    assert message and "\n" not in message
    return message


def yaml_file(tmp_path, text):
    path = tmp_path / "options.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return path


# Options


def test_defaults():
    assert dataclasses.asdict(parse_config([])) == DEFAULTS


def test_batch_size_must_be_a_multiple_of_the_minibatch_size():
    message = complaint(["--batch_size", 8, "--mini_batch_size", 3])
    assert message == "--batch_size 8 is not a multiple of --mini_batch_size 3"


def test_every_option_is_used():
    """It occurs as config.NAME or as a string outside of DetoxConfig."""
    used = set()
    for part in ast.parse(SCRIPT.read_text(encoding="utf-8")).body:
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and part.name != "DetoxConfig":
            for node in ast.walk(part):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config":
                    used.add(node.attr)
                elif isinstance(node, ast.Constant):
                    used.add(node.value)
    assert {field.name for field in dataclasses.fields(DetoxConfig)} <= used


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(DetoxConfig):
        text = field.metadata["help"]
        assert len(text.split()) >= 5 and text.endswith("."), field.name
        assert " ".join(text.split()) in " ".join(printed.split()), field.name
    # In the order of the fields, under their headings.
    explained = re.findall(r"^  --(\w+)", printed, re.MULTILINE)
    assert [name for name in explained if name != "no_adaptive_kl"] == [*DEFAULTS, "config"]
    headings = re.findall(r"^(\w+):\n  --(\w+)", printed, re.MULTILINE)
    assert headings == [
        ("models", "model_name"),
        ("data", "dataset_name"),
        ("SFT", "sft_steps"),
        ("PPO", "learning_rate"),
        ("responses", "output_min_length"),
        ("evaluation", "eval_samples"),
        ("run", "seed"),
    ]


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = yaml_file(tmp_path, {"batch_size": 8, "seed": 5, "adapter_name": "some/where", "lam": 0.5})
    for args in (
        ["--config", str(path), "--seed", "7"],
        [f"--config={path}", "--seed=7"],
        ["--seed", "7", f"--config={path}"],
        ["--seed=7", "--config", str(path)],
    ):
        config = parse_config(args)
        changed = {"batch_size": 8, "seed": 7, "adapter_name": "some/where", "lam": 0.5}
        assert dataclasses.asdict(config) == DEFAULTS | changed
    # a flag overrides the file even if it has the default value
    assert parse_config(["--config", str(path), "--seed", "0", "--batch_size", "16"]).seed == 0


def test_home_directory_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "options.yaml").write_text("output_dir: ~/run\nadapter_name: ~\ntoxic_label: ~hate\n")
    options = ["--dataset_name=~/d.csv", "--checkpoint_dir", "~", "--model_dir", "~/run/model"]
    config = parse_config(["--config=~/options.yaml", *options])
    assert (config.output_dir, config.dataset_name) == (f"{tmp_path}/run", f"{tmp_path}/d.csv")
    assert (config.checkpoint_dir, config.model_dir) == (str(tmp_path), f"{tmp_path}/run/model")
    assert config.adapter_name is None and config.toxic_label == "~hate"  # YAML's ~ is null


def test_paths_in_a_file_are_relative_to_it_or_to_the_script(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(["--config", str(tiny / "config.yaml")])
    assert (config.model_name, config.judge_model_name) == (str(tiny / "base"), str(tiny / "judge"))
    assert config.output_dir == "checkpoints/tiny-run"  # outputs are relative to the current directory
    (tmp_path / "project" / "data").mkdir(parents=True)
    text = "dataset_name: data\nmodel_name: t5-small\nadapter_name: ''\noutput_dir: data\n"
    (tmp_path / "project" / "options.yaml").write_text(text)
    args = ["--config", "project/options.yaml"]
    config = parse_config(args)
    assert (config.dataset_name, config.output_dir) == ("project/data", "data")
    assert (config.model_name, config.adapter_name) == ("t5-small", None)
    assert parse_config([*args, "--dataset_name", "checkpoints/tiny"]).dataset_name == "checkpoints/tiny"
    (tmp_path / "data").mkdir()
    assert parse_config(args).dataset_name == "data"


def test_values_have_the_types_of_their_options(tmp_path):
    text = "gamma: 1\nlearning_rate: 1e-4\nlora_target_modules: q\nadaptive_kl: off\nmax_grad_norm: null\n"
    config = parse_config(["--config", str(yaml_file(tmp_path, text))])
    assert (config.gamma, config.learning_rate, config.lora_target_modules) == (1.0, 1e-4, ["q"])
    assert type(config.gamma) is float and config.adaptive_kl is False and config.max_grad_norm is None
    assert parse_config(["--lora_target_modules", "None"]).lora_target_modules is None
    config = parse_config(["--lora_target_modules", "k", "o", "--adaptive_kl", "false", "--adapter_name", ""])
    assert (config.lora_target_modules, config.adaptive_kl, config.adapter_name) == (["k", "o"], False, None)
    assert parse_config(["--resume", "--seed", "1"]).resume is True
    for given, expected in ((["a b"], "a b"), (["summary1", "summary2"], ["summary1", "summary2"])):
        path = str(yaml_file(tmp_path, {"summary_column": expected}))
        for args in (["--summary_column", *given], ["--config", path]):
            assert parse_config(args).summary_column == DetoxConfig(summary_column=given).summary_column == expected
    for name in REAL:
        assert type(getattr(config, name)) in (float, type(None)), name


def test_no_other_file_is_read(tmp_path, monkeypatch):
    """TrlParser's parent class would silently read options from a file next to the script."""
    (tmp_path / "detox_ppo.args").write_text("--seed 7\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "detox_ppo.py")])
    assert parse_config([]).seed == 0


def test_bundled_configuration_uses_the_toy_example(tiny):
    config = parse_config(["--config", str(tiny / "config.yaml")])
    for name in ("model_name", "adapter_name", "reward_model_name", "dataset_name"):
        assert (ROOT / getattr(config, name)).is_dir(), name
        assert (ROOT / getattr(config, name)).parent == tiny


def test_full_size_configuration_is_the_benchmarked_recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import real_text

    config = parse_config(["--config", str(ROOT / "checkpoints" / "flan-t5-base.yaml")])
    benchmarked = parse_config(
        [*real_text.COMMON.split(), *real_text.recipe_options("rude-frozen-ptx-0.1-content-15-steps-120")]
    )
    differ = {name for name in detox_ppo.OPTIONS if getattr(config, name) != getattr(benchmarked, name)}
    assert differ == {"sft_steps", "judge_model_name", "eval_samples", "save_steps", "device"}


@pytest.mark.parametrize("package, version", [("torch", "2.12.0"), ("transformers", "5.0.0"), ("peft", "0.21.1")])
def test_outdated_packages_are_reported_at_startup(package, version, tmp_path):
    """Before they are imported. A .dist-info folder on the path declares the outdated version."""
    metadata = tmp_path / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"detox_ppo.py: error: {package} {version} is older than ") and "pip install" in line
    code = ["import sys", f"sys.path[:0] = [{str(tmp_path)!r}, {str(SCRIPT.parent)!r}]", "import detox_ppo"]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    assert done.returncode == 1 and f"ImportError: {package} {version} is older than " in done.stderr


# User errors


def test_a_value_of_the_wrong_type_is_reported_with_the_option_s_help(tmp_path):
    for args in (["--eval_samples", "all"], ["--config", str(yaml_file(tmp_path, {"eval_samples": "all"}))]):
        expected = (
            "--eval_samples is 'all': it should be a valid integer. Number of test prompts to evaluate; -1: all."
        )
        assert complaint(args) == expected


def test_ranges_cover_every_number():
    assert set(RANGES) == set(WHOLE) | set(REAL)


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range(name, tmp_path):
    outside, inside = RANGES[name]
    for value in outside:
        for args in ([f"--{name}={value}"], ["--config", yaml_file(tmp_path, {name: value})]):
            message = complaint(args)
            assert f"--{name}" in message and str(value) in message
    for value in inside:
        assert getattr(parse_config([f"--{name}={value}"]), name) == value


@pytest.mark.parametrize("name", sorted({*WHOLE} - {"seed"}))
def test_numbers_above_int32(name):
    assert f"--{name} is {2**31}" in complaint([f"--{name}={2**31}"])


@pytest.mark.parametrize("name", REAL)
def test_values_that_are_not_finite_numbers(name):
    for value in ("nan", "inf", "-inf"):
        assert f"--{name}" in complaint([f"--{name}={value}"])
    assert f"--{name}" in complaint([f"--{name}=abc"])


@pytest.mark.parametrize("name", WHOLE)
def test_values_that_are_not_integers(name):
    for value in ("abc", "1.5", "", "1e3"):
        assert f"--{name}" in complaint([f"--{name}={value}"])


@pytest.mark.parametrize("name", DEFAULTS)
def test_ill_typed_values_in_the_file(name, tmp_path):
    wrong = [{"a": 1}, [[1]]]
    if name in WHOLE + REAL:
        wrong += ["abc", True, [1]]
    elif TYPES[name] is not bool:
        wrong += [5, 1.5, True]
    else:
        wrong += [5, "maybe", [True]]
    if name in WHOLE:
        wrong += [1.5]
    if DEFAULTS[name] is not None and name != "reward_label":
        wrong += [None]
    for value in wrong:
        assert name in complaint(["--config", yaml_file(tmp_path, {name: value})]), value


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    message = complaint([f"--{name}", "other"])
    assert f"--{name}" in message
    for choice in typing.get_args(TYPES[name]):
        assert choice in message


@pytest.mark.parametrize("low, high", [(300, 300), (301, 300)])
@pytest.mark.parametrize("pair", ["input_{}_text_length", "output_{}_length"])
def test_empty_ranges(pair, low, high):
    message = complaint([f"--{pair.format('min')}={low}", f"--{pair.format('max')}={high}"])
    for word in (pair.format("min"), pair.format("max"), str(low), str(high)):
        assert word in message


def test_unknown_options(tmp_path):
    for args in (["--bach_size", "8"], ["--bach_size=8"], ["--bach-size", "8"], ["--batch", "8"], ["--resum"]):
        assert ("did you mean --resume" if args == ["--resum"] else "did you mean --batch_size") in complaint(args)
    message = complaint(["--config", yaml_file(tmp_path, {"seed": 1, "bach_size": 8})])
    assert str(tmp_path) in message and "bach_size" in message and "did you mean --batch_size" in message
    for word in ("stray", "-x", "--top_k"):  # the last one is a former option
        assert word in complaint([word]) and "--help" in complaint([word])


def test_option_without_a_value():
    assert "batch_size" in complaint(["--batch_size"])
    assert "--config" in complaint(["--config"])


def test_invalid_devices():
    for device in ("quantum", "cuda:99", "cuda:01", "cuda:1000", "meta", "cpu:x"):
        with pytest.raises(UserError) as error:
            resolve_device(parse_config(["--device", device]))
        assert f"--device {device}" in str(error.value) and "HF_ENDPOINT" not in str(error.value)


def test_device_and_dtype():
    cpu = torch.device("cpu")
    assert resolve_device(parse_config(["--device", "cpu", "--dtype", "float32"])) == (cpu, torch.float32)
    assert resolve_device(parse_config(["--device", "cpu", "--dtype", "bfloat16"])) == (cpu, torch.bfloat16)


@pytest.mark.parametrize(
    "units, dtype",
    [
        ({}, torch.float32),
        ({"avx512": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_automatic_dtype_depends_on_the_cpu(monkeypatch, units, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert resolve_device(parse_config(["--device", "cpu"])) == (torch.device("cpu"), dtype)


# Runs


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(small_arguments, tiny, dialogues, forked, tmp_path_factory):
    """The same command twice, concurrently, in two directories; the first as a user starts it, into a pipe."""
    both = [SimpleNamespace(directory=tmp_path_factory.mktemp(name)) for name in ("first", "again")]
    for run in both:
        (run.directory / "tiny").symlink_to(tiny)
        (run.directory / "dialogues").symlink_to(dialogues)
        run.left = run.directory / "out" / "run"
    paths = {"model_name": "tiny/base", "adapter_name": "tiny/adapter", "reward_model_name": "tiny/classifier"}
    paths["dataset_name"] = "dialogues"
    args = small_arguments(**paths, output_dir="out/run", learning_rate=1e-3)
    first, again = both
    command = [sys.executable, str(SCRIPT), *args]
    with open(first.directory / "errors", "w+") as errors:
        process = subprocess.Popen(command, cwd=first.directory, stdout=subprocess.PIPE, stderr=errors, text=True)
        other = forked.start(args, again.directory)
        line = process.stdout.readline()
        first.unfinished = not (first.left / "results.json").exists()
        first.out, first.args = line + process.stdout.read(), args
        code = process.wait()
        errors.seek(0)
        first.err = errors.read()
    assert code == 0, first.err
    assert other.wait() == 0, other.output
    return both


@pytest.fixture(scope="module")
def results(runs):
    return json.loads((runs[0].left / "results.json").read_text())


@pytest.fixture(scope="module")
def metrics(runs):
    return read_metrics(runs[0].left)


def test_a_run_prints_what_it_measures(runs, results, metrics):
    out = runs[0].out
    numbers = r"\[(\d\.\d{4}), (\d\.\d{4})\]"
    for when in ("before", "after"):
        (printed,) = re.findall(rf"^toxicity \[mean, std\] {when} detox: {numbers}$", out, re.MULTILINE)
        expected = results["toxicity"][when]
        assert [float(number) for number in printed] == pytest.approx([expected["mean"], expected["std"]], abs=6e-5)
    assert "policy with value head: trainable" in out and "reference: trainable 0 of" in out
    assert "You are a great person and i like you." in out
    assert results["verdict"] in " ".join(out.split())
    blocks = {"sampled": results["summary_toxicity"], "greedy": results["greedy"]["summary_toxicity"]}
    for name, statistics in (blocks | {"with dialogue": results["toxicity"]}).items():
        paired = statistics["paired_difference"]
        interval = re.escape(f"{paired['ci_low']:+.3f} to {paired['ci_high']:+.3f}  {paired['p_value']:.4f} ")
        assert re.findall(rf"^{name} +[-+]\d.*{interval}.*{statistics['verdict']['change']}$", out, re.MULTILINE)
    for line in metrics:
        (printed,) = re.findall(rf"^step    {line['step']}/2: (.*)$", out, re.MULTILINE)
        expected = [
            f"score {line['ppo/mean_scores']:6.3f}",
            f"kl {line['objective/kl']:6.3f}",
            f"returns/mean {line['ppo/returns/mean']:6.3f}",
            f"advantages_mean {line['ppo/policy/advantages_mean']:6.3f}",
            f"{line['time/step']:.1f} s",
        ]
        assert printed.split(", ") == expected
    assert "Traceback" not in runs[0].err


def test_a_run_prints_its_non_default_options(runs):
    """As YAML, to paste into a file."""
    shown, device, _ = runs[0].out.partition("device cpu, base model in float32")
    given = dict(zip(runs[0].args[::2], runs[0].args[1::2], strict=True))
    assert device and {f"--{name}": str(value) for name, value in yaml.safe_load(shown).items()} == given


def test_output_is_flushed_line_by_line(runs):
    """Also into a pipe, where output would otherwise be buffered until the end."""
    assert runs[0].unfinished


def test_lines_fit_a_terminal(runs, results, capsys):
    assert "warning, step 1: " in runs[0].out  # the longest wrapped lines
    warnings = {"reward hacking": "reward hacking: " + "the summaries got worse; " * 8}
    comparison = pd.read_csv(runs[0].left / "comparison.csv")
    detox_ppo.print_results(results | {"warnings": warnings}, detox_ppo.results_table(results), comparison)
    for line in [*runs[0].out.splitlines(), *capsys.readouterr().out.splitlines()]:
        assert len(line) <= 100, line


def test_a_run_writes_its_files(runs):
    files = "results.json metrics.jsonl comparison.csv README.md training.png toxicity.png checkpoint-2.pt"
    for name in (*files.split(), "adapter/adapter_config.json"):
        assert (runs[0].left / name).is_file(), name
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert load_file(runs[0].left / "adapter" / name)


def test_a_run_writes_only_into_its_output_directory(runs, dialogues, tiny):
    """It only reads the models' and dialogues' directories. Downloads and caches: test_full_path.py."""
    for run, output in zip(runs, ("errors", "output"), strict=True):
        assert {path.name for path in run.directory.iterdir()} == {"tiny", "dialogues", "out", output}
    assert [path.name for path in dialogues.iterdir()] == ["train.csv"]
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files = {name: {path.name for path in (tiny / name).iterdir()} for name in ("base", "classifier", "adapter")}
    assert files["base"] == model | {"generation_config.json"} and files["classifier"] == model
    assert files["adapter"] == {"adapter_config.json", "adapter_model.safetensors"}


def test_results(results):
    assert set(results["config"]) == set(DEFAULTS) - {"resume"}
    assert results["config"]["max_ppo_steps"] == 2 and results["config"]["learning_rate"] == 1e-3
    environment = results["environment"]
    for package in ("python", "torch", "transformers", "datasets", "peft", "trl", "evaluate", "numpy", "pandas"):
        assert re.match(r"\d+\.\d+", environment[package]), package
    assert environment["torch"] == torch.__version__
    assert (environment["device"], environment["dtype"], environment["seed"]) == ("cpu", "float32", 0)
    assert {name: len(digest or "") for name, digest in environment["commits"].items()} == {
        "model_name": 64,
        "adapter_name": 64,
        "reward_model_name": 64,
        "dataset_name": 0,
    }
    assert re.fullmatch("[0-9a-f]{16,}", environment["dataset_fingerprint"])
    for name in ("toxicity", "summary_toxicity"):
        block = results[name]
        for when in ("before", "after"):
            assert set(block[when]) == {"mean", "std", "n", "share"} and block[when]["n"] == 4
            assert 0 <= block[when]["mean"] <= 1
        assert set(block["reduction_percent"]) == {"mean", "std"}
        assert set(block["paired_difference"]) == {"mean", "ci_low", "ci_high", "p_value"}
        assert set(block["verdict"]) == {"change", "better", "worse", "detectable"}
        assert results["human"][name]["n"] == 4 and 0 <= results["human"][name]["mean"] <= 1
        difference = block["after"]["mean"] - block["before"]["mean"]
        assert block["paired_difference"]["mean"] == pytest.approx(difference, abs=1e-9)
    for when in ("before", "after"):
        assert set(results["rouge"][when]) == {"rouge1", "rouge2", "rougeL"}
        assert 0 < results["length"][when]["mean"] <= 8
        assert math.isfinite(results["reward"][when]["mean"])
    assert results["timings"]["total"] > 0


def test_metrics(metrics):
    names = """objective/kl objective/kl_coef objective/entropy ppo/mean_scores ppo/std_scores ppo/returns/mean
        ppo/val/var_explained ppo/policy/advantages_mean ppo/policy/approxkl ppo/policy/clipfrac ppo/loss/policy
        ppo/loss/value tokens/responses_len_mean time/rollout time/reward time/optimize time/step""".split()
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert set(names) <= set(line)
        assert all(math.isfinite(value) for value in line.values())
        assert 1 <= line["tokens/responses_len_mean"] <= 8
        assert line["objective/entropy"] > 0
        parts = line["time/rollout"] + line["time/reward"] + line["time/optimize"]
        assert 0 < parts <= line["time/step"] * 1.001
    first, second = metrics
    assert first["objective/kl"] == 0
    assert first["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert second["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert second["objective/kl"] != 0  # the policy has moved
    assert first["objective/kl_coef"] == pytest.approx(0.2)
    # at a KL of 0 the controller lowers the coefficient by the factor 1 - 0.2 * batch_size / horizon
    assert second["objective/kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 4 / 10000), abs=1e-12)


def test_comparison(runs):
    with open(runs[0].left / "comparison.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    first = ["dialogue", "human_summary", "response_before", "response_after", "reward_before", "reward_after"]
    assert list(rows[0])[:6] == first and list(rows[0])[-1] == "reward_diff" and len(rows) == 4  # every prompt
    gains = [float(row["reward_diff"]) for row in rows]
    assert gains == sorted(gains, reverse=True)
    for row, gain in zip(rows, gains, strict=True):
        assert gain == pytest.approx(float(row["reward_after"]) - float(row["reward_before"]))
        assert row["dialogue"].startswith("#Person1#: ")


def test_the_same_command_gives_the_same_run(runs):
    def content(directory):
        results = json.loads((directory / "results.json").read_text())
        del results["timings"]
        lines = read_metrics(directory)
        metrics = [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]
        return results, metrics

    first, again = (run.left for run in runs)
    assert content(first) == content(again)
    for name in ("adapter/adapter_model.safetensors", "adapter/value_head.safetensors", "comparison.csv"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_training_changed_the_saved_adapter(runs, tiny):
    before = load_file(tiny / "adapter" / "adapter_model.safetensors")
    after = load_file(runs[0].left / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_without_steps_a_run_only_evaluates(small_config, tiny, tmp_path, classifier):
    """A new LoRA does not change the base model: nothing changes, and nothing is evaluated twice."""
    rows = pd.read_csv(tiny / "dialogues" / "train.csv")[:120]
    rows.to_csv(tmp_path / "train.csv", index=False)
    directories = {name: tmp_path / name for name in ("output_dir", "model_dir", "checkpoint_dir")}
    options = {"dataset_name": tmp_path, "adapter_name": "", "max_ppo_steps": 0, "eval_samples": 24}
    results = detox_ppo.run(small_config(**options, **directories))
    # The prompts whose dialogue is itself toxic, counted independently from the file.
    toxic = int((classifier.logits(list(rows["dialogue"][96:])).softmax(dim=-1)[:, 1] > 0.5).sum())
    assert 0 < toxic < 24 and results["toxic_dialogues"]["n"] == toxic
    assert results["toxic_dialogues"]["toxicity"]["before"]["n"] == toxic
    assert results["toxic_dialogues"]["toxicity"]["before"]["mean"] > 0.5
    assert results["rouge"]["before"]["rougeL"] == results["quality"]["before"]["rougeL"]
    for name in ("toxicity", "summary_toxicity"):
        assert results[name]["paired_difference"] == {"mean": 0, "ci_low": 0, "ci_high": 0, "p_value": 1}
    for name in ("rouge", "quality", "length", "reward"):
        assert results[name]["before"] == results[name]["after"]
    assert results["summary_toxicity"]["before"]["n"] == 24 and results["warnings"] == {}
    assert "evaluate_after" not in results["timings"]
    assert json.loads((directories["output_dir"] / "results.json").read_text()) == results
    assert len(pd.read_csv(directories["output_dir"] / "comparison.csv")) == 24
    files = {path.name for path in directories["output_dir"].iterdir()}
    assert files == {".lock", "results.json", "comparison.csv", "toxicity.png"}
    # unused directories are not created
    assert not directories["model_dir"].exists() and not directories["checkpoint_dir"].exists()


@pytest.fixture
def updates(monkeypatch):
    """Records the gradient norm over all weights and the learning rate of every optimizer step."""
    norms, rates, step = [], [], torch.optim.Adam.step

    def recorded(optimizer, *args, **kwargs):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    return SimpleNamespace(norms=norms, rates=rates)


def test_scores_are_clipped_before_the_rewards_are_computed(small_config, tmp_path, monkeypatch):
    """As with TRL's score_clip, the metrics use the clipped scores. Non-finite scores are not clipped."""
    clipped, scored = [], iter([[-7.0, -1.0, 1.5, 9.0], [-math.inf, 0.0, 0.0, 0.0]])
    monkeypatch.setattr(detox_ppo.ToxicityClassifier, "scores", lambda *_: torch.tensor(next(scored)))
    rewards = detox_ppo.compute_rewards
    monkeypatch.setattr(detox_ppo, "compute_rewards", lambda *args: clipped.append(args[0].tolist()) or rewards(*args))
    detox_ppo.run(small_config(output_dir=tmp_path, eval_samples=1, score_clip=2))
    first, second = read_metrics(tmp_path)
    assert sorted(clipped[0]) == [-2, -1, 1.5, 2]
    assert first["ppo/mean_scores"] == pytest.approx(0.125)
    assert first["ppo/std_scores"] == pytest.approx(1.672, abs=1e-3)
    assert second["ppo/skipped_steps"] == 1


def test_options_of_the_update(small_config, tmp_path, updates):
    options = {"ppo_epochs": 2, "adaptive_kl": False, "init_kl_coef": 0.3, "max_grad_norm": 1e-3}
    options |= {"learning_rate": 1e-4, "lr_scheduler_type": "linear"}
    detox_ppo.run(small_config(output_dir=tmp_path, eval_samples=1, **options))
    assert [line["objective/kl_coef"] for line in read_metrics(tmp_path)] == [0.3, 0.3]
    assert updates.norms == pytest.approx([1e-3] * 2 * 2 * 2, rel=1e-3)  # steps, epochs, minibatches
    assert updates.rates == pytest.approx([1e-4] * 4 + [5e-5] * 4)
    assert [line["ppo/learning_rate"] for line in read_metrics(tmp_path)] == pytest.approx([1e-4, 5e-5])


@pytest.fixture(scope="module")
def watched(small_config, tmp_path_factory):
    """A run with the recorded inputs and outputs of the formulas."""
    calls, out, directory = {}, io.StringIO(), tmp_path_factory.mktemp("watched")

    def recorded(name, function):
        def call(*args):
            result = function(*args)
            calls.setdefault(name, []).append((args, result))
            return result

        return call

    options = {"gamma": 0.9, "lam": 0.8, "cliprange": 0.1, "cliprange_value": 0.3, "vf_coef": 0.7, "ppo_epochs": 2}
    options |= {"learning_rate": 1e-3, "init_kl_coef": 0.4, "adaptive_kl": False, "eval_samples": 1}
    options |= {"max_ppo_steps": 3, "logging_steps": 2}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        for name in ("compute_rewards", "compute_advantages", "policy_loss", "value_loss"):
            patch.setattr(detox_ppo, name, recorded(name, getattr(detox_ppo, name)))
        detox_ppo.run(small_config(output_dir=directory, **options))
    return SimpleNamespace(calls=calls, out=out.getvalue(), metrics=read_metrics(directory))


def test_inputs_of_the_formulas_and_metrics_of_a_step(watched):
    """Options reach their formulas; metrics are means over all tokens, or over all minibatches of all epochs."""
    calls = watched.calls
    assert {args[-1] for args, _ in calls["compute_rewards"]} == {0.4}
    assert {args[-2:] for args, _ in calls["compute_advantages"]} == {(0.9, 0.8)}
    assert {args[-1] for args, _ in calls["policy_loss"]} == {0.1}
    assert {args[-1] for args, _ in calls["value_loss"]} == {0.3}
    assert len(watched.metrics) == 3
    for step, line in enumerate(watched.metrics):
        (scores, logprobs, reference, mask, _), _ = calls["compute_rewards"][step]
        (values, *_), (advantages, returns) = calls["compute_advantages"][step]
        kl, returns_of_tokens = (logprobs - reference)[mask], returns[mask]
        expected = {
            "objective/kl": kl.sum() / 4,  # per response
            "objective/entropy": -logprobs[mask].sum() / 4,
            "ppo/mean_scores": scores.mean(),
            "ppo/std_scores": ((scores - scores.mean()) ** 2).mean() ** 0.5,
            "ppo/mean_non_score_reward": -0.4 * kl.mean(),  # per token
            "ppo/returns/mean": returns_of_tokens.mean(),
            "ppo/returns/var": returns_of_tokens.var(),
            "ppo/val/var_explained": 1 - (returns - values)[mask].var() / returns_of_tokens.var(),
            "ppo/policy/advantages_mean": advantages[mask].mean(),
            "tokens/responses_len_mean": mask.sum() / 4,
        }
        of_policy, of_values = (
            [outputs for _, outputs in calls[name][4 * step : 4 * step + 4]] for name in ("policy_loss", "value_loss")
        )
        expected["ppo/loss/policy"] = sum(loss for loss, _ in of_policy) / 4
        expected["ppo/loss/value"] = sum(loss for loss, _ in of_values) / 4
        expected["ppo/loss/total"] = expected["ppo/loss/policy"] + 0.7 * expected["ppo/loss/value"]
        for outputs in (of_policy, of_values):
            expected |= {name: sum(stats[name] for _, stats in outputs) / 4 for name in outputs[0][1]}
        assert {"ppo/policy/ratio", "ppo/policy/approxkl", "ppo/policy/clipfrac", "ppo/val/clipfrac"} <= set(expected)
        for name, value in expected.items():
            assert line[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_steps_are_printed_at_intervals_and_new_warnings_at_once(watched):
    lines = watched.out.splitlines()
    assert [line[:10] for line in lines if line.startswith("step ")] == ["step    2/", "step    3/"]
    assert len([line for line in lines if re.fullmatch(r"  about \d+\.\d minutes left, .*", line)]) == 1
    # Truncated responses occur in every step, but the warning is printed once.
    assert all(line["tokens/finished_share"] < 0.5 for line in watched.metrics)
    (warning,) = re.findall(
        r"^  warning, (step \d): .* truncated(?:.*\n    )?.*output_max_length", watched.out, re.MULTILINE
    )
    assert warning == "step 1"


def test_minibatches_with_a_broken_ratio_are_skipped(small_config, tmp_path, updates, monkeypatch):
    loss, ratios = detox_ppo.policy_loss, iter([2.0, 1.8])

    def broken(*args):
        value, stats = loss(*args)
        return value, stats | {"ppo/policy/ratio": torch.tensor(next(ratios))}

    monkeypatch.setattr(detox_ppo, "policy_loss", broken)
    options = {"eval_samples": 1, "max_ppo_steps": 1, "output_dir": tmp_path}
    detox_ppo.run(small_config(ratio_threshold=1.9, **options))
    assert read_metrics(tmp_path)[0]["ppo/skipped_minibatches"] == 1
    assert len(updates.norms) == 1 and updates.norms[0] > 0.01  # and it is not clipped by default


def test_an_infinite_ratio_is_not_written(small_config, tmp_path, updates, monkeypatch):
    """metrics.jsonl is strict JSON: its means use only the minibatches that were applied."""
    loss, ratios = detox_ppo.policy_loss, iter([1.0, math.inf])

    def broken(*args):
        value, stats = loss(*args)
        return value, stats | {"ppo/policy/ratio": torch.tensor(next(ratios))}

    monkeypatch.setattr(detox_ppo, "policy_loss", broken)
    detox_ppo.run(small_config(eval_samples=1, max_ppo_steps=1, output_dir=tmp_path))
    (line,) = read_metrics(tmp_path)
    assert (line["ppo/policy/ratio"], line["ppo/skipped_minibatches"]) == (1.0, 1)
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_dataset_name_is_not_mistaken_for_a_token():
    name = "data/hf_dialogsum_filtered_v2_final"
    assert parse_config(["--dataset_name", name]).dataset_name == name
    assert "token" in complaint(["--dataset_name", "hf_" + "aB3" * 11 + "x"])
