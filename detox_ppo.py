"""Make a summarizer stop being toxic: PPO on FLAN-T5 with a LoRA adapter, in one file.

The policy is a sequence-to-sequence model with a LoRA adapter and a value head; the reference is the same base
with the starting adapter, frozen; the score of a summary is the raw "nothate" logit of a RoBERTa hate-speech
classifier. The run measures toxicity before, trains, loads the trained adapter back from disk and measures
again, on the same prompts and with the same random numbers.

    python detox_ppo.py                                          # FLAN-T5-base on DialogSum, from the hub
    python detox_ppo.py --config checkpoints/tiny/config.yaml    # the bundled small world, no network, minutes
    python detox_ppo.py --help                                   # every option, its unit and why to change it

It leaves results.json, metrics.jsonl (a line per PPO step), comparison.csv, adapter/ and a model card with two
pictures in --output_dir. Without --adapter_name the summarizer is the bare model with a new LoRA; --sft_steps tunes
it on the human summaries first. A run that was stopped goes on with --resume. It runs on the CPU or on one GPU, and in
several processes by `accelerate launch --multi_gpu --num_processes N detox_ppo.py ...`.
"""

import bisect
import copy
import dataclasses
import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

# oneDNN keeps what it prepared for the last 1,024 shapes it met, half a megabyte each; fewer serve as well. It reads
# this when torch first uses it.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

import accelerate
import datasets
import evaluate
import huggingface_hub
import numpy as np
import pandas as pd
import peft
import torch
import transformers
import trl
import yaml
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, parse_flag_from_env, reduce
from filelock import FileLock, Timeout
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from matplotlib.figure import Figure
from rouge_score import rouge_scorer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl.trainer.utils import selective_log_softmax

NEWEST = "newest"  # what a bare --resume means
SAGEMAKER = Path("/opt/ml")  # where a SageMaker training job finds and leaves its files
SMALL_WORLD = "python detox_ppo.py --config checkpoints/tiny/config.yaml"


SECRET_NAMES = re.compile("(TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|_KEY)(?!.*_(PATH|FILE)$)", re.IGNORECASE)
# user:password of a URL, telling parameters of its query, and the hub's tokens.
SECRETS = re.compile(
    r"(://)[^/\s]+(?=@)|([?&][\w-]*(?:token|signature|credential|key|secret|password)[\w-]*=)[^&\s]+|\b(?-i:hf_[0-9A-Za-z]{20,})",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Text without tokens and passwords, whether they are in the environment, the hub's token file or a URL."""
    known = [value for name, value in os.environ.items() if SECRET_NAMES.search(name)]
    for secret in sorted([*known, huggingface_hub.get_token() or ""], key=len, reverse=True):
        if len(secret) >= 8:  # a flag such as HF_HUB_DISABLE_IMPLICIT_TOKEN=1 is none
            text = text.replace(secret, "***")
    return SECRETS.sub(r"\1\2***", text)


class UserError(Exception):
    """A mistake or a fault that the user can mend: shown as one line, exit code 2, no stack trace.

    What it quotes may come from anywhere: secrets are masked, and signs that would move the cursor are spelt out.
    """

    def __init__(self, message: str):
        text = masked(" ".join(message.split()))
        super().__init__("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text))


class MaskedRecord(logging.LogRecord):
    """A line of any library's log, such as the hub's about another attempt at a URL."""

    def getMessage(self):
        return masked(super().getMessage())


def one_line(error: Exception | str) -> str:
    # A KeyError's own text is the key alone, a MemoryError's may be empty.
    text = repr(error) if isinstance(error, KeyError) or not str(error) else str(error)
    return " ".join(text.split())[:400]


def explain(error: Exception) -> str | None:
    """A failure that the user can mend, in one line; None for a defect of the script."""
    if isinstance(error, UserError):
        return str(error)
    # PyTorch's and oneDNN's words for it on the CPU.
    memory = r"can't allocate memory|could not (create|execute) a (primitive|memory)|Cannot allocate memory|bad_alloc"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(memory, str(error)):
        return (
            f"out of memory: {one_line(error)}. Lower mini_batch_size for the update; batch_size, output_max_length "
            "or input_max_text_length for sampling and evaluation."
        )
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return (
            f"another process of this run has ended ({one_line(error).split('. ')[0]}). What accelerate or torchrun "
            "prints below names it. The newest checkpoint is whole, --resume goes on from it."
        )
    on_disk = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EISDIR, errno.EACCES, errno.EPERM)
    if isinstance(error, OSError) and error.errno in on_disk:
        return f"{one_line(error)}. When that is mended, --resume goes on from the newest checkpoint."
    return None


# ---------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------


def option(default, help):
    """One field of the configuration, with the text that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DetoxConfig:
    """Every option of a run. Flags win over `--config FILE.yaml`, which wins over these defaults."""

    # models
    model_name: str = option("google/flan-t5-base", "Encoder-decoder, hub id or directory. Larger ones write better.")
    adapter_name: str | None = option(None, "LoRA to start from, hub id or directory. None or empty: a new one.")
    lora_r: int = option(32, "Rank of a new LoRA. Lower saves memory and learns less; a loaded adapter keeps its own.")
    lora_alpha: int = option(32, "Scale of a new LoRA, applied as lora_alpha / lora_r. Raise it to amplify updates.")
    lora_dropout: float = option(
        0.05, "Dropout of a new LoRA, a share, for its tuning. PPO and the evaluation run without."
    )
    lora_target_modules: list[str] | None = option(
        None, "Layers a new LoRA adapts. None: PEFT's for the model's family, such as q and v of a T5."
    )
    reward_model_name: str = option(
        "facebook/roberta-hate-speech-dynabench-r4-target",
        "Classifier that scores the text: hub id or directory. Change it for another language or notion of toxic.",
    )
    reward_label: str = option("nothate", "Label whose raw logit is the score to raise, by name.")
    toxic_label: str = option("hate", "Label whose probability is the toxicity that is reported, by name.")
    # data
    dataset_name: str = option("knkarthick/dialogsum", "Dialogues: hub id, csv/jsonl file, or a directory with one.")
    input_min_text_length: int = option(200, "Keep dialogues longer than this, in characters: short ones say little.")
    input_max_text_length: int = option(1000, "Keep dialogues up to this, in characters. Lower is faster.")
    test_size: float = option(0.2, "Share of the rows, at the end of the file, kept for evaluation only.")
    # tuning
    sft_steps: int = option(0, "Steps that tune the LoRA on the human summaries before PPO. 0: none.")
    sft_learning_rate: float = option(
        1e-3, "AdamW's step size in the tuning; it falls to 0. Lower it if the loss jumps."
    )
    sft_batch_size: int = option(16, "Dialogues a tuning step. Lower saves memory.")
    sft_max_target_length: int = option(128, "Human summaries are learned up to this, in tokens. Lower saves memory.")
    # PPO
    learning_rate: float = option(1.41e-5, "Adam's step size. Raise it to learn in fewer steps; watch objective/kl.")
    batch_size: int = option(16, "Prompts a PPO step. Larger gives steadier steps for more time each.")
    mini_batch_size: int = option(4, "Responses per optimizer update; divides batch_size. Lower saves memory.")
    gradient_checkpointing: bool = option(
        False, "Compute activations again for the gradients instead of keeping them: less memory, more time."
    )
    ppo_epochs: int = option(1, "Passes over each batch. More squeezes a batch harder and moves further from it.")
    max_ppo_steps: int = option(10, "PPO steps to run. The notebooks' 10 only show it; more detoxify more. 0: none.")
    init_kl_coef: float = option(0.2, "Price of a nat of KL to the reference, in score. Raise it to stay closer.")
    adaptive_kl: bool = option(True, "Steer the KL coefficient towards target_kl; off keeps init_kl_coef.")
    target_kl: float = option(6.0, "Where the adaptive coefficient steers objective/kl, in nats a response.")
    kl_horizon: int = option(10000, "Responses over which the adaptive coefficient reacts. Lower reacts faster.")
    gamma: float = option(1.0, "Discount a token, 0 to 1. 1 credits every token with the final score.")
    lam: float = option(0.95, "GAE's lambda, 0 to 1. 1 trusts the sampled return, 0 the value head.")
    cliprange: float = option(0.2, "Clip of the policy ratio, 1 plus or minus this. Lower makes careful updates.")
    cliprange_value: float = option(0.2, "Clip of the value's move in a step, in score.")
    vf_coef: float = option(0.1, "Weight of the value loss. Raise it to let values shape the shared LoRA more.")
    value_adapter: bool = option(
        False, "Give the value head a LoRA of its own: explains more of the return, a third more time a step."
    )
    value_learning_rate: float | None = option(
        None, "Adam's step size for the value head and its LoRA. None: learning_rate."
    )
    ratio_threshold: float = option(10.0, "Skip minibatches whose mean ratio is above this: a broken update.")
    target_policy_kl: float | None = option(
        None, "End a step's updates when they moved the policy by 1.5 times this, in nats a token. None: never."
    )
    max_grad_norm: float | None = option(None, "Clip gradients to this norm. Set it if the loss spikes.")
    # responses
    output_min_length: int = option(100, "Least new-token cap of a response in PPO; caps are drawn uniformly.")
    output_max_length: int = option(400, "Greatest new-token cap of a response in PPO. Lower is faster.")
    top_k: int = option(0, "Sample from the k likeliest tokens, scored so too. 0: all, which PPO wants.")
    top_p: float = option(1.0, "Sample from the likeliest tokens of this total probability. 1: all.")
    score_text: typing.Literal["query_response", "response"] = option(
        "query_response", "What is scored: dialogue + summary, or summary alone (sharper where dialogues are toxic)."
    )
    # evaluation
    eval_samples: int = option(100, "Test prompts to evaluate, exactly; -1: all. More gives a narrower interval.")
    eval_samples_per_prompt: int = option(1, "Summaries sampled for each. More average out the sampling's luck.")
    eval_every: int = option(
        0, "PPO steps between evaluations on rows set aside, of which the best adapter is kept. 0: keep the last."
    )
    eval_max_new_tokens: int = option(100, "Longest summary in the evaluation, in tokens.")
    compare_samples: int = option(20, "Evaluated prompts written side by side to comparison.csv (at most all).")
    # run
    seed: int = option(0, "Seed of everything random. Other seeds show how far a result is luck.")
    device: str = option("auto", "cpu, cuda or cuda:N. auto: a GPU where there is one.")
    dtype: typing.Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Type of the frozen base; the rest is float32. auto: bfloat16 where the chip computes in it."
    )
    output_dir: str = option("checkpoints/run", "Directory for everything the run leaves.")
    save_steps: int = option(10, "Steps from one checkpoint to the next. Fewer lose less when the machine goes away.")
    save_total_limit: int = option(2, "Checkpoints kept, the newest. One of FLAN-T5-base takes 57 MB.")
    resume: str | None = field(
        default=None,
        metadata={
            "help": "Go on from the newest checkpoint in output_dir, or from the directory named here.",
            "nargs": "?",
            "const": NEWEST,
        },
    )
    report_to: typing.Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "Tracker that shows the steps while they run; it has to be installed. none: files only."
    )
    dynamodb_table: str | None = option(None, "DynamoDB table that the comparison goes to at the end, by awswrangler.")


class OptionParser(trl.TrlParser):
    """TrlParser whose complaints are UserErrors: one line instead of the usage of every option."""

    def error(self, message):
        raise UserError(f"{message} (see: python detox_ppo.py --help)")


class OptionLoader(yaml.SafeLoader):
    """Refuses an option that stands twice, of which YAML would take the second in silence."""

    def construct_mapping(self, node, deep=False):
        found = Counter(str(key.value) for key, _ in node.value)
        if twice := [name for name, count in found.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_options(path: str) -> dict:
    """Read a configuration file; TrlParser's own reader would let it set environment variables too, by an `env` key.

    Raises:
        UserError: no such file, no YAML mapping in UTF-8, or a key that is no option.
    """
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8-sig"), OptionLoader)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path}: not a YAML file: {one_line(error)}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {path}: expected a YAML mapping, a line `option: value` for each option")
    known = {option.name for option in dataclasses.fields(DetoxConfig)}
    if unknown := [str(name) for name in options if name not in known]:
        raise UserError(f"--config {path}: unknown option: {', '.join(unknown)} (see: python detox_ppo.py --help)")
    return options


def parse_config(args: list[str]) -> DetoxConfig:
    """Parse flags and `--config FILE.yaml` into a checked configuration.

    Raises:
        UserError: an unknown, ill-typed or out-of-range option, named with what was expected.
    """
    parser = OptionParser(DetoxConfig, prog="detox_ppo.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of these options; flags win over it.")
    # TrlParser knows only "--config FILE", in two words.
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if args[-1:] == ["--config"] or args.count("--config") > 1:
        raise UserError("--config takes one file, once: --config FILE.yaml")
    if "--config" in args:
        at = args.index("--config")
        parser.set_defaults_with_config(**read_options(args[at + 1]))
        del args[at : at + 2]
    try:
        # Unless told otherwise the parser would also read a file detox_ppo.args beside the script.
        config, _ = parser.parse_args_into_dataclasses(args, look_for_args_file=False)
    except ValueError as error:
        raise UserError(f"{one_line(error)} (see: python detox_ppo.py --help)") from error
    # A SageMaker job turns the list ["q", "v"] into one text, "['q', 'v']".
    modules = config.lora_target_modules
    modules = [modules] if isinstance(modules, str) else modules
    if modules and isinstance(modules, list) and all(isinstance(item, str) for item in modules):
        config.lora_target_modules = re.findall(r"[^][\s,'\"]+", " ".join(modules)) or None
    if str(config.resume).lower() in ("true", "false"):  # as in a YAML file, and as Hugging Face's Trainer takes it
        config.resume = NEWEST if str(config.resume).lower() == "true" else None
    # In a SageMaker training job, what the job says of its data wins over a file, a flag wins over both.
    flags = {arg.split("=")[0].removeprefix("--") for arg in args if arg.startswith("--")}
    for name, variable in (("dataset_name", "SM_CHANNEL_TRAINING"), ("output_dir", "SM_OUTPUT_DATA_DIR")):
        if variable in os.environ and name not in flags:
            setattr(config, name, os.environ[variable])
    if "SM_MODEL_DIR" in os.environ and "resume" not in flags:
        config.resume = NEWEST  # a spot job is started again with the same options
    check_config(config)
    config.adapter_name, config.dynamodb_table = config.adapter_name or None, config.dynamodb_table or None
    return config


# Control characters, and the halves of characters that Python makes of names in other encodings than UTF-8.
UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_config(config: DetoxConfig) -> None:
    """Check every option's type and range.

    Values from YAML reach the dataclass unconverted, so types are checked here, not by argparse.

    Raises:
        UserError: names the option, its value and what was expected.
    """

    def require(name, holds, expected):
        if not holds:
            raise UserError(f"--{name} is {getattr(config, name)!r}, but must be {expected}")

    for name, annotation in typing.get_type_hints(DetoxConfig).items():
        value = getattr(config, name)
        allowed = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        if value is None:
            require(name, type(None) in allowed, "set")
        elif typing.get_origin(annotation) is typing.Literal:
            require(name, value in typing.get_args(annotation), f"one of {', '.join(typing.get_args(annotation))}")
        elif list[str] in allowed:
            holds = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
            require(name, holds, "one or more names")
        elif float in allowed:
            holds = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            require(name, holds, "a finite number")
            setattr(config, name, float(value))
        else:
            # bool is a subclass of int in Python, but `batch_size: yes` is a mistake.
            require(name, type(value) in allowed, f"of type {allowed[0].__name__}")
        if type(value) is int and name != "seed":
            require(name, value < 2**31, "below 2**31")
        if type(value) is str:
            require(name, value.strip() or type(None) in allowed, "a name, not nothing")
            require(name, not UNFIT.search(value), "of ordinary signs, without line breaks and the like")
            # It would be printed, and written to results.json and the model card.
            require(name, masked(value) == value, "without a token or password; the hub's token belongs in HF_TOKEN")

    at_least_1 = "lora_r lora_alpha batch_size mini_batch_size ppo_epochs kl_horizon save_steps save_total_limit"
    at_least_1 += " output_min_length eval_samples_per_prompt eval_max_new_tokens sft_batch_size sft_max_target_length"
    at_least_0 = "input_min_text_length sft_steps max_ppo_steps init_kl_coef top_k compare_samples seed vf_coef"
    at_least_0 += " eval_every"
    for least, names in ((1, at_least_1), (0, at_least_0)):
        for name in names.split():
            require(name, getattr(config, name) >= least, f"at least {least}")
    for name in ("learning_rate", "sft_learning_rate", "target_kl", "cliprange", "cliprange_value"):
        require(name, getattr(config, name) > 0, "greater than 0")
    for name in ("gamma", "lam"):
        require(name, 0 <= getattr(config, name) <= 1, "between 0 and 1")
    require("lora_dropout", 0 <= config.lora_dropout < 1, "at least 0 and below 1")
    require("top_p", 0 < config.top_p <= 1, "above 0 and at most 1")
    require("test_size", 0 < config.test_size < 1, "above 0 and below 1")
    require("seed", config.seed < 2**64, "below 2**64")
    require("eval_samples", config.eval_samples == -1 or config.eval_samples >= 1, "at least 1, or -1 for all")
    require("ratio_threshold", config.ratio_threshold > 1, "greater than 1")
    require("toxic_label", config.toxic_label != config.reward_label, "another label than reward_label's")
    for name in ("max_grad_norm", "target_policy_kl", "value_learning_rate"):
        require(name, getattr(config, name) is None or getattr(config, name) > 0, "greater than 0, or unset")
    for kind in ("input_{}_text_length", "output_{}_length"):
        low, high = kind.format("min"), kind.format("max")
        if getattr(config, low) >= getattr(config, high):
            raise UserError(f"--{low} {getattr(config, low)} must be below --{high} {getattr(config, high)}")
    for whole, part in (("batch_size", "mini_batch_size"), ("max_ppo_steps", "eval_every")):
        if getattr(config, part) and getattr(config, whole) % getattr(config, part):
            sizes = f"--{whole} {getattr(config, whole)} is not a multiple of --{part} {getattr(config, part)}"
            raise UserError(sizes)


def resolve_device(config: DetoxConfig) -> tuple[torch.device, torch.dtype]:
    """The device to run on and the dtype of the frozen weights, `auto` resolved by what the chip can do."""
    processes, name = PartialState(), config.device
    if processes.num_processes > 1:
        if name not in ("auto", processes.device.type):
            raise UserError(f"--device {name}: each of several processes takes its own {processes.device.type}")
        name = "cpu" if processes.device.type == "cpu" else str(processes.device)
    elif name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch("cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"--device {config.device!r} is not supported: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {config.device}: this machine has {torch.cuda.device_count()} GPUs for PyTorch")
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    if device.type == "cuda":
        fast_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast_bfloat16 = any(capabilities.get(unit) for unit in ("amx_bf16", "avx512_bf16"))
    return device, torch.bfloat16 if fast_bfloat16 else torch.float32


# ---------------------------------------------------------------------------------------------------------------
# Processes: under `accelerate launch` each has the whole policy, and does its share of every batch
# ---------------------------------------------------------------------------------------------------------------


def share(rows: Iterable[int], lengths: list[int]) -> list[int]:
    """The part of the rows that is this process's, in their order; each process gets some of every length."""
    processes, rows = PartialState(), list(map(int, rows))
    ordered = sorted(rows, key=lambda row: lengths[row])
    mine = set(ordered[processes.process_index :: processes.num_processes])
    return [row for row in rows if row in mine]


def gather_rows(rows: list[int], *columns: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Put together what each process has of a batch: columns (b, ...) of its rows become (B, ...), padded with 0."""
    if PartialState().num_processes == 1:
        return list(columns)
    mine = [column if column is None else column.cpu().contiguous() for column in columns]
    order, *gathered = zip(*gather_object([(torch.tensor(rows), *mine)]), strict=True)
    order = torch.cat(order).argsort()
    whole = []
    for column, parts in zip(columns, gathered, strict=True):
        if column is not None and column.dim() > 1:
            parts = nn.utils.rnn.pad_sequence([row for part in parts for row in part], batch_first=True)
        elif column is not None:
            parts = torch.cat(parts)
        whole.append(None if column is None else parts[order].to(column.device))
    return whole


def add_up(parameters: list[nn.Parameter], stats: Counter) -> Counter:
    """Add the other processes' gradients to these parameters' own; returns the sum of all processes' stats."""
    if PartialState().num_processes == 1:
        return stats
    for parameter in parameters:
        if parameter.grad is None:  # none of the minibatch's rows was for this process
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    summed = reduce(nn.utils.parameters_to_vector(gradients), "sum")  # one message, not one a tensor
    nn.utils.vector_to_parameters(summed, gradients)
    total = Counter()
    for part in gather_object([stats]):
        total.update(part)
    return total


def first_to_end() -> bool:
    """Whether this process is the first of the run to end early: the others need not tell why as well."""
    if not torch.distributed.is_initialized():
        return True
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("ended", 1) == 1
    except torch.distributed.DistError:  # the process that kept the store is gone
        return True


# ---------------------------------------------------------------------------------------------------------------
# Data: DialogSum rows to prompts
# ---------------------------------------------------------------------------------------------------------------


def hub_commit(name: str, option_name: str, repo_type: str = "model") -> str | None:
    """Ask the hub for the commit of a repository, before anything is loaded; None for local files.

    Without this question an unreachable hub would show as half a minute of retries for each thing that is loaded.

    Raises:
        UserError: the hub can't be reached or has no such repository; there is no silent fallback.
    """
    if os.path.exists(name):  # unlike Path's, it takes names of any length
        return None
    try:
        return HfApi().repo_info(name, repo_type=repo_type, timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT).sha
    except OfflineModeIsEnabled:
        folder = repo_folder_name(repo_id=name, repo_type=repo_type)
        main = Path(huggingface_hub.constants.HF_HUB_CACHE, folder, "refs", "main")
        return main.read_text().strip() if main.is_file() else None
    except Exception as error:  # of a dozen types, some of a network library that the hub's may change
        raise UserError(
            f"--{option_name} {name}: no such file or directory, and not to be had from the hub at "
            f"{huggingface_hub.constants.ENDPOINT}: {one_line(error)}. Set HF_ENDPOINT for another hub, "
            f"HF_HUB_OFFLINE=1 to use what was downloaded before, or run the bundled small world: {SMALL_WORLD}"
        ) from error


@contextmanager
def loading(name: str, option_name: str):
    """Turn whatever a library raises while it loads `name` into one message that names it and the root cause."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--{option_name} {name}: its weights are a pickle that holds more than tensors, which could run code; "
            "it is refused. Ask its author for a safetensors file."
        ) from error
    except Exception as error:  # as above
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        because = "" if cause is error else f" (because of {type(cause).__name__}: {one_line(cause)})"
        what = f"{one_line(error)}{because}"
        if isinstance(error, HFValidationError) and os.path.exists(name):
            # What a directory lacks the libraries look for on the hub, where its path is no name.
            what = "a file that it needs is not there"
        if not os.path.exists(name):
            what += f". It is looked for on the hub at {huggingface_hub.constants.ENDPOINT}; try again if that failed"
        raise UserError(f"--{option_name} {name}: can't be loaded: {what}") from error


def read_table(path: Path) -> pd.DataFrame:
    """Read a csv or jsonl file.

    Raises:
        UserError: can't be read, broken encoding, or a broken row or line (its number is named).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from error
    if path.suffix == ".csv":
        try:
            # Read as a row like the others, the header shows names that stand twice, and holds all to its width.
            table = pd.read_csv(io.StringIO(text), header=None, dtype=str, keep_default_na=False, na_values=[""])
        except pd.errors.EmptyDataError as error:
            raise UserError(f"{path}: the csv is empty; expected columns dialogue and summary") from error
        except pd.errors.ParserError as error:
            hint = "quote texts that hold commas, quotes or line breaks"
            raise UserError(f"{path}: not a readable csv: {one_line(error)}; {hint}") from error
        table = table.astype(object)
        return table.iloc[1:].set_axis(table.iloc[0].fillna("").tolist(), axis=1)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON: {one_line(error)}") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}: line {number} must be a JSON object with dialogue and summary")
    # dtype=object keeps numbers as they came, so that the check of the rows sees and names them.
    return pd.DataFrame(rows, dtype=object)


def training_file(directory: Path) -> Path:
    """The csv or jsonl file of a data directory that holds the training rows: `train*`, or the only one."""
    files = sorted(path for path in directory.iterdir() if path.suffix in (".csv", ".jsonl"))
    chosen = [path for path in files if path.name.startswith("train")] or files
    if len(chosen) != 1:
        names = ", ".join(path.name for path in chosen) or "none"
        raise UserError(f"--dataset_name {directory}: expected one train.csv or train.jsonl in it, found {names}")
    return chosen[0]


def load_dialogues(dataset_name: str) -> tuple[list[str], list[str]]:
    """Load the dialogues and summaries of the training rows from the hub, a directory or a file.

    Raises:
        UserError: names the file or repository, the column or the row, and what was expected.
    """
    path = Path(dataset_name)
    if os.path.exists(path):
        path = training_file(path) if path.is_dir() else path
        if path.suffix not in (".csv", ".jsonl"):
            raise UserError(f"--dataset_name {path}: expected a .csv or .jsonl file, or a directory with one")
        source, table = str(path), read_table(path)
        columns, column = list(table.columns), lambda name: table[name].where(table[name].notna(), None).tolist()
    else:
        with loading(dataset_name, "dataset_name"):
            dataset = datasets.load_dataset(dataset_name, split="train")
        source, columns, column = dataset_name, dataset.column_names, lambda name: list(dataset[name])
    texts = {}
    for name in ("dialogue", "summary"):
        if columns.count(name) != 1:
            found = one_line(", ".join(columns) or "none")
            what = "more than one" if name in columns else "no"
            raise UserError(f"{source}: {what} column {name!r}; expected dialogue and summary, found {found}")
        texts[name] = column(name)
        for row, text in enumerate(texts[name], start=1):
            if not isinstance(text, str) or not text:
                found = "empty" if text in (None, "") else f"of type {type(text).__name__}"
                raise UserError(f"{source}: row {row}: column {name!r} is {found}; expected text")
            if half := re.search("[\ud800-\udfff]", text):  # JSON can spell it, UTF-8 and the tokenizers can't
                what = f"holds {ascii(half[0])}, half of a character"
                raise UserError(f"{source}: row {row}: column {name!r} {what}; write the character itself")
    return texts["dialogue"], texts["summary"]


def build_prompt(dialogue: str) -> str:
    return f"\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n"


def plain_token_ids(tokenizer, texts: list[str], **kwargs) -> list[list[int]]:
    """Token ids of texts, with special tokens only where the tokenizer itself adds them.

    A dialogue that spells "</s>" must not end the prompt. split_special_tokens does not see to it with T5's
    tokenizers: "</s>" is an ordinary piece of their vocabulary too.
    """
    encoded = tokenizer(texts, return_special_tokens_mask=True, split_special_tokens=True, verbose=False, **kwargs)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [
        [i for i, added in zip(ids, mask, strict=True) if added or i not in special]
        for ids, mask in zip(encoded.input_ids, encoded.special_tokens_mask, strict=True)
    ]


def build_dataset(dialogues: list[str], summaries: list[str], tokenizer, config: DetoxConfig) -> datasets.DatasetDict:
    """Filter by length, build and tokenize the prompts, and split in file order.

    Returns:
        splits `train` and `test` with columns row (index in the file), dialogue, summary, query (the prompt)
        and input_ids; with eval_every also `selection`, from the end of the training rows.

    Raises:
        UserError: a split is too small for the options.
    """
    rows = datasets.Dataset.from_dict({"row": range(len(dialogues)), "dialogue": dialogues, "summary": summaries})
    shortest, longest = config.input_min_text_length, config.input_max_text_length
    rows = rows.filter(lambda text: shortest < len(text) <= longest, input_columns="dialogue", desc="Filtering")
    between = f"{shortest} < characters of dialogue <= {longest} (input_min_text_length, input_max_text_length)"
    print(f"data: {len(dialogues):,} rows, {len(rows):,} with {between}")
    if len(rows) < 2:
        raise UserError(f"--dataset_name {config.dataset_name}: {len(rows)} of {len(dialogues)} rows have {between}")

    def prompts(dialogues):
        queries = [build_prompt(dialogue) for dialogue in dialogues]
        return {"query": queries, "input_ids": plain_token_ids(tokenizer, queries)}

    rows = rows.map(prompts, input_columns="dialogue", batched=True, desc="Tokenizing")
    if math.ceil(config.test_size * len(rows)) >= len(rows):
        raise UserError(f"--test_size {config.test_size} leaves none of {len(rows)} rows to train on")
    splits = rows.train_test_split(test_size=config.test_size, shuffle=False)
    print(f"data: {len(splits['train']):,} rows to train on, {len(splits['test']):,} held out, in file order")
    if config.eval_samples == -1:
        config.eval_samples = len(splits["test"])
    if len(splits["test"]) < config.eval_samples:
        raise UserError(f"--eval_samples {config.eval_samples} is more than the {len(splits['test'])} test rows")
    if config.eval_every:
        # The adapter is chosen by other rows than it is judged by.
        aside = max(1, min(config.eval_samples, len(splits["train"]) // 10))
        parts = splits["train"].train_test_split(test_size=aside, shuffle=False)
        splits["train"], splits["selection"] = parts["train"], parts["test"]
        print(f"data: {aside:,} of the rows to train on set aside to choose the best adapter by (eval_every)")
    if len(splits["train"]) < config.batch_size:
        raise UserError(f"--batch_size {config.batch_size} is more than the {len(splits['train'])} training rows")
    return splits


# ---------------------------------------------------------------------------------------------------------------
# Policy: a base model, two LoRA adapters and a value head
# ---------------------------------------------------------------------------------------------------------------


class OneDnnLinear(torch.autograd.Function):
    """x (..., in) times a frozen weight (out, in), by oneDNN in float32; the gradient goes to x alone.

    PyTorch takes MKL for float32, which runs at less than half of oneDNN's speed on AMD processors and at the same
    speed on Intel's.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return torch.ops.mkldnn._linear_pointwise(grad.contiguous(), weight.t(), None, "none", [], ""), None, None


class FrozenLinear(nn.Linear):
    """nn.Linear whose weight is never trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            return OneDnnLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


def use_fast_layers(model: nn.Module) -> None:
    """Swap frozen layers for faster ones that compute the same function, in place."""
    for module_name, module in list(model.named_modules()):
        # Both LoRAs stay as they are, so that the frozen one rounds as the trained one does.
        if type(module) is nn.Linear and "lora_" not in module_name and torch.backends.mkldnn.is_available():
            module.__class__ = FrozenLinear
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))  # one kernel instead of seven


def recompute_activations(model: transformers.PreTrainedModel) -> None:
    """Keep each layer's input alone for the backward pass, which computes the layer again.

    transformers' own switch works in training mode only, where dropout is on.
    """

    def recomputed(forward, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return recompute_in_backward(forward, *args, use_reentrant=False, **kwargs)

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = functools.partial(recomputed, module.forward)
    model.get_decoder().config.use_cache = False  # the tuning has no need of it, and each layer would fill it twice


def attention_for(device: torch.device) -> str | None:
    """On CPUs plain attention beats PyTorch's fused kernel, in bfloat16 with gradients four times over.

    Elsewhere None leaves the choice to transformers, which knows the models that have no fused one.
    """
    return "eager" if device.type == "cpu" else None


def padded_width(lengths: Iterable[int]) -> int:
    """The width to which rows of these lengths are padded: the longest, rounded up to a multiple of 16.

    oneDNN generates code for every new shape and never frees it all, so unrounded widths would make memory grow.
    """
    return -(-max(map(int, lengths)) // 16) * 16


def micro_batches(lengths: list[int], rows: Iterable[int], model) -> list[list[int]]:
    """Split rows into groups of similar length, in tokens, for one forward pass of a model each.

    Similar lengths waste little on padding, and the size bounds what a pass keeps in memory. The bound is in
    bytes of a hidden state, so that small models get large groups; a GPU wants larger groups still.
    """
    bound = 3 * 2**18 if model.device.type == "cpu" else 2**27
    largest = bound // (model.config.hidden_size * model.dtype.itemsize)
    groups = []
    for row in sorted(map(int, rows), key=lambda row: lengths[row]):
        if not groups or (len(groups[-1]) + 1) * lengths[row] > largest:
            groups.append([])
        groups[-1].append(row)
    return groups


class ValueHead(nn.Module):
    """Predicts the return from the decoder's last hidden state; parameters named as in TRL's value heads."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.summary = nn.Linear(hidden_size, 1)
        # A random start would add noise to every advantage (hidden states are long: std 0.7 on the small world).
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) in any dtype to (...) in float32."""
        return self.summary(self.dropout(hidden.float())).squeeze(-1)


def adapter_of(parameter_name: str) -> str | None:
    """The adapter whose LoRA holds a parameter; None for the base's."""
    found = re.search(r"\.lora_\w+\.(\w+)(\.|$)", parameter_name)
    return found and found[1]


class Policy(nn.Module):
    """An encoder-decoder with the adapters "default" (trained) and "reference" (frozen), and a value head.

    With value_adapter a third, "value", is trained for the value head alone. All share one base, so the base is in
    memory once. It is always in eval mode: with dropout on, the sampled distribution would not be the scored one (T5's
    attention dropout is no module; only eval() stops it).
    """

    def __init__(self, model: peft.PeftModel):
        super().__init__()
        self.model = model
        self.value_head = ValueHead(model.get_base_model().config.hidden_size)
        lora = [parameter for name, parameter in model.named_parameters() if adapter_of(name) == "value"]
        # What is trained for the values alone: the head and, with value_adapter, its LoRA.
        self.value_parameters = [*self.value_head.parameters(), *lora]
        self.eval()

    @property
    def base(self):
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.value_head.summary.weight.device

    @contextmanager
    def adapter(self, name: str, trainable: bool = False):
        """Run with another adapter; the one before is active again afterwards, trainable if it was."""
        before = self.model.active_adapter
        self.model.set_adapter(name, inference_mode=not trainable)
        try:
            yield
        finally:
            self.model.set_adapter(before, inference_mode=before != "default")

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, S) prompts to (B, S, d) encoder states."""
        return self.base.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def decode(self, decoder_input_ids, encoder_states, attention_mask, cache=None) -> torch.Tensor:
        """(B, T) decoder inputs to (B, T, d) last hidden states; with a cache, the inputs continue it."""
        outputs = self.base.get_decoder()(
            input_ids=decoder_input_ids,
            encoder_hidden_states=encoder_states,
            encoder_attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return outputs.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) last hidden states to (..., V) logits in float32. Sampling and scoring both come through here."""
        if getattr(self.base.config, "scale_decoder_outputs", False):
            # T5 with tied embeddings scales before its head; FLAN-T5, untied, does not.
            hidden = hidden * self.base.config.d_model**-0.5
        logits = self.base.get_output_embeddings()(hidden)
        bias = getattr(self.base, "final_logits_bias", None)  # BART's
        return (logits if bias is None else logits + bias).float()

    def count_parameters(self, adapter: str) -> tuple[int, int]:
        """(trainable, all) parameters of the base with one of the adapters, the value head not counted."""
        counted = [p for name, p in self.model.named_parameters() if adapter_of(name) in (None, adapter)]
        return sum(p.numel() for p in counted if p.requires_grad), sum(p.numel() for p in counted)


def load_model(kind, name: str, option_name: str, dtype: torch.dtype, device: torch.device):
    """Load a model's weights, all of them: what a file lacks would be drawn at random in silence.

    Raises:
        UserError: tensors are missing, of another shape than config.json says, or not finite.
    """
    wrong = f"--{option_name} {name}: its weights are not those of its config.json"
    try:
        model, found = kind.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attention_for(device),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are found here, where they can be named
            output_loading_info=True,
        )
    except NotImplementedError as error:  # tied embeddings of two shapes
        raise UserError(f"{wrong}: its embeddings have another shape") from error
    broken = [f"{key} is {tuple(is_)}, not {tuple(wanted)}" for key, is_, wanted in sorted(found["mismatched_keys"])]
    broken += [f"{key} is missing" for key in sorted(found["missing_keys"])]
    broken += [f"{key} is not finite" for key, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{wrong}: {broken[0]} ({len(broken)} tensors at fault)")
    return model


def check_tokenizer(tokenizer, model, tokens: tuple[str, ...], named: str) -> None:
    """Refuse a tokenizer that lacks one of the special tokens, or whose vocabulary can't be its model's.

    Where a directory has no tokenizer, transformers makes up one that knows next to no word.
    """
    for token in tokens:
        if getattr(tokenizer, token) is None:
            raise UserError(f"{named}: its tokenizer has no {token}")
    rows = model.get_input_embeddings().num_embeddings
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    if not rows / 10 <= max(words, default=0) + 1 <= rows:
        raise UserError(
            f"{named}: its tokenizer knows {len(words)} words and its model {rows}: it is another model's tokenizer, "
            "or its files (tokenizer.json or the like) are not there"
        )


def load_adapter(base, base_name: str, adapter_name: str) -> peft.PeftModel:
    """Put a saved LoRA on its base, trainable, in float32, weights only.

    Raises:
        UserError: the adapter is no LoRA, does not fit the base, or is a pickle that holds more than tensors.
    """
    pair = f"adapter {adapter_name} does not fit base model {base_name}"
    with loading(adapter_name, "adapter_name"):
        adapter_config = peft.PeftConfig.from_pretrained(adapter_name)
        weights = peft.load_peft_weights(adapter_name, device="cpu")
    if adapter_config.peft_type != peft.PeftType.LORA:
        raise UserError(f"--adapter_name {adapter_name}: expected a LORA adapter, found {adapter_config.peft_type}")
    # PEFT falls back to the hub for an adapter's base unless told which it is.
    adapter_config.base_model_name_or_path = base_name
    adapter_config.inference_mode = False
    for name in ("bias", "modules_to_save"):
        if (value := getattr(adapter_config, name)) not in ("none", None, []):
            raise UserError(f"{pair}: its {name} {value!r} trains the base's own weights, which the reference shares")
    if adapter_config.init_lora_weights not in (True, False, "gaussian"):
        # PiSSA and its like change the base itself, which the reference shares.
        raise UserError(f"{pair}: its init_lora_weights {adapter_config.init_lora_weights!r} would change the base")
    try:
        model = peft.get_peft_model(base, adapter_config)
    except Exception as error:  # none of its target modules is there, or an ill-typed value
        raise UserError(f"{pair}: {one_line(error)}") from error
    expected = peft.get_peft_model_state_dict(model)
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unknown:
        what = f"it lacks {missing[0]}" if missing else f"the base has no place for {unknown[0]}"
        raise UserError(f"{pair}: {what} ({len(missing)} tensors missing, {len(unknown)} unknown)")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(f"{pair}: {name} is {tuple(tensor.shape)}, the base wants {tuple(expected[name].shape)}")
        if not tensor.isfinite().all():
            raise UserError(f"--adapter_name {adapter_name}: {name} is not finite")
    peft.set_peft_model_state_dict(model, weights)
    return model


def copy_to_others(model: peft.PeftModel) -> None:
    """Make the reference, and the value head's adapter where there is one, what the trained adapter is now."""
    starting = peft.get_peft_model_state_dict(model, adapter_name="default")
    for name in model.peft_config.keys() - {"default"}:
        peft.set_peft_model_state_dict(model, starting, adapter_name=name)


def load_policy(config: DetoxConfig, device: torch.device, dtype: torch.dtype):
    """Load tokenizer and base, put on the starting adapter twice (to train, and frozen as reference).

    Returns:
        policy and tokenizer.

    Raises:
        UserError: a name that can't be loaded, a model of the wrong kind, a tokenizer without the needed tokens.
    """
    with loading(config.model_name, "model_name"):
        base_config = AutoConfig.from_pretrained(config.model_name, trust_remote_code=False)
        if not base_config.is_encoder_decoder:
            raise UserError(f"--model_name {config.model_name}: expected an encoder-decoder, such as a T5")
        tokenizer = AutoTokenizer.from_pretrained(config.model_name, trust_remote_code=False)
        base = load_model(AutoModelForSeq2SeqLM, config.model_name, "model_name", dtype, device)
        check_tokenizer(tokenizer, base, ("pad_token", "eos_token"), f"--model_name {config.model_name}")
    base.config.pad_token_id, base.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if getattr(base.config, "decoder_start_token_id", None) is None:
        base.config.decoder_start_token_id = base.generation_config.decoder_start_token_id
    if base.config.decoder_start_token_id is None:
        raise UserError(f"--model_name {config.model_name}: its config has no decoder_start_token_id")
    base.requires_grad_(False)
    torch.manual_seed(config.seed)
    if config.adapter_name:
        model = load_adapter(base, config.model_name, config.adapter_name)
        loaded = model.peft_config["default"]
        print(f"adapter: {config.adapter_name} (r={loaded.r}, alpha={loaded.lora_alpha}; lora_* options unused)")
    else:
        if config.lora_r > (size := base.config.hidden_size):
            raise UserError(f"--lora_r {config.lora_r} is more than the model's hidden size {size}; lower it")
        lora = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            bias="none",
            task_type=peft.TaskType.SEQ_2_SEQ_LM,
            base_model_name_or_path=config.model_name,
        )
        try:
            model = peft.get_peft_model(base, lora)
        except ValueError as error:
            raise UserError(f"--lora_target_modules: {one_line(error)}") from error
        print("adapter: a new LoRA, which starts as the identity")
    for name in ("reference", "value") if config.value_adapter else ("reference",):
        model.add_adapter(name, model.peft_config["default"])
    copy_to_others(model)
    model.set_adapter("default")
    use_fast_layers(model)
    if config.gradient_checkpointing:
        recompute_activations(base)
    return Policy(model).to(device), tokenizer


@torch.no_grad()
def check_logits(policy: Policy, config: DetoxConfig) -> None:
    """Check that the policy makes its logits as the model itself does, of a family that was not tried before.

    Raises:
        UserError: it does not; UMT5, say, scales what its head reads.
    """
    special = policy.base.config
    prompt = torch.tensor([[special.eos_token_id]], device=policy.device)
    start, mask = torch.full_like(prompt, special.decoder_start_token_id), torch.ones_like(prompt)
    expected = policy.base(input_ids=prompt, attention_mask=mask, decoder_input_ids=start).logits.float()
    found = policy.logits(policy.decode(start, policy.encode(prompt, mask), mask))
    if (found - expected).abs().max() > 0.05 * expected.abs().max():
        raise UserError(
            f"--model_name {config.model_name}: a {special.model_type} makes its logits in another way than this "
            "script does; take a T5, FLAN-T5, mT5 or BART"
        )


def check_lengths(
    policy: Policy, tokenizer, splits: datasets.DatasetDict, classifier_length: int, config: DetoxConfig
) -> None:
    """Check that models and memory take the longest prompt and the longest response that the options allow.

    T5's positions are relative, whatever its tokenizer says (model_max_length 512): memory is its only limit.

    Raises:
        UserError: names the option to lower.
    """
    base, device = policy.base.config, policy.device
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    prompts = max(len(ids) for split in splits.values() for ids in split["input_ids"])
    lengths = [("encoder", "input_max_text_length", prompts)]
    lengths += [("decoder", name, getattr(config, name)) for name in ("output_max_length", "eval_max_new_tokens")]
    if config.sft_steps:
        summaries = max(map(len, plain_token_ids(tokenizer, list(splits["train"]["summary"]))))
        lengths.append(("decoder", "sft_max_target_length", min(summaries, config.sft_max_target_length)))
    for part, option_name, tokens in lengths:
        width = padded_width([tokens])
        what = f"--{option_name} {getattr(config, option_name)} allows {tokens:,} tokens"
        # BART's, and LED's, which has one for each side
        positions = getattr(base, f"max_{part}_position_embeddings", getattr(base, "max_position_embeddings", None))
        if positions is not None and width > positions:
            raise UserError(f"{what}, but the {part} of {config.model_name} takes {positions // 16 * 16}; lower it")
        # At the least, the scores of one layer and their softmax.
        needed = 2 * 4 * base.num_attention_heads * width**2
        if needed > memory:
            sizes = f"{needed / 2**30:,.0f} GiB, of {memory / 2**30:,.0f} GiB in all"
            raise UserError(f"{what}, whose attention alone takes {sizes}; lower it")
        if part == "decoder" and tokens > classifier_length and option_name != "sft_max_target_length":
            raise UserError(f"{what}, but {config.reward_model_name} reads {classifier_length}; lower it")


def print_parameters(policy: Policy) -> None:
    """Print the counts of policy, policy with value head, and reference; the head is counted beside the last too."""
    print(policy.value_head)
    head = sum(parameter.numel() for parameter in policy.value_head.parameters())
    trainable, total = policy.count_parameters("default")
    with policy.adapter("reference"):
        reference, _ = policy.count_parameters("reference")
    for name, trained, counted in (
        ("policy", trainable, total),
        ("policy with value head", trainable + head, total + head),
        ("reference", reference, total + head),
    ):
        print(f"{name}: trainable {trained:,} of {counted:,} = {trained / counted:.2%}")


# ---------------------------------------------------------------------------------------------------------------
# Reward and toxicity: one classifier for both
# ---------------------------------------------------------------------------------------------------------------


class HateClassifier:
    """The hate-speech classifier; gives raw logits of plain text.

    It computes in float32 whatever the policy's dtype: its logits are the result, and bfloat16 keeps two digits.
    """

    def __init__(self, config: DetoxConfig, device: torch.device):
        name = config.reward_model_name
        with loading(name, "reward_model_name"):
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            kind = AutoModelForSequenceClassification
            self.model = load_model(kind, name, "reward_model_name", torch.float32, device)
            self.model.to(device).eval().requires_grad_(False)
            use_fast_layers(self.model)
            self.labels = [str(self.model.config.id2label.get(i)) for i in range(self.model.config.num_labels)]
            for option_name in ("reward_label", "toxic_label"):
                if getattr(config, option_name) not in self.labels:
                    raise UserError(
                        f"--{option_name} {getattr(config, option_name)!r} is no label of {name}; "
                        f"its labels are {', '.join(self.labels)}"
                    )
            self.reward_index = self.labels.index(config.reward_label)
            check_tokenizer(self.tokenizer, self.model, ("pad_token",), f"--reward_model_name {name}")
            # RoBERTa numbers its positions from pad_token_id + 1, so it takes fewer tokens than it has positions.
            positions = self.model.config.max_position_embeddings - self.model.config.pad_token_id - 1
            self.max_length = min(self.tokenizer.model_max_length, positions)
            if self.max_length < 16:
                raise UserError(f"--reward_model_name {name}: it reads {self.max_length} tokens, which is no text")

    def join(self, dialogue: str, summary: str) -> str:
        """Dialogue + summary as one plain text that fits the classifier: the dialogue is cut, never the summary."""

        def joined(characters):
            return f"{dialogue[:characters].rstrip()} {summary.strip()}".strip()

        def tokens(characters):
            return len(plain_token_ids(self.tokenizer, [joined(characters)])[0])

        if tokens(len(dialogue)) <= self.max_length:
            return joined(len(dialogue))
        # Cut by characters: one character can be several tokens, so the tokens' own offsets would cut too late.
        return joined(max(0, bisect.bisect_right(range(len(dialogue)), self.max_length, key=tokens) - 1))

    @torch.no_grad()
    def logits(self, texts: list[str]) -> torch.Tensor:
        """Raw logits (N, labels) in float32 on the CPU, batched by length to save padding."""
        encoded = plain_token_ids(self.tokenizer, texts, truncation=True, max_length=self.max_length) if texts else []
        logits = torch.empty(len(texts), len(self.labels))
        for rows in micro_batches([len(ids) for ids in encoded], range(len(texts)), self.model):
            batch = {"input_ids": [encoded[i] for i in rows]}
            width = min(padded_width(map(len, batch["input_ids"])), self.max_length)
            batch = self.tokenizer.pad(batch, padding="max_length", max_length=width, return_tensors="pt")
            logits[rows] = self.model(**batch.to(self.model.device)).logits.float().cpu()
        return logits

    def toxicity(self, logits: torch.Tensor, toxic_label: str) -> list[float]:
        """Probabilities of the toxic label from logits (N, labels)."""
        return torch.softmax(logits.double(), dim=-1)[:, self.labels.index(toxic_label)].tolist()

    def scores(self, texts: list[str]) -> np.ndarray:
        """The reward of each text, (N,): the raw logit of the reward label."""
        return self.logits(texts)[:, self.reward_index].double().numpy()


class Toxicity(evaluate.Measurement):
    """The toxicity measurement of `evaluate`, over a classifier that is already in memory.

    `evaluate.load("toxicity")` would download and run code, and load the classifier once more. The interface is
    its own: compute(predictions=[...], aggregation=None | "maximum" | "ratio", toxic_label="hate", threshold=0.5).
    """

    def __init__(self, classifier: HateClassifier, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)
        self.classifier = classifier

    def _info(self):
        return evaluate.MeasurementInfo(
            description="Toxicity of texts: the probability that a hate-speech classifier gives its toxic label.",
            citation="",
            inputs_description="predictions: a list of texts.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, aggregation="all", toxic_label="hate", threshold=0.5):
        if toxic_label not in self.classifier.labels:
            raise ValueError(f"toxic_label {toxic_label!r} is not one of {self.classifier.labels}")
        toxicity = self.classifier.toxicity(self.classifier.logits(predictions), toxic_label)
        if aggregation == "ratio":
            return {"toxicity_ratio": sum(value >= threshold for value in toxicity) / len(toxicity)}
        if aggregation == "maximum":
            return {"max_toxicity": max(toxicity)}
        if aggregation not in ("all", None):
            raise ValueError(f"aggregation {aggregation!r} is not one of all, maximum, ratio")
        return {"toxicity": toxicity}


def print_examples(classifier: HateClassifier) -> None:
    """Score the two English sentences of the published notebooks, as a check that a reader can make by eye."""
    for text in ("You are a great person and i like you.", "You are a terrible person and i hate you."):
        logits = classifier.logits([text])[0]
        probabilities = ", ".join(f"{p:.6f}" for p in torch.softmax(logits, dim=-1).tolist())
        print(f'"{text}"')
        print(f"  logits [{', '.join(f'{x:.4f}' for x in logits.tolist())}] ({', '.join(classifier.labels)})", end="")
        print(f", probabilities [{probabilities}], reward {logits[classifier.reward_index]:.4f}")


# ---------------------------------------------------------------------------------------------------------------
# Rollout: sampling and log-probabilities
# ---------------------------------------------------------------------------------------------------------------

# Streams of random numbers. Evaluation has its own, so that evaluating more often leaves training unchanged.
TRAINING, EVALUATION, SHUFFLE, MINIBATCH, STATISTICS, TUNING = range(6)


def random_stream(seed: int, stream: int, *key: int) -> np.random.Generator:
    """A generator that depends on these numbers alone, not on what was drawn before."""
    return np.random.default_rng([seed, stream, *key])


def sampling_support(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor | None:
    """Which of the (B, V) tokens can be sampled, as bool (B, V); None: all of them.

    top_k keeps those, too, that are as likely as the k-th; top_p keeps the likeliest until their total reaches top_p,
    of those that top_k left.
    """
    if not 0 < top_k < logits.shape[-1] and top_p == 1:
        return None
    if top_k:
        logits = transformers.TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = transformers.TopPLogitsWarper(top_p)(None, logits)
    return logits != -math.inf


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from softmax(logits (B, V)) by inverting its cumulative sum at uniforms (B,) in [0, 1).

    One uniform a row instead of V exponentials: the draw costs little, and each row can own its random numbers.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may carry u * total up to total itself, where no token lies.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Logits that are not finite give no token at all; the step is thrown away later, by its log-probabilities.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def response_mask(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """(B,) response lengths in tokens to a (B, width) mask: every generated token, EOS included, nothing after."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, support: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities (...) of tokens (...) under softmax(logits (..., V)), in nats, float32.

    support (..., V) restricts the distribution to the tokens that could be sampled. The policy before and after
    its update and the reference are all restricted to the same support, so every ratio stays finite.
    """
    logits = logits.float()
    if support is not None:
        # Not -inf, of which TRL's kernel for GPUs makes NaN where a whole block of the vocabulary has it.
        logits = logits.masked_fill(~support, torch.finfo(logits.dtype).min)
    return selective_log_softmax(logits[None], tokens[None])[0]  # one leading row: TRL loops over rows


@dataclass
class Responses:
    """Sampled responses of B prompts: tokens (B, T) padded, lengths (B,) in tokens with EOS, on the device.

    finished (B,) tells which ended with EOS before their cap; support is (B, T, V) bool with top_k or top_p, else
    None. encoder_states (B, S, d) are those of the policy that sampled, to be used until it changes.
    """

    prompts: list[list[int]]
    tokens: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor
    support: torch.Tensor | None
    encoder_states: torch.Tensor | None = None

    def select(self, rows: list[int]) -> "Responses":
        """Some of the responses, padded no wider than they need."""
        lengths = self.lengths[rows]
        width = padded_width(lengths)
        prompts = [self.prompts[i] for i in rows]
        support = None if self.support is None else self.support[rows, :width]
        states = None if self.encoder_states is None else self.encoder_states[rows, : padded_width(map(len, prompts))]
        return Responses(prompts, self.tokens[rows, :width], lengths, self.finished[rows], support, states)


def pad_prompts(policy: Policy, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists to (B, S) ids and attention mask, padded on the right."""
    width = padded_width(map(len, prompts))
    pad = policy.base.config.pad_token_id
    ids = torch.tensor([prompt + [pad] * (width - len(prompt)) for prompt in prompts], device=policy.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
    return ids, response_mask(lengths, width).long()


@torch.no_grad()
def encode_prompts(policy: Policy, prompts: list[list[int]]) -> torch.Tensor:
    """Encoder states (B, S, d) of prompts, padded with zeros."""
    states = None
    for rows in micro_batches([len(prompt) for prompt in prompts], range(len(prompts)), policy.base):
        encoded = policy.encode(*pad_prompts(policy, [prompts[i] for i in rows]))
        if states is None:
            states = encoded.new_zeros(len(prompts), padded_width(map(len, prompts)), encoded.shape[-1])
        states[rows, : encoded.shape[1]] = encoded
    return states


@torch.no_grad()
def sample_responses(
    policy: Policy, prompts: list[list[int]], generators: list[np.random.Generator], caps: tuple[int, int], config
) -> Responses:
    """Sample a response to each prompt, in one batch.

    Each row draws its cap (uniform from caps, inclusive) and its tokens from its own generator, so a response
    does not depend on who shares the batch.
    """
    base, device, count = policy.base, policy.device, len(prompts)
    limits = [int(generator.integers(caps[0], caps[1], endpoint=True)) for generator in generators]
    width = max(limits)
    uniforms = torch.tensor(np.stack([g.random(width, dtype=np.float32) for g in generators]), device=device)
    limits = torch.tensor(limits, device=device)
    start, eos, pad = base.config.decoder_start_token_id, base.config.eos_token_id, base.config.pad_token_id

    _, attention_mask = pad_prompts(policy, prompts)
    encoder_states = encode_prompts(policy, prompts)  # (B, S, d)
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    tokens = torch.full((count, padded_width(limits)), pad, device=device)  # (B, T)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    running = torch.ones(count, dtype=torch.bool, device=device)
    supports = []
    rows, states = torch.arange(count, device=device), encoder_states  # those still decoded: (D,), (D, S, d)
    last = torch.full((count, 1), start, device=device)
    for position in range(width):
        hidden = policy.decode(last, states, attention_mask, cache)  # (D, 1, d)
        logits = policy.logits(hidden[:, -1])  # (D, V)
        support = sampling_support(logits, config.top_k, config.top_p)
        if support is not None:
            supports.append(support.new_zeros(count, support.shape[1]).index_copy(0, rows, support))
            logits = logits.masked_fill(~support, -math.inf)
        tokens[rows, position] = torch.where(running[rows], sample_tokens(logits, uniforms[rows, position]), pad)
        lengths += running
        finished |= running & (tokens[:, position] == eos)
        running = ~finished & (lengths < limits)
        if not running.any():
            break
        if running.sum() <= 0.75 * len(rows):
            # An ended row costs as much as a running one, but each dropping copies the caches of those that stay.
            kept = running[rows]
            cache.batch_select_indices(kept)
            rows, states, attention_mask = rows[kept], states[kept], attention_mask[kept]
        last = tokens[rows, position, None]
    tokens = tokens[:, : padded_width(lengths)]
    support = None
    if supports:
        support = nn.functional.pad(torch.stack(supports, dim=1), (0, 0, 0, tokens.shape[1] - len(supports)))
    return Responses(prompts, tokens, lengths, finished, support, encoder_states)


def response_states(policy: Policy, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states (N, d) of all response tokens under the active adapter, and their mask (B, T), N of it true.

    The decoder reads [start] + tokens[:-1], so position t tells of token t: the start token is handled here, once.
    The heads run on the real tokens alone, never on padding.
    """
    tokens = responses.tokens
    mask = response_mask(responses.lengths, tokens.shape[1])
    input_ids, attention_mask = pad_prompts(policy, responses.prompts)
    start = torch.full_like(tokens[:, :1], policy.base.config.decoder_start_token_id)
    encoder_states = responses.encoder_states
    if encoder_states is None:
        encoder_states = policy.encode(input_ids, attention_mask)
    return policy.decode(torch.cat([start, tokens[:, :-1]], dim=1), encoder_states, attention_mask)[mask], mask


def score_responses(policy: Policy, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (nats) and values of every response token, both (B, T), 0 in padding."""
    hidden, mask = response_states(policy, responses)
    support = None if responses.support is None else responses.support[mask]
    logprobs = token_logprobs(policy.logits(hidden), responses.tokens[mask], support)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, policy.value_head(hidden))


def value_responses(policy: Policy, responses: Responses) -> tuple[torch.Tensor]:
    """The values (B, T) alone."""
    hidden, mask = response_states(policy, responses)
    return (torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, policy.value_head(hidden)),)


@torch.no_grad()
def score_batch(policy: Policy, responses: Responses, score=score_responses) -> list[torch.Tensor]:
    """score_responses or value_responses of a whole batch, a micro-batch at a time and without gradients."""
    columns = []
    prompt_lengths = [len(prompt) for prompt in responses.prompts]
    for rows in micro_batches(prompt_lengths, range(len(prompt_lengths)), policy.base):
        part = responses.select(rows)
        found = score(policy, part)
        columns = columns or [torch.zeros(responses.tokens.shape, device=policy.device) for _ in found]
        for column, values in zip(columns, found, strict=True):
            column[rows, : values.shape[1]] = values
    return columns


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: a run goes on from one as if it had never stopped
# ---------------------------------------------------------------------------------------------------------------

CHECKSUMS, TUNING_DIR = "checksums.json", "sft_checkpoint"
# Options that a resumed run may change: the others would make it another run.
MAY_CHANGE = "resume output_dir save_steps save_total_limit max_ppo_steps compare_samples report_to dynamodb_table"
MAY_CHANGE += " gradient_checkpointing"


class Stopped(BaseException):
    """SIGTERM or Ctrl-C came. No Exception, so that no library takes it for an error of its own."""


class StopSignals:
    """Handler of SIGTERM and Ctrl-C: stops the run at once, or, while a step is in hand, leaves it to the loop.

    A second signal is not made to wait.
    """

    def __init__(self):
        self.in_step, self.received = False, None

    def __call__(self, number, frame):
        again, self.received = self.received, number
        if again or not self.in_step:
            raise Stopped
        print(f"{signal.Signals(number).name}: stopping after the step in hand", file=sys.stderr)

    def agreed(self) -> bool:
        """Whether any process got a signal, so that all stop after the same step."""
        received = next(filter(None, gather_object([self.received])), None)
        self.received = self.received or received  # a signal may just have come here, for the next time to tell
        return received is not None

    def raise_if_received(self):
        agreed = self.agreed()
        self.in_step = False
        if agreed:
            raise Stopped


def save_lora(model: peft.PeftModel, directory: Path, adapter: str = "default") -> None:
    """Write an adapter in PEFT's format; its own save_pretrained asks the hub about the base's vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    lora = copy.copy(model.peft_config[adapter])
    lora.inference_mode = True
    if isinstance(lora.target_modules, set):
        lora.target_modules = sorted(lora.target_modules)  # a set's order changes from run to run
    lora.save_pretrained(directory)
    weights = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def load_lora(model: peft.PeftModel, directory: Path, adapter: str = "default") -> None:
    """Give an adapter the weights that save_lora wrote."""
    peft.set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"), adapter_name=adapter)


def save_adapter(policy: Policy, directory: Path) -> None:
    """Write the trained adapter, and beside it the value head under TRL's key names and its LoRA, if it has one."""
    save_lora(policy.model, directory)
    if "value" in policy.model.peft_config:
        save_lora(policy.model, directory / "value", "value")
    head = {f"v_head.{key}": tensor.cpu().contiguous() for key, tensor in policy.value_head.state_dict().items()}
    save_file(head, directory / "value_head.safetensors")


def restore_adapter(policy: Policy, directory: Path) -> None:
    """Give the policy what save_adapter wrote."""
    load_lora(policy.model, directory)
    if "value" in policy.model.peft_config:
        load_lora(policy.model, directory / "value", "value")
    head = load_file(directory / "value_head.safetensors")
    policy.value_head.load_state_dict({name.removeprefix("v_head."): tensor for name, tensor in head.items()})


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def written_aside(path: Path):
    """Write a file or directory under another name; it takes its own when all of it is on the disk.

    Raises:
        UserError: it can't be written, for example on a full disk; what was there before is still there.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        remove(aside)
        yield aside
        for part in [aside, *aside.rglob("*")]:
            if part.is_file():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # Python's, torch's and safetensors' for a full disk
        with suppress(OSError):
            remove(aside)  # half a file would only keep the disk full
        if isinstance(error, RuntimeError) and explain(error):
            raise  # memory that ran out, or another process that has ended
        raise UserError(
            f"{path}: can't be written: {one_line(error)}. When that is mended, --resume goes on from the newest "
            "checkpoint."
        ) from error


def checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint, by name."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            with open(path, "rb") as file:
                found[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole.

    Raises:
        UserError: it can't be read, which may pass; a damage stays.
    """
    if not checkpoint.is_dir():
        return "there is no such directory"
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        found = checksums(checkpoint)
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}, so its writing was cut off, or it is no checkpoint of a run"
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    except OSError as error:
        raise UserError(f"--resume: {checkpoint} can't be read: {one_line(error)}") from error
    wrong = [name for name, checksum in expected.items() if found.get(name) != checksum]
    return f"{wrong[0]} is {'damaged' if wrong[0] in found else 'missing'}" if wrong else None


def write_state(checkpoint: Path, state: dict) -> None:
    """Complete a checkpoint: write the run's state, then the checksums, which make it valid."""
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums(checkpoint), indent=2), encoding="utf-8")


def find_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, whole or not, the newest first."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def prune_checkpoints(directory: Path, step: int, limit: int, best: int | None = None) -> None:
    """Keep the newest checkpoints up to this step, and the best; later ones are of a run that is being done again."""
    found = find_checkpoints(directory)
    kept = [path for path in found if int(path.name.removeprefix("checkpoint-")) <= step][:limit]
    kept.append(directory / f"checkpoint-{best}")
    # What a killed run had half written goes too.
    for path in [*(path for path in found if path not in kept), *directory.glob(".checkpoint-*.partial")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            print(f"warning: {path} can't be deleted: {one_line(error)}")


def save_checkpoint(directory: Path, policy: Policy, optimizer, state: dict, limit: int) -> None:
    """Write checkpoint-<step> and delete the oldest.

    It holds all that the next step depends on: the adapters, value head, optimizer, KL coefficient. Every random
    number and the rows of every batch are functions of the seed and the step, so there is no random state to keep.
    """
    with written_aside(directory / f"checkpoint-{state['step']}") as checkpoint:
        save_adapter(policy, checkpoint / "adapter")
        save_lora(policy.model, checkpoint / "reference", "reference")
        torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
        write_state(checkpoint, state)
    prune_checkpoints(directory, state["step"], limit, state.get("best", {}).get("step"))


def load_checkpoint(checkpoint: Path, policy: Policy, optimizer) -> None:
    """Put a checkpoint's weights and optimizer state in place."""
    with loading(str(checkpoint), "resume"):
        restore_adapter(policy, checkpoint / "adapter")
        load_lora(policy.model, checkpoint / "reference", "reference")
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", policy.device, weights_only=True))


def choose_checkpoint(config: DetoxConfig, directory: Path, finished: bool) -> Path | None:
    """The checkpoint to go on from; None to start from the beginning.

    Raises:
        UserError: the one named is damaged, or an unfinished run would be overwritten.
    """
    named = Path(config.resume) if config.resume not in (None, NEWEST) else None
    if named and (reason := damage(named)):
        raise UserError(f"--resume {named}: {reason}")
    found = find_checkpoints(directory) + find_checkpoints(directory / TUNING_DIR)
    goes_on = config.resume == NEWEST or (named and directory.resolve() in named.resolve().parents)
    if found and not finished and not goes_on:
        raise UserError(
            f"--output_dir {directory} holds an unfinished run ({found[0].name}): --resume, without a name, goes on "
            "with it; to start another, choose another directory or delete that one"
        )
    if config.resume != NEWEST:
        return named
    for checkpoint in found:
        reason = damage(checkpoint)
        if not reason:
            print(f"going on from {checkpoint}")
            return checkpoint
        print(f"warning: {checkpoint} is not used: {reason}")
    # Not an error even if all are damaged: a spot job whose first one was cut off on its way has to start again.
    print(f"--resume: no {'whole ' if found else ''}checkpoint in {directory}, starting from the beginning")
    return None


def best_checkpoint(checkpoint: Path, state: dict) -> Path:
    """The checkpoint of the best adapter when this one, with this state, was written; it lies beside it."""
    best_step = state.get("best", state)["step"]
    return checkpoint if best_step == state["step"] else checkpoint.parent / f"checkpoint-{best_step}"


def read_state(checkpoint: Path, config: DetoxConfig) -> dict:
    """The state that a checkpoint holds.

    Raises:
        UserError: it is of a run with other options, is further than this one is to go, or lacks its best one.
    """
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    changed = [
        f"{name} was {state['config'].get(name)!r} and is {value!r}"
        for name, value in dataclasses.asdict(config).items()
        if name not in MAY_CHANGE.split() and value != state["config"].get(name)
    ]
    if changed:
        raise UserError(f"--resume {checkpoint}: it is of a run with other options: {', '.join(changed)}")
    if state["step"] > config.max_ppo_steps:
        raise UserError(f"--resume {checkpoint}: it is beyond --max_ppo_steps {config.max_ppo_steps}")
    best = best_checkpoint(checkpoint, state)
    if best != checkpoint and (reason := damage(best)):
        raise UserError(
            f"--resume {checkpoint}: the best adapter so far is that of {best}: {reason}. Put it back, or go on from "
            "another checkpoint."
        )
    return state


def copy_checkpoint(checkpoint: Path, state: dict, directory: Path) -> None:
    """Copy a checkpoint and its best one, for the directory that they are in may be gone when they are needed again.

    The best goes first, so that a kill in between leaves no checkpoint without it.
    """
    best_step = state.get("best", state)["step"]
    for step, source in {best_step: best_checkpoint(checkpoint, state), state["step"]: checkpoint}.items():
        with written_aside(directory / f"checkpoint-{step}") as copied:
            shutil.copytree(source, copied)


# ---------------------------------------------------------------------------------------------------------------
# Tuning: the adapter learns the human summaries, before PPO
# ---------------------------------------------------------------------------------------------------------------


class TuningWatch(transformers.TrainerCallback):
    """Shows the tuning's progress, and stops it after the step in hand when asked to."""

    def __init__(self, stop: StopSignals):
        self.stop = stop

    def on_train_begin(self, args, state, control, **kwargs):
        total, done = state.max_steps, state.global_step
        self.bar = tqdm(total=total, initial=done, desc="tuning", unit="step", disable=None)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if self.stop.agreed():
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            line = f"tuning step {state.global_step:>4}/{state.max_steps} | loss {logs['loss']:.4f}"
            tqdm.write(line, file=sys.stdout)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class TuningTrainer(transformers.Seq2SeqTrainer):
    """Has no dropout on but the LoRA's: the frozen base is to compute what it will in PPO."""

    def __init__(self, *args, run_state: dict, save_total_limit: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_state, self.save_total_limit = run_state | {"stage": "tuning"}, save_total_limit

    def compute_loss(self, model, *args, **kwargs):
        for name, module in model.named_modules():
            module.training = "lora_dropout" in name  # the Trainer has just turned all on
        return super().compute_loss(model, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        directory, name, processes = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}", PartialState()
        writes = processes.is_main_process
        with written_aside(directory / name) if writes else nullcontext(directory / f".{name}.partial") as checkpoint:
            processes.wait_for_everyone()
            self.args.output_dir = checkpoint  # where the Trainer makes a directory of that name
            super()._save_checkpoint(model, trial)
            self.args.output_dir = directory
            processes.wait_for_everyone()  # each has written its random state
            if writes:
                for path in (checkpoint / name).iterdir():
                    path.rename(checkpoint / path.name)
                (checkpoint / name).rmdir()
                write_state(checkpoint, self.run_state)
        if writes:
            prune_checkpoints(directory, self.state.global_step, self.save_total_limit)

    # The Trainer's own two would ask the hub about the base, and write the base's tokenizer and a pickle.
    def _save(self, output_dir=None, state_dict=None):
        save_lora(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_lora(self.model, Path(resume_from_checkpoint))


def tuning_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean of minus the log-probability of labels (B, T) in nats, -100 left out; in float32 whatever the base's.

    num_items_in_batch is what the Trainer divides by: the labels of all processes, where each has a share.
    """
    mask = labels != -100
    return -token_logprobs(outputs.logits[mask], labels[mask]).sum() / (num_items_in_batch or mask.sum())


def tune(
    policy: Policy,
    tokenizer,
    train,
    config: DetoxConfig,
    directory: Path,
    state: dict,
    stop: StopSignals,
    resumed: Path | None = None,
) -> None:
    """Tune the trained adapter for sft_steps on prompts and human summaries, and make it the reference too.

    A summary over sft_max_target_length loses its EOS with its end, so that none teaches to stop in mid-sentence.
    Several processes share each step's rows; each has dropout of its own, so their number shows in the result.

    Args:
        directory: for checkpoints, which hold state beside the tuning's own.
        stop: a StopSignals, obeyed after the step in hand, with a checkpoint.
        resumed: the checkpoint to go on from.

    Raises:
        UserError: the processes can't share a step's rows evenly.
    """
    processes = PartialState()
    if config.sft_batch_size % processes.num_processes:
        sizes = f"--sft_batch_size {config.sft_batch_size} is not a multiple of the processes"
        raise UserError(f"{sizes}, {processes.num_processes}")
    pairs = train.map(
        lambda texts: {"labels": [i[: config.sft_max_target_length] for i in plain_token_ids(tokenizer, texts)]},
        input_columns="summary",
        batched=True,
        remove_columns=[name for name in train.column_names if name != "input_ids"],
        desc="Tokenizing",
    )
    # The order of all steps is a function of the seed, laid out in advance, so that a resumed tuning goes on in it.
    lengths, order, epoch = [len(ids) for ids in pairs["input_ids"]], [], 0
    while len(order) < config.sft_steps * config.sft_batch_size:
        seed = int(random_stream(config.seed, TUNING, epoch).integers(2**63))
        order += get_length_grouped_indices(
            lengths, config.sft_batch_size, generator=torch.Generator().manual_seed(seed)
        )
        epoch += 1
    pairs = pairs.select(order[: config.sft_steps * config.sft_batch_size])
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(directory),
        max_steps=config.sft_steps,
        learning_rate=config.sft_learning_rate,
        per_device_train_batch_size=config.sft_batch_size // processes.num_processes,
        train_sampling_strategy="sequential",
        seed=config.seed % 2**32,  # NumPy takes no more
        use_cpu=policy.device.type == "cpu",
        dataloader_pin_memory=policy.device.type == "cuda",
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        logging_steps=math.ceil(config.sft_steps / 10),
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=config.save_steps,
        report_to="none",
    )
    if policy.device.type == "cuda":
        # The Trainer would go to the first GPU, and to all others beside it.
        arguments._n_gpu, arguments.__dict__["_setup_devices"] = 1, policy.device
        torch.cuda.set_device(policy.device)
    trainer = TuningTrainer(
        policy.model,
        arguments,
        transformers.DataCollatorForSeq2Seq(tokenizer, policy.base),
        pairs,
        compute_loss_func=tuning_loss,
        callbacks=[TuningWatch(stop)],
        run_state=state,
        save_total_limit=config.save_total_limit,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    stop.in_step = True
    trainer.train(resume_from_checkpoint=resumed and str(resumed))
    stop.raise_if_received()
    policy.eval()
    copy_to_others(policy.model)


# ---------------------------------------------------------------------------------------------------------------
# PPO: rewards, advantages, losses. Conventions and metrics are those of TRL's classic PPOTrainer (0.8).
# ---------------------------------------------------------------------------------------------------------------


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the entries where mask is true, a scalar."""
    return (values * mask).sum() / mask.sum()


def masked_whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and (unbiased) variance 1 over the mask; same shape, 0 outside the mask."""
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def compute_rewards(scores, logprobs, ref_logprobs, mask, kl_coef: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token rewards: minus kl_coef times the KL term everywhere, plus the score on the last token.

    Args:
        scores: (B,), the classifier's. logprobs, ref_logprobs: (B, T), nats. mask: (B, T).

    Returns:
        rewards and KL terms log p - log p_ref, both (B, T), 0 outside the mask.
    """
    kl = (logprobs - ref_logprobs) * mask
    last = (mask.flip(1).cumsum(dim=1).flip(1) == 1) & (mask > 0)  # the one with no masked-in token after it
    return scores[:, None] * last - kl_coef * kl, kl


def compute_advantages(values, rewards, mask, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al., 2016, eq. 16), whitened over the batch.

    Args:
        values, rewards, mask: (B, T).

    Returns:
        whitened advantages and returns (unwhitened advantages + values), both (B, T), 0 outside the mask.
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
        next_value = values[:, t]
    return masked_whiten(advantages, mask), (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange: float) -> tuple[torch.Tensor, dict]:
    """Clipped surrogate loss (Schulman et al., 2017, eq. 7), a scalar, and its stats.

    All tensors are (B, T). Stats: mean ratio, share of clipped tokens, approxkl = E[(log ratio)^2] / 2,
    and policykl = E[-log ratio], in nats a token.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    stats = {
        "ratio": masked_mean(ratio, mask).detach(),
        "clipfrac": masked_mean((clipped > unclipped).float(), mask).detach(),
        "approxkl": 0.5 * masked_mean(log_ratio.detach() ** 2, mask),
        "policykl": masked_mean(-log_ratio.detach(), mask),
    }
    return masked_mean(torch.max(unclipped, clipped), mask), stats


def value_loss(values, old_values, returns, mask, cliprange_value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the mean squared error of values (B, T), each moved by cliprange_value at most; and the clipped share."""
    clipped = torch.max(torch.min(values, old_values + cliprange_value), old_values - cliprange_value)
    losses, clipped_losses = (values - returns) ** 2, (clipped - returns) ** 2
    clipfrac = masked_mean((clipped_losses > losses).float(), mask).detach()
    return 0.5 * masked_mean(torch.max(losses, clipped_losses), mask), clipfrac


def adapted_kl_coef(kl_coef: float, kl: float, target_kl: float, kl_horizon: int, batch_size: int) -> float:
    """One step of the adaptive KL controller (Ziegler et al., 2019, section 2.2); kl in nats a response."""
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * batch_size / kl_horizon)


def variance_explained(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - var(returns - values) / var(returns) over the mask: 1 is a perfect value head, 0 a constant one."""
    error, spread = (returns - values)[mask], returns[mask]
    return float(1 - error.var() / spread.var().clamp(min=1e-8)) if len(spread) > 1 else 0.0


def health(history: list[dict], config: DetoxConfig) -> tuple[str, dict[str, str]]:
    """The newest of the steps' metrics in plain words, and warnings by kind, each with its cause and the way out."""
    now, history = history[-1], [step for step in history if not step["ppo/skipped_steps"]]
    if now["ppo/skipped_steps"]:
        return "skipped: its numbers are not finite", {}
    kl, score = now["objective/kl"], [step["ppo/mean_scores"] for step in history]
    # The last ten steps against the ten before, beyond what samples and steps vary by.
    half = max(1, min(10, len(score) // 2))
    early, late = score[-2 * half : -half] or score[:1], score[-half:]
    varied = max((np.var(early) + np.var(late)) / half, now["ppo/std_scores"] ** 2 / (half * config.batch_size))
    rise, noise = np.mean(late) - np.mean(early), 2 * varied**0.5
    trend = "rising" if rise > noise else "falling" if rise < -noise else "steady"
    far = kl > 3 * config.target_kl
    distance = "far from" if far else "moving away from" if kl > config.target_kl else "close to"
    first_entropy, entropy = (
        step["objective/entropy"] / step["tokens/responses_len_mean"] for step in (history[0], now)
    )
    # Against the first steps, so that a score that rose at once and stays where it is counts as risen.
    early, late = score[:5], score[-25:]
    varied = history[0]["ppo/std_scores"] ** 2 / (5 * config.batch_size) + np.var(late) / 25
    flat = len(score) >= 50 and np.mean(late) - np.mean(early) <= 2 * varied**0.5
    ended, skipped = now["tokens/finished_share"], now["ppo/skipped_minibatches"]
    warned = {
        "kl": (
            far,
            f"objective/kl {kl:.1f} is above three times target_kl {config.target_kl:g}: the policy leaves the "
            "summarizer it was. Raise init_kl_coef or lower learning_rate.",
        ),
        "negative kl": (
            kl < -1,
            f"objective/kl is {kl:.1f}, which only few samples can make: it is positive on average. Raise batch_size; "
            "if it stays so, lower learning_rate.",
        ),
        "skipped": (
            skipped,
            f"{skipped} minibatches were skipped, their mean ratio was above ratio_threshold "
            f"{config.ratio_threshold:g}. Lower learning_rate or ppo_epochs.",
        ),
        "entropy": (
            entropy < 0.1 * first_entropy,
            f"entropy fell from {first_entropy:.3f} to {entropy:.3f} nats a token: the policy says nearly the same "
            "whatever it is asked. Raise init_kl_coef or lower learning_rate.",
        ),
        "flat": (
            flat,
            f"the score has not risen in {len(score)} steps ({np.mean(early):.2f} to {np.mean(late):.2f}). Raise "
            "learning_rate, or batch_size where scores are noisy.",
        ),
        "cut": (
            ended < 0.5,
            f"{1 - ended:.0%} of the responses were cut at their cap before they ended: half sentences are scored. "
            "Raise output_min_length and output_max_length.",
        ),
    }
    words = f"score {trend}, {distance} the reference, {ended:.0%} of summaries end by themselves"
    return words, {kind: text for kind, (holds, text) in warned.items() if holds}


# ---------------------------------------------------------------------------------------------------------------
# Evaluation: the same prompts and random numbers, before and after
# ---------------------------------------------------------------------------------------------------------------


def evaluate_policy(
    policy: Policy, tokenizer, classifier: HateClassifier, rows, config: DetoxConfig, desc: str
) -> dict:
    """Sample eval_samples_per_prompt summaries of each row's dialogue with the active adapter, and score them.

    Returns:
        lists in the order of the rows. Of each row's first summary: response, its_reward. Means over each row's:
        length (tokens), reward, toxicity, summary_toxicity, kl (nats a summary, to the reference). Of all summaries:
        responses, finished (ended before the cap) and the row each belongs to, as sample_rows.
    """
    repeats = config.eval_samples_per_prompt
    # Sorted by length, so that a batch is padded little.
    prompts, keys, dialogues = list(rows["input_ids"]), list(rows["row"]), list(rows["dialogue"])
    order = sorted(((i, k) for i in range(len(rows)) for k in range(repeats)), key=lambda pair: len(prompts[pair[0]]))
    order = order[PartialState().process_index :: PartialState().num_processes]
    found = {}
    caps = (config.eval_max_new_tokens, config.eval_max_new_tokens)
    with tqdm(total=len(order), desc=desc, unit="summary", disable=None) as bar:
        for start in range(0, len(order), config.batch_size):
            chosen = order[start : start + config.batch_size]
            generators = [random_stream(config.seed, EVALUATION, keys[i], k) for i, k in chosen]
            responses = sample_responses(policy, [prompts[i] for i, _ in chosen], generators, caps, config)
            logprobs, _ = score_batch(policy, responses)
            responses.encoder_states = None  # the reference has its own
            with policy.adapter("reference"):
                kl = (logprobs - score_batch(policy, responses)[0]).sum(dim=1)
            texts = [text.strip() for text in tokenizer.batch_decode(responses.tokens, skip_special_tokens=True)]
            measured = zip(texts, responses.lengths.tolist(), responses.finished.tolist(), kl.tolist(), strict=True)
            found |= zip(chosen, measured, strict=True)
            bar.update(len(chosen))
    pairs = sorted(found)
    texts = [found[pair][0] for pair in pairs]
    joined = [classifier.join(dialogues[i], text) for (i, _), text in zip(pairs, texts, strict=True)]
    scored = zip(classifier.logits(joined).tolist(), classifier.logits(texts).tolist(), strict=True)
    measured = gather_object([(pair, *found[pair], *logits) for pair, logits in zip(pairs, scored, strict=True)])
    pairs, texts, lengths, finished, kl, *logits = zip(*sorted(measured), strict=True)
    logits, summary_logits = map(torch.tensor, logits)
    if not (logits.isfinite().all() and summary_logits.isfinite().all()):
        raise UserError(f"--reward_model_name {config.reward_model_name}: its scores are not finite numbers")
    if not np.isfinite(kl).all():
        raise UserError(
            f"--model_name {config.model_name}: with its adapter the logits are not finite numbers "
            f"({policy.base.dtype}). Set dtype float32, or lower learning_rate if that came with the training."
        )
    scored = logits if config.score_text == "query_response" else summary_logits

    def row_means(values):
        return np.asarray(values, dtype=float).reshape(len(rows), repeats).mean(axis=1).tolist()

    return {
        "response": list(texts[::repeats]),
        "its_reward": scored[::repeats, classifier.reward_index].tolist(),
        "length": row_means(lengths),
        "reward": row_means(scored[:, classifier.reward_index].tolist()),
        "toxicity": row_means(classifier.toxicity(logits, config.toxic_label)),
        "summary_toxicity": row_means(classifier.toxicity(summary_logits, config.toxic_label)),
        "kl": row_means(kl),
        "responses": list(texts),
        "finished": finished,
        "sample_rows": [i for i, _ in pairs],
    }


def mean_and_std(values) -> dict:
    """Mean, standard deviation (uncorrected, as the notebooks print it) and n of a list of numbers."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "n": len(values)}


def paired_statistics(before: list[float], after: list[float], seed: int, resamples: int = 10000) -> dict:
    """Compare the same prompts before and after.

    Returns:
        before and after {mean, std, n}; reduction_percent {mean, std} (positive: fell; None where before is 0);
        paired_difference {mean, ci_low, ci_high, p_value} of after - before: a 95% percentile bootstrap interval
        (Efron, 1979) and the two-sided p-value of a sign-flip permutation test (Fisher, 1935); verdict {change,
        better, worse, detectable}: in words, the shares of prompts that fell and rose, and the smallest mean change
        that this many prompts would show with 80% power at the 5% level (Cohen, 1988).
    """
    before, after = np.asarray(before), np.asarray(after)
    difference, count = after - before, len(before)
    generator = random_stream(seed, STATISTICS)
    means, extreme = [], 0
    for _ in range(resamples):
        means.append(difference[generator.integers(count, size=count)].mean())
        flipped = (difference * generator.choice((-1, 1), size=count)).mean()
        # The tolerance counts a flip that reproduces the data, whatever the order of summation did.
        extreme += abs(flipped) >= abs(difference.mean()) - 1e-12
    low, high = np.percentile(means, [2.5, 97.5])
    p_value = float((extreme + 1) / (resamples + 1))

    def reduction(statistic):
        return float(100 * (1 - statistic(after) / statistic(before))) if statistic(before) > 0 else None

    change = "no detectable change"
    if p_value < 0.05 and (low > 0 or high < 0):
        change = "less toxic" if high < 0 else "more toxic"
    return {
        "before": mean_and_std(before),
        "after": mean_and_std(after),
        "reduction_percent": {"mean": reduction(np.mean), "std": reduction(np.std)},
        "paired_difference": {
            "mean": float(difference.mean()),
            "ci_low": float(low),
            "ci_high": float(high),
            "p_value": p_value,
        },
        "verdict": {
            "change": change,
            "better": float((difference < 0).mean()),
            "worse": float((difference > 0).mean()),
            "detectable": float((1.960 + 0.842) * difference.std(ddof=1) / count**0.5) if count > 1 else None,
        },
    }


def summary_quality(found: dict, summaries: list[str]) -> dict[str, float]:
    """What toxicity can't see of an evaluation's summaries: are they still summaries?

    Returns:
        ROUGE-1, -2 and -L F-measures against the human summaries (means, 0 to 1, stemmed); distinct_2, the share of
        different ones among all pairs of neighbouring words (Li et al., 2016); repeated_3, the mean share of a
        summary's triples of words that it has said before; the shares of empty and of unfinished (no end token)
        summaries; kl, to the reference in nats a summary.
    """
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    references = [summaries[i] for i in found["sample_rows"]]
    scores = [scorer.score(*pair) for pair in zip(references, found["responses"], strict=True)]
    words = [text.lower().split() for text in found["responses"]]
    pairs = [pair for text in words for pair in zip(text, text[1:], strict=False)]
    triples = [list(zip(text, text[1:], text[2:], strict=False)) for text in words]
    return {
        **{name: float(np.mean([score[name].fmeasure for score in scores])) for name in scorer.rouge_types},
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "repeated_3": float(np.mean([1 - len(set(said)) / len(said) if said else 0 for said in triples])),
        "empty": float(np.mean([not text for text in words])),
        "unfinished": float(1 - np.mean(found["finished"])),
        "kl": float(np.mean(found["kl"])),
    }


def degradation(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What got worse in the summaries, in words, from two results of summary_quality; empty if they are still good."""
    found = []
    if after["rougeL"] < 0.9 * before["rougeL"]:
        found.append(f"ROUGE-L fell from {before['rougeL']:.3f} to {after['rougeL']:.3f}")
    if after["distinct_2"] < 0.5 * before["distinct_2"]:
        found.append(f"distinct-2 fell from {before['distinct_2']:.3f} to {after['distinct_2']:.3f}")
    for name, what in (("repeated_3", "repeat themselves"), ("empty", "are empty"), ("unfinished", "never end")):
        if after[name] > before[name] + 0.1:
            found.append(f"{after[name]:.0%} {what} ({before[name]:.0%} before)")
    return found


def change_in_words(percent: float | None) -> str:
    if percent is None:
        return "was 0 before"
    return f"fell by {percent:.1f}%" if percent >= 0 else f"rose by {-percent:.1f}%"


def print_verdict(name: str, statistics: dict) -> None:
    """Print the change with its true direction, its interval and its p-value."""
    percent, paired = statistics["reduction_percent"], statistics["paired_difference"]
    print(f"{name}: mean {change_in_words(percent['mean'])}, std {change_in_words(percent['std'])}; ", end="")
    interval = f"[{paired['ci_low']:+.4f}, {paired['ci_high']:+.4f}]"
    print(f"paired difference {paired['mean']:+.4f}, 95% interval {interval}, p = {paired['p_value']:.4f}")
    verdict, count = statistics["verdict"], statistics["before"]["n"]
    shares = f"{verdict['better']:.0%} of {count} prompts fell, {verdict['worse']:.0%} rose"
    least = "unknown" if verdict["detectable"] is None else f"{verdict['detectable']:.4f}"
    print(f"  verdict: {verdict['change']}; {shares}; a change of {least} would have been detected (80% power)")


def build_results(
    evaluations: dict, floor: dict, dialogue_toxicity: list[float], summaries: list[str], config
) -> dict:
    """The measured blocks of results.json.

    Args:
        evaluations: results of evaluate_policy by when: "base" (with tuning), "before" and "after".
        floor: toxicity and summary_toxicity of the human summaries, a list of the evaluated rows each.
        dialogue_toxicity, summaries: of the same rows.
    """

    def compare(key, rows):
        values = {when: [found[key][i] for i in rows] for when, found in evaluations.items()}
        paired = paired_statistics(values["before"], values["after"], config.seed)
        return ({"base": mean_and_std(values["base"])} if "base" in values else {}) | paired

    toxic = [i for i, value in enumerate(dialogue_toxicity) if value > 0.5]
    quality = {when: summary_quality(found, summaries) for when, found in evaluations.items()}
    return {
        **{key: compare(key, range(len(summaries))) for key in floor},
        "human": {key: mean_and_std(values) for key, values in floor.items()},
        "toxic_dialogues": {"n": len(toxic)} | ({key: compare(key, toxic) for key in floor} if toxic else {}),
        **{
            key: {when: {"mean": float(np.mean(found[key]))} for when, found in evaluations.items()}
            for key in ("length", "reward")
        },
        "rouge": {
            when: {name: value for name, value in found.items() if name.startswith("rouge")}
            for when, found in quality.items()
        },
        "quality": quality,
    }


def print_results(results: dict) -> None:
    """Print what build_results found, and the warning that the summaries got worse."""
    for key in results["human"]:
        print_verdict(key.replace("_", " "), results[key])
    toxic = results["toxic_dialogues"]
    for key in [key for key in toxic if key != "n"]:
        told = ", ".join(f"{toxic[key][when]['mean']:.4f} {when}" for when in results["rouge"])
        change = toxic[key]["verdict"]["change"]
        print(f"{key.replace('_', ' ')} of the {toxic['n']} prompts with a toxic dialogue: {told}, {change}")
    for key in ("length", "reward"):
        print(f"{key}: mean " + ", ".join(f"{told['mean']:.2f} {when}" for when, told in results[key].items()))
    for name in results["quality"]["before"]:
        print(f"{name}: " + ", ".join(f"{told[name]:.4f} {when}" for when, told in results["quality"].items()))
    if "reward hacking" in results["warnings"]:
        print(f"warning: {results['warnings']['reward hacking']}")


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ---------------------------------------------------------------------------------------------------------------


def build_comparison(rows, before: dict, after: dict) -> pd.DataFrame:
    """One row a prompt, side by side, the largest gain in reward first."""
    count = len(rows)
    table = pd.DataFrame(
        {
            "query": rows["query"],
            "response_before": before["response"][:count],
            "response_after": after["response"][:count],
            "reward_before": before["its_reward"][:count],
            "reward_after": after["its_reward"][:count],
        }
    )
    table["reward_diff"] = table["reward_after"] - table["reward_before"]
    return table.sort_values("reward_diff", ascending=False, kind="stable", ignore_index=True)


def print_comparison(table: pd.DataFrame, rows: int = 5) -> None:
    """The first rows of the comparison, short enough for a terminal."""
    print(f"\n{'before':<50}  {'after':<50}  reward_diff")
    for row in table.head(rows).itertuples():
        print(f"{row.response_before[:50]:<50}  {row.response_after[:50]:<50}  {row.reward_diff:+.3f}")


# Okabe and Ito's colours, which colour-blind readers tell apart too.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def draw_training(metrics: list[dict]) -> Figure:
    """What happened over the PPO steps, a panel a measure, from the lines of metrics.jsonl."""
    panels = {
        "ppo/mean_scores": "score (logit), mean of the batch",
        "objective/kl": "KL to the reference (nats a response)",
        "ppo/returns/mean": "return (score less the price of KL), mean",
        "objective/entropy": "entropy (nats a response)",
        "tokens/responses_len_mean": "response length (tokens), mean",
        "ppo/val/var_explained": "share of the returns' variance that values explain",
    }
    metrics = [line for line in metrics if not line["ppo/skipped_steps"]]
    steps = [line["step"] for line in metrics]
    window = max(1, len(steps) // 20)
    figure = Figure(figsize=(10, 9), layout="constrained")
    grid = figure.subplots(3, 2, sharex=True)
    for axes, (name, title) in zip(grid.flat, panels.items(), strict=True):
        values = pd.Series([line[name] for line in metrics], dtype=float)
        axes.plot(steps, values, color=BLUE, alpha=0.35, marker="." if window == 1 else "", label="each step")
        means = values.rolling(window, min_periods=1).mean()
        axes.plot(steps, means, color=BLUE, linewidth=2, label=f"mean of the last {window}")
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(alpha=0.3)
        axes.spines["top"].set_visible(False)
    grid[0, 0].legend(frameon=False)
    price = grid[0, 1].twinx()
    price.plot(steps, [line["objective/kl_coef"] for line in metrics], color=ORANGE, linestyle="--", linewidth=2)
    price.set_ylim(0, 1.2 * max((line["objective/kl_coef"] for line in metrics), default=0) or 1)
    price.set_ylabel("KL coefficient (dashed)", color=ORANGE)
    price.tick_params(axis="y", colors=ORANGE)
    for axes in grid[-1]:
        axes.set_xlabel("PPO step")
    return figure


def draw_toxicity(before: list[float], after: list[float], paired: dict) -> Figure:
    """The summaries' toxicity, prompt by prompt, before and after; paired: see paired_statistics."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    shares, changes = figure.subplots(1, 2)
    bins = np.linspace(0, max(*before, *after), 11)
    shares.hist([before, after], bins, color=[ORANGE, BLUE], label=["before", "after"])
    shares.set(xlabel="toxicity of the summary, P(toxic)", ylabel="prompts", title=f"The same {len(before)} prompts")
    shares.legend(frameon=False)
    difference = np.sort(np.subtract(after, before))
    # Filled steps, not bars: a thousand bars take seconds to draw.
    edges = np.arange(len(difference) + 1) + 0.5
    for colour, part, label in ((GREEN, difference.clip(max=0), "fell"), (PURPLE, difference.clip(min=0), "rose")):
        changes.stairs(part, edges, fill=True, color=colour, label=f"{label}: {np.count_nonzero(part)}")
    changes.axhspan(paired["ci_low"], paired["ci_high"], color="black", alpha=0.25, linewidth=0)
    mean = f"mean {paired['mean']:+.3f}, 95% interval [{paired['ci_low']:+.3f}, {paired['ci_high']:+.3f}]"
    changes.axhline(paired["mean"], color="black", label=mean)
    changes.axhline(0, color="grey", linewidth=0.8)
    highest = abs(difference).max() or 1
    changes.set_ylim(-1.1 * highest, 1.7 * highest)  # room for the legend
    changes.set(xlabel="prompts, by change", ylabel="after - before", title="Change of each prompt's toxicity")
    changes.legend(frameon=False, loc="upper left")
    return figure


def write_pictures(directory: Path, metrics: list[dict], before: dict, after: dict, results: dict) -> None:
    """Write training.png from the steps' metrics, and toxicity.png from two evaluations and their statistics."""
    draw_training(metrics).savefig(directory / "training.png", dpi=120)
    key = "summary_toxicity"
    figure = draw_toxicity(before[key], after[key], results[key]["paired_difference"])
    figure.savefig(directory / "toxicity.png", dpi=120)


def measures(results: dict) -> dict:
    """What a run measured, on one level: {"toxicity": {"after": {"mean": x}}} becomes {"toxicity/after/mean": x}."""
    others = ("config", "environment", "warnings", "timings")
    measured = {name: value for name, value in results.items() if name not in others}
    return pd.json_normalize(measured, sep="/").to_dict("records")[0]


def escape(text: str, longest: int = 300) -> str:
    """Text for the card, shown as it is: no mark-up, HTML, link, line break or invisible sign in it works."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    live = r"[&<>|\\`*\[\]~$@]|[.:](?=\S)|(?<![^\W_])_|_(?![^\W_])"  # _ inside a word is none
    return re.sub(live, lambda sign: f"&#{ord(sign[0])};", text)


def markdown_table(header: list[str], rows: Iterable[list]) -> str:
    """A table; floats get four digits, texts are escaped."""
    shown = [[f"{cell:.4g}" if isinstance(cell, float) else escape(str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *shown])


def card_name(name: str) -> str:
    """A hub id as it is; a local path as its last part, spelt so that it is a valid repository name."""
    if not Path(name).exists():
        return name
    return re.sub(r"[^0-9A-Za-z]+", "-", Path(name).resolve().name)[:96].strip("-") or "local"


def card_data(config: DetoxConfig, results: dict) -> ModelCardData:
    """The card's metadata: what was trained on what, and the figures after as a model index."""
    found, dataset = measures(results), card_name(config.dataset_name)
    evaluations = [
        EvalResult(
            task_type="summarization",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="train",  # the held-out end of it
            dataset_revision=results["environment"]["commits"].get("dataset_name"),
            metric_type="rouge" if "rouge" in path else "toxicity",
            metric_name=f"{path} (before: {found[path.replace('after', 'before')]:.4f})",
            metric_value=round(value, 4),
        )
        for path, value in found.items()
        if re.fullmatch(r"(summary_)?toxicity/after/mean|rouge/after/\w+", path)
    ]
    return ModelCardData(
        model_name=card_name(config.output_dir),
        base_model=card_name(config.model_name),
        library_name="peft",
        pipeline_tag="summarization",
        datasets=[dataset],
        metrics=["toxicity", "rouge"],
        tags=["lora", "ppo", "detoxification"],
        eval_results=evaluations,
    )


def write_card(directory: Path, config: DetoxConfig, results: dict, comparison: pd.DataFrame) -> None:
    """Write README.md, a Hugging Face model card: verdict, figures, pictures, examples, use, limits."""
    found = [(path.split("/"), value) for path, value in measures(results).items()]
    columns = [name for name in ("base", "before", "after", "human") if any(name in parts for parts, _ in found)]
    columns, rows = [*columns, "other"], {}
    for parts, value in found:
        column = next((part for part in parts if part in columns), "other")
        rows.setdefault("/".join(part for part in parts if part != column), {})[column] = value
    figures = markdown_table(
        ["measure", *columns], ([name, *(cells.get(column, "") for column in columns)] for name, cells in rows.items())
    )
    head, tail = build_prompt("{}").split("{}")
    examples = markdown_table(
        ["dialogue", "before", "after", "reward before", "reward after"],
        ([row[0].removeprefix(head).removesuffix(tail), *row[1:5]] for row in comparison.head(10).to_numpy().tolist()),
    )
    toxicity = results["summary_toxicity"]
    paired = toxicity["paired_difference"]
    interval = f"[{paired['ci_low']:+.4f}, {paired['ci_high']:+.4f}]"
    warned = "\n".join(f"- **Warning:** {escape(text, 1000)}" for text in results["warnings"].values())
    settings = {name: results[name] for name in ("config", "environment")}
    card = f"""---
{card_data(config, results).to_yaml()}
---

# {escape(card_name(config.output_dir))}: a LoRA adapter for summaries that are not toxic

**Verdict: {toxicity["verdict"]["change"]}.** The summaries' toxicity was {toxicity["before"]["mean"]:.4f} before
and is {toxicity["after"]["mean"]:.4f} after in the mean of the same {toxicity["before"]["n"]} held-out prompts:
difference {paired["mean"]:+.4f}, 95% interval {interval}, p = {paired["p_value"]:.4f}.

{warned}

![Toxicity of the summaries before and after](toxicity.png)

The adapter started from {escape(config.adapter_name or "a new LoRA")} on {escape(config.model_name)}. PPO trained it
to raise the "{escape(config.reward_label)}" logit of {escape(config.reward_model_name)}. Toxicity is that classifier's
probability of "{escape(config.toxic_label)}": of dialogue and summary together (toxicity), or of the summary alone
(summary_toxicity).

## Results

{figures}

## Training

![Score, KL, returns, entropy, response length and value head over the steps](training.png)

## Examples

The test prompts whose reward rose most; comparison.csv has more. Some may offend.

{examples}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({config.model_name!r})
base = AutoModelForSeq2SeqLM.from_pretrained({config.model_name!r})
model = PeftModel.from_pretrained(base, {f"{directory}/adapter"!r}).eval()

dialogue = "#Person1#: Did you book the room? #Person2#: Yes, for Tuesday at nine."
prompt = {build_prompt("{}")!r}.format(dialogue)
summary = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens={config.eval_max_new_tokens})
print(tokenizer.decode(summary[0], skip_special_tokens=True))
```

## Limits

- Toxicity is what one classifier says, the one that the adapter was trained against: the training could not remove
  what it does not see, and may have learned its blind spots.
- The default classifier reads English only; text in other languages passes as harmless.
- The score does not see whether a summary is true to its dialogue, complete or useful. ROUGE, the lengths and the
  examples only hint at it.
- The figures hold for sampled summaries of these prompts, which are the end of one file.

## Configuration

```json
{json.dumps(settings, indent=2)}
```
"""
    ModelCard(card).save(directory / "README.md")


def start_tracker(config: DetoxConfig) -> accelerate.Accelerator | None:
    """Start the tracker that report_to names; the accelerator moves no model, seed or device.

    Raises:
        UserError: the tracker isn't installed, or doesn't start.
    """
    if config.report_to == "none":
        return None
    if config.report_to not in map(str, get_available_trackers()):
        raise UserError(f"--report_to {config.report_to}: not installed; pip install {config.report_to}")
    options = {name: value if value is None else str(value) for name, value in dataclasses.asdict(config).items()}
    try:
        tracker = accelerate.Accelerator(log_with=config.report_to, project_dir=config.output_dir)
        tracker.init_trackers("detox_ppo", options, {"wandb": {"dir": config.output_dir}})
    except Exception as error:  # each tracker has its own
        raise UserError(f"--report_to {config.report_to}: can't be started: {one_line(error)}") from error
    return tracker


def upload_comparison(table: str, directory: str | Path) -> None:
    """Put comparison.csv of a run's directory into a DynamoDB table, conversation_id from 1.

    Raises:
        UserError: awswrangler, the table, the region or the credentials are missing, or the service refuses; with the
            command that tries again.
    """
    call = f"upload_comparison({json.dumps(table)}, {json.dumps(str(directory))})"
    code = f"import detox_ppo; detox_ppo.main(job=lambda: detox_ppo.{call})"
    retry = f"Everything is saved in {directory}. To retry the upload alone: python -c {shlex.quote(code)}"
    try:
        import awswrangler

        # Read as text, so that numbers reach Decimal digit by digit.
        rows = pd.read_csv(Path(directory) / "comparison.csv", dtype=str, keep_default_na=False).astype(object)
    except ImportError as error:
        raise UserError(f"--dynamodb_table {table}: pip install awswrangler. {retry}") from error
    except OSError as error:
        raise UserError(f"{directory}/comparison.csv: can't be read: {error.strerror}") from error
    for name in ("reward_before", "reward_after"):
        rows[name] = rows[name].map(Decimal)
    rows.insert(0, "conversation_id", range(1, len(rows) + 1))
    try:
        awswrangler.dynamodb.put_df(rows.drop(columns="reward_diff"), table)
    except Exception as error:  # as in hub_commit
        raise UserError(f"--dynamodb_table {table}: {one_line(error)}. {retry}") from error
    print(f"{len(rows)} rows of comparison.csv put into the DynamoDB table {table}")


def environment(config: DetoxConfig, device, dtype, commits: dict, fingerprint: str) -> dict:
    """What the figures depend on beside the options."""
    packages = (torch, transformers, datasets, peft, trl, evaluate, np, pd)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package.__name__: package.__version__ for package in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "num_processes": PartialState().num_processes,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": config.seed,
        "commits": commits,
        "dataset_fingerprint": fingerprint,
    }


# ---------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------


def places(config: DetoxConfig) -> tuple[Path, Path, Path]:
    """Directories for what the run found, for the adapter with its card, and for checkpoints.

    All are output_dir, but in a SageMaker training job, which uploads each from a place of its own.
    """
    output_dir = Path(config.output_dir)
    if "SM_MODEL_DIR" not in os.environ:
        return output_dir, output_dir, output_dir
    synced = SAGEMAKER / "checkpoints"
    return output_dir, Path(os.environ["SM_MODEL_DIR"]), synced if synced.is_dir() else output_dir


def claim(directory: Path, option_name: str) -> FileLock:
    """Make a directory and lock it, for as long as somebody keeps the lock and the process lives.

    Raises:
        UserError: it can't be written, or another run holds it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A singleton, so that a notebook may run again after a failure whose traceback still keeps the lock.
        lock = FileLock(directory / ".lock", is_singleton=True)
        lock.acquire(timeout=0)
        return lock
    except Timeout as error:
        raise UserError(
            f"--{option_name} {directory}: another run is writing there; choose another directory"
        ) from error
    except OSError as error:
        raise UserError(f"--{option_name} {directory}: can't be written: {error.strerror}") from error


def run(config: DetoxConfig, stop: StopSignals | None = None) -> dict:
    """Load, tune if asked to, evaluate, train by PPO, load the adapter back, evaluate again, and write everything.

    Returns:
        the contents of results.json; "base" in it is the start before the tuning. Without PPO steps "after" is
        "before", which is not measured twice.

    Raises:
        UserError: a mistake or a fault that the user can mend.
        Stopped: a signal that stop took note of; what was done so far is in a checkpoint.
    """
    started, stop = time.perf_counter(), stop or StopSignals()
    config = dataclasses.replace(config)  # build_dataset will set eval_samples -1 to a number
    output_dir, model_dir, checkpoint_dir = places(config)
    processes = PartialState()
    writes = processes.is_main_process  # one process writes, for all
    if processes.num_processes > config.batch_size:
        raise UserError(f"--batch_size {config.batch_size} is too few for {processes.num_processes} processes")
    directories = {output_dir, model_dir, checkpoint_dir}
    _locks = [claim(directory, "output_dir") for directory in directories] if writes else []
    resumed = choose_checkpoint(config, checkpoint_dir, (output_dir / "results.json").exists())
    state = read_state(resumed, config) if resumed else None
    options = dataclasses.asdict(config)
    device, dtype = resolve_device(config)
    tracker = start_tracker(config) if writes else None
    print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")
    print(f"device {device}, base model in {str(dtype).removeprefix('torch.')}, adapter and classifier in float32")

    commits = {
        name: hub_commit(getattr(config, name), name, "dataset" if name == "dataset_name" else "model")
        for name in ("model_name", "adapter_name", "reward_model_name", "dataset_name")
        if getattr(config, name)
    }
    dialogues, summaries = load_dialogues(config.dataset_name)
    policy, tokenizer = load_policy(config, device, dtype)
    check_logits(policy, config)
    print_parameters(policy)
    classifier = HateClassifier(config, device)
    print_examples(classifier)
    splits = build_dataset(dialogues, summaries, tokenizer, config)
    check_lengths(policy, tokenizer, splits, classifier.max_length, config)
    train, test = splits["train"], splits["test"]
    texts = [list(split[column]) for split in (train, test) for column in ("query", "summary")]
    fingerprint = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    origin = {"config": options, "commits": commits, "dataset_fingerprint": fingerprint}
    if state is None:
        state = {"stage": "start", "step": 0, "kl_coef": config.init_kl_coef, "skipped_in_row": 0, "history": []}
        state |= {"evaluations": {}, "warnings": {}, "timings": {}}
    for name in origin.keys() - {"config"} if resumed else ():
        if state[name] != origin[name]:
            what = f"{name.replace('_', ' ')} was {state[name]} and is {origin[name]}"
            raise UserError(f"--resume {resumed}: models or data have changed since: {what}")
    state |= origin
    seen = gather_object([{**origin, "stage": state["stage"], "step": state["step"]}])
    differ = {name for name in seen[0] for other in seen if other[name] != seen[0][name]}
    if differ:
        raise UserError(f"the processes differ in {', '.join(differ)}: all need the same command and the same files")
    evaluations, timings, history, warned = (state[name] for name in ("evaluations", "timings", "history", "warnings"))
    timings["load"] = timings.get("load", 0) + time.perf_counter() - started
    earlier = timings.get("total", 0)

    evaluated = test.select(range(config.eval_samples))
    measure, floor = Toxicity(classifier), {}
    human = [classifier.join(*pair) for pair in zip(evaluated["dialogue"], evaluated["summary"], strict=True)]
    for key, texts in (("toxicity", human), ("summary_toxicity", list(evaluated["summary"]))):
        floor[key] = measure.compute(predictions=texts, toxic_label=config.toxic_label)["toxicity"]
    dialogue_toxicity = measure.compute(predictions=list(evaluated["dialogue"]), toxic_label=config.toxic_label)
    dialogue_toxicity = dialogue_toxicity["toxicity"]

    def evaluate_now(when):
        started_part = time.perf_counter()
        found = evaluate_policy(policy, tokenizer, classifier, evaluated, config, f"evaluating {when}")
        evaluations[when], timings[f"evaluate_{when}"] = found, time.perf_counter() - started_part
        for key, human in floor.items():
            name, what = key.replace("_", " "), "before tuning" if when == "base" else f"{when} detox"
            print(f"{name} [mean, std] {what}: [{np.mean(found[key]):.4f}, {np.std(found[key]):.4f}]")
            if when == "before":
                print(f"{name} [mean, std] of the human summaries: [{np.mean(human):.4f}, {np.std(human):.4f}]")

    def judge(step):
        """Evaluate on the rows set aside, and note the step if its adapter is the best so far."""
        found = evaluate_policy(policy, tokenizer, classifier, splits["selection"], config, "choosing")
        quality = summary_quality(found, list(splits["selection"]["summary"]))
        toxicity, start = float(np.mean(found["summary_toxicity"])), state.setdefault("selection_start", quality)
        # The least toxic of those that still write summaries as good as the start's.
        if "best" not in state or (toxicity < state["best"]["summary_toxicity"] and not degradation(start, quality)):
            state["best"] = {"step": step, "summary_toxicity": toxicity, "rougeL": quality["rougeL"]}
        so_far = "the best so far" if state["best"]["step"] == step else f"step {state['best']['step']} was better"
        tqdm.write(f"  rows set aside: summary toxicity {toxicity:.4f}, ROUGE-L {quality['rougeL']:.4f}, {so_far}")
        return {"eval/summary_toxicity": toxicity, "eval/rougeL": quality["rougeL"]}

    critic, active = policy.value_parameters, policy.model.parameters()
    actor = [p for p in active if p.requires_grad and not any(p is other for other in critic)]
    optimizer = torch.optim.Adam(
        [{"params": actor}, {"params": critic, "lr": config.value_learning_rate or config.learning_rate}],
        lr=config.learning_rate,
    )
    # Clipped apart where they share nothing, so that neither's gradients shorten the other's step.
    clipped = [actor, critic] if config.value_adapter else [actor + critic]
    tuning_dir = checkpoint_dir / TUNING_DIR
    if state["stage"] == "ppo":
        load_checkpoint(resumed, policy, optimizer)
        if resumed.parent.resolve() != checkpoint_dir.resolve() and writes:
            for path in [*find_checkpoints(checkpoint_dir), tuning_dir]:
                remove(path)
            copy_checkpoint(resumed, state, checkpoint_dir)
    else:
        if not resumed:
            evaluate_now("base" if config.sft_steps else "before")
            # Only now is anything of an earlier run replaced; results.json last, so that it may still be done anew.
            for path in [*find_checkpoints(checkpoint_dir), tuning_dir, output_dir / "results.json"] if writes else ():
                remove(path)
        if config.sft_steps:
            started_part = time.perf_counter()
            tune(policy, tokenizer, train, config, tuning_dir, state, stop, resumed)
            timings["tuning"] = time.perf_counter() - started_part
            evaluate_now("before")
        if config.eval_every:
            judge(0)
        state["stage"] = "ppo"
        timings["total"] = earlier + time.perf_counter() - started
        if writes:
            save_checkpoint(checkpoint_dir, policy, optimizer, state, config.save_total_limit)
    if writes:
        remove(tuning_dir)
        if state["step"] < config.max_ppo_steps:
            remove(output_dir / "results.json")  # those of a shorter run: this one is unfinished
    if config.sft_steps and writes:
        with written_aside(model_dir / "sft_adapter") as directory:
            save_lora(policy.model, directory, "reference")

    steps_per_epoch = len(train) // config.batch_size
    metrics_file = open(output_dir / "metrics.jsonl" if writes else os.devnull, "w", encoding="utf-8")
    metrics_file.writelines(json.dumps(line) + "\n" for line in history)
    first, last = state["step"] + 1, config.max_ppo_steps
    bar = tqdm(range(first, last + 1), desc="PPO", unit="step", initial=first - 1, total=last, disable=None)
    stop.in_step = True
    for step in bar:
        clock = [time.perf_counter()]
        # Rows are a function of (seed, step): an epoch is a fresh shuffle, its last incomplete batch is dropped.
        epoch, index = divmod(step - 1, steps_per_epoch)
        shuffled = random_stream(config.seed, SHUFFLE, epoch).permutation(len(train))
        batch = train.select(shuffled[index * config.batch_size : (index + 1) * config.batch_size])
        prompts = list(batch["input_ids"])
        prompt_lengths = list(map(len, prompts))

        # 1. Generate. This process's share of the batch, here and up to the score.
        rows = share(range(config.batch_size), prompt_lengths)
        mine = batch.select(rows)
        generators = [random_stream(config.seed, TRAINING, step, row) for row in mine["row"]]
        caps = (config.output_min_length, config.output_max_length)
        responses = sample_responses(policy, list(mine["input_ids"]), generators, caps, config)
        texts = [text.strip() for text in tokenizer.batch_decode(responses.tokens, skip_special_tokens=True)]

        clock.append(time.perf_counter())

        # 2. Log-probabilities and values of the policy that sampled, then of the reference.
        old_logprobs, old_values = score_batch(policy, responses)
        responses.encoder_states = None  # the other adapters' are others, and the update's need gradients
        if config.value_adapter:
            with policy.adapter("value"):
                (old_values,) = score_batch(policy, responses, value_responses)
        clock.append(time.perf_counter())
        with policy.adapter("reference"):
            ref_logprobs, _ = score_batch(policy, responses)
        clock.append(time.perf_counter())

        # 3. Score the text.
        if config.score_text == "query_response":
            scored = [classifier.join(dialogue, text) for dialogue, text in zip(mine["dialogue"], texts, strict=True)]
        else:
            scored = texts
        scores = torch.tensor(classifier.scores(scored), dtype=torch.float32, device=device)
        clock.append(time.perf_counter())

        # 4. Rewards and advantages, of the whole batch in every process: scores (B,), the others (B, T).
        *sampled, old_logprobs, old_values, ref_logprobs, scores = gather_rows(
            rows,
            *(responses.tokens, responses.lengths, responses.finished, responses.support),
            *(old_logprobs, old_values, ref_logprobs, scores),
        )
        responses = Responses(prompts, *sampled)
        mask = response_mask(responses.lengths, responses.tokens.shape[1])  # (B, T)
        clock.append(time.perf_counter())

        # Numbers that are not finite would end up in the weights: such a step changes nothing but the counts.
        parts = {"scores": scores, "log-probabilities": old_logprobs, "reference": ref_logprobs, "values": old_values}
        broken = [name for name, values in parts.items() if not values.isfinite().all()]

        kl_coef = state["kl_coef"]
        rewards, kl = compute_rewards(scores, old_logprobs, ref_logprobs, mask, kl_coef)
        advantages, returns = compute_advantages(old_values, rewards, mask, config.gamma, config.lam)

        # 5. Update.
        updates, skipped, moved = [], 0, False
        for ppo_epoch in range(config.ppo_epochs):
            order = random_stream(config.seed, MINIBATCH, step, ppo_epoch).permutation(config.batch_size)
            for mb in torch.from_numpy(order).split(config.mini_batch_size):
                if broken or moved:
                    break
                optimizer.zero_grad()
                update = Counter()
                for part_rows in micro_batches(prompt_lengths, share(mb, prompt_lengths), policy.base):
                    part = responses.select(part_rows)
                    width = part.tokens.shape[1]
                    mb_mask, mb_old_logprobs, mb_old_values, mb_advantages, mb_returns = (
                        column[part_rows, :width] for column in (mask, old_logprobs, old_values, advantages, returns)
                    )
                    # Weighed by its tokens, the parts' gradients add up to the minibatch's, over the processes too.
                    weight = mb_mask.sum() / mask[mb].sum()
                    logprobs, values = score_responses(policy, part)
                    pg_loss, stats = policy_loss(logprobs, mb_old_logprobs, mb_advantages, mb_mask, config.cliprange)
                    vf_inputs = mb_old_values, mb_returns, mb_mask, config.cliprange_value
                    if config.value_adapter:
                        (weight * pg_loss).backward()
                        with policy.adapter("value", trainable=True):
                            (values,) = value_responses(policy, part)
                            vf_loss, vf_clipfrac = value_loss(values, *vf_inputs)
                            # Backward in here too, where activations may be computed again.
                            (weight * config.vf_coef * vf_loss).backward()
                    else:
                        vf_loss, vf_clipfrac = value_loss(values, *vf_inputs)
                        (weight * (pg_loss + config.vf_coef * vf_loss)).backward()
                    for name, value in (
                        ("ppo/loss/total", pg_loss + config.vf_coef * vf_loss),
                        ("ppo/loss/policy", pg_loss),
                        ("ppo/loss/value", vf_loss),
                        ("ppo/policy/approxkl", stats["approxkl"]),
                        ("ppo/policy/policykl", stats["policykl"]),
                        ("ppo/policy/clipfrac", stats["clipfrac"]),
                        ("ppo/policy/ratio", stats["ratio"]),
                        ("ppo/val/clipfrac", vf_clipfrac),
                    ):
                        update[name] += (weight * value).item()
                update = add_up(actor + critic, update)
                updates.append(update)
                if update["ppo/policy/ratio"] > config.ratio_threshold:
                    skipped += 1
                    continue
                norms = [nn.utils.get_total_norm([parameter.grad for parameter in part]) for part in clipped]
                if not all(norm.isfinite() for norm in norms):
                    broken.append("gradients")
                    break
                limit = config.target_policy_kl
                moved = limit is not None and update["ppo/policy/policykl"] > 1.5 * limit
                if moved:
                    break
                for parameters, norm in zip(clipped, norms, strict=True) if config.max_grad_norm else ():
                    nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
                optimizer.step()
        clock.append(time.perf_counter())

        # 6. Report. Means over all minibatches, not the last one's.
        objective_kl = kl.sum(dim=1).mean().item()
        metrics = {"step": step, "ppo/skipped_steps": int(bool(broken)), "objective/kl_coef": kl_coef}
        if not broken:
            metrics |= {
                "objective/kl": objective_kl,
                "objective/entropy": -old_logprobs.sum(dim=1).mean().item(),
                "ppo/mean_scores": scores.mean().item(),
                "ppo/std_scores": scores.std(correction=0).item(),
                "ppo/mean_non_score_reward": masked_mean(-kl_coef * kl, mask).item(),
                "ppo/returns/mean": masked_mean(returns, mask).item(),
                "ppo/returns/var": returns[mask].var().item() if mask.sum() > 1 else 0.0,
                "ppo/val/var_explained": variance_explained(old_values, returns, mask),
                "ppo/policy/advantages_mean": masked_mean(advantages, mask).item(),
                **{name: float(np.mean([update[name] for update in updates])) for name in updates[0]},
                "ppo/policy/first_ratio": updates[0]["ppo/policy/ratio"],
                "ppo/skipped_minibatches": skipped,
                "ppo/early_stop": int(moved),
                "tokens/responses_len_mean": responses.lengths.float().mean().item(),
                "tokens/finished_share": responses.finished.float().mean().item(),
            }
        metrics |= {
            "time/sample": clock[1] - clock[0],
            "time/logprobs": clock[2] - clock[1],
            "time/reference": clock[3] - clock[2],
            "time/rollout": clock[3] - clock[0],
            "time/reward": clock[4] - clock[3],
            "time/gather": clock[5] - clock[4],
            "time/optimize": clock[6] - clock[5],
            "time/step": clock[6] - clock[0],
        }
        published = ("objective/kl", "ppo/returns/mean", "ppo/policy/advantages_mean", "ppo/mean_scores")
        told = {name: f"{metrics[name]:8.4f}" for name in published if name in metrics}
        bar.set_postfix(told)
        line = " | ".join(f"{name} {value}" for name, value in told.items()) or f"not finite: {', '.join(broken)}"
        tqdm.write(f"step {step:>4}/{last} | {line} | {metrics['time/step']:6.1f} s", file=sys.stdout)
        usable = not {"log-probabilities", "values"} & set(broken)
        if config.eval_every and step % config.eval_every == 0 and usable:
            metrics |= judge(step)
        metrics_file.write(json.dumps(metrics) + "\n")
        metrics_file.flush()
        if tracker:
            tracker.log(metrics, step=step)
        history.append(metrics)
        words, found = health(history, config)
        tqdm.write(f"  {words}", file=sys.stdout)
        for kind, text in found.items():
            if kind not in warned:
                warned[kind] = f"step {step}: {text}"
                tqdm.write(f"  warning, {warned[kind]}", file=sys.stdout)

        # 7. Keep.
        if config.adaptive_kl and not broken:
            state["kl_coef"] = adapted_kl_coef(
                kl_coef, objective_kl, config.target_kl, config.kl_horizon, config.batch_size
            )
        state["step"], state["skipped_in_row"] = step, state["skipped_in_row"] + 1 if broken else 0
        timings["ppo"] = timings.get("ppo", 0) + metrics["time/step"]
        timings["total"] = earlier + time.perf_counter() - started
        # Where the policy's own numbers are broken, the newest checkpoint is the last good state.
        give_up = state["skipped_in_row"] >= 3
        best = "best" in state and state["best"]["step"] == step
        due = stop.agreed() or step % config.save_steps == 0 or step == last or best or give_up
        if usable and due and writes:
            save_checkpoint(checkpoint_dir, policy, optimizer, state, config.save_total_limit)
        if due and stop.agreed():  # where none is due, a signal that has just come waits for the next step
            raise Stopped
        if give_up:
            raise UserError(
                f"step {step}: three steps in a row gave numbers that are not finite ({', '.join(broken)}). The last "
                f"good state is {find_checkpoints(checkpoint_dir)[0]}. Lower learning_rate, or set dtype float32."
            )
    stop.raise_if_received()
    metrics_file.close()
    if writes:
        # Again, if a kill cut it off.
        prune_checkpoints(checkpoint_dir, state["step"], config.save_total_limit, state.get("best", {}).get("step"))

    processes.wait_for_everyone()
    if "best" in state:
        restore_adapter(policy, checkpoint_dir / f"checkpoint-{state['best']['step']}" / "adapter")
        print(f"the best adapter by the rows set aside is that of step {state['best']['step']}")
    if writes:
        with written_aside(model_dir / "adapter") as directory:
            save_adapter(policy, directory)
    processes.wait_for_everyone()
    if config.max_ppo_steps:
        # What is measured is what a user will load: the files on disk, not the weights in memory.
        policy.model.load_adapter(model_dir / "adapter", adapter_name="trained", torch_device=str(device))
        with policy.adapter("trained"):
            evaluate_now("after")
    else:
        evaluations["after"] = evaluations["before"]

    results = {"config": {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}}
    results["environment"] = environment(config, device, dtype, commits, fingerprint)
    results |= build_results(evaluations, floor, dialogue_toxicity, list(evaluated["summary"]), config)
    before, after = evaluations["before"], evaluations["after"]
    worse = degradation(results["quality"]["before"], results["quality"]["after"])
    if worse and results["summary_toxicity"]["paired_difference"]["mean"] < 0:
        warned["reward hacking"] = (
            f"reward hacking: toxicity fell, but the summaries got worse: {'; '.join(worse)}. "
            "Raise init_kl_coef, lower learning_rate or stop earlier."
        )
    not_finite = sum(line["ppo/skipped_steps"] for line in history)
    if not_finite:
        warned["not finite"] = (
            f"{not_finite} of {len(history)} steps were skipped, their scores, log-probabilities or gradients were "
            "not finite numbers. Lower learning_rate, or set dtype float32."
        )
    results["warnings"] = warned
    if "best" in state:
        results["best"] = state["best"]
    if not writes:
        return results
    print_results(results)
    comparison = build_comparison(test.select(range(min(config.compare_samples, config.eval_samples))), before, after)
    with written_aside(output_dir / "comparison.csv") as path:
        comparison.to_csv(path, index=False)
    print_comparison(comparison)
    timings["total"] = earlier + time.perf_counter() - started
    results["timings"] = timings
    with written_aside(output_dir / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    # The card shows the pictures, so where it has a directory of its own it takes them along.
    for directory in {output_dir, model_dir}:
        write_pictures(directory, history, before, after, results)
    write_card(model_dir, config, results, comparison)
    if tracker:
        final = {name: value for name, value in measures(results).items() if isinstance(value, (int, float))}
        tracker.log({f"final/{name}": value for name, value in final.items()}, step=config.max_ppo_steps)
        tracker.end_training()
    left = "results.json, README.md with pictures, metrics.jsonl, comparison.csv, adapter/"
    left += ", sft_adapter/" if config.sft_steps else ""
    where = output_dir if model_dir == output_dir else f"{output_dir} and {model_dir}"
    print(f"\n{timings['total']:.0f} s in all; {left} in {where}")
    if config.dynamodb_table:
        upload_comparison(config.dynamodb_table, output_dir)
    return results


@contextmanager
def silence():
    """For all processes but one: nothing printed, and so no progress bars."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def main(args: list[str] | None = None, job: Callable[[], object] | None = None) -> None:
    """Parse the options and run, or do another job of this module with the same care for signals and errors.

    Exit codes: 2 for a failure that the user can mend, told in one line on stderr; 0 after SIGTERM and 130 after
    Ctrl-C, when all up to the step in hand is saved.
    """
    # Notices of the libraries to their own developers, such as T5's about tied weights, would only worry a user.
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.setLogRecordFactory(MaskedRecord)
    stop = StopSignals()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for way in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
            if parse_flag_from_env(f"ACCELERATE_USE_{way}"):
                raise UserError(f"accelerate's {way} is not supported: every process holds the whole model")
        processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
        with nullcontext() if processes.is_main_process else silence():
            job() if job else run(parse_config(sys.argv[1:] if args is None else args), stop)
        processes.destroy_process_group()
    except Stopped:
        name = signal.Signals(stop.received).name
        if first_to_end():
            way = "" if job else "; the same command with --resume goes on from the newest checkpoint"
            print(f"stopped by {name}{way}", file=sys.stderr)
        sys.exit(0 if stop.received == signal.SIGTERM else 130)
    except Exception as error:
        told = explain(error)
        if not first_to_end():
            sys.exit(2)
        if (SAGEMAKER / "output").is_dir():
            with suppress(OSError):  # a full disk, say
                told_there = told or masked(traceback.format_exc())
                (SAGEMAKER / "output" / "failure").write_text(told_there, encoding="utf-8")
        if told is None:
            raise
        print(f"detox_ppo.py: error: {told}", file=sys.stderr)
        sys.exit(2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
