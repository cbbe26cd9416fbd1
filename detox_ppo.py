"""Detoxify a summarizer with PPO: FLAN-T5 and a LoRA adapter, in one file.

The policy is an encoder-decoder with a LoRA adapter and a value head. The reference is the same base with the
starting adapter, frozen. The score of a summary is the raw "nothate" logit of a RoBERTa hate-speech classifier. A run
measures toxicity, trains, reloads the adapter from disk and measures again on the same prompts and random numbers.

    python detox_ppo.py                                          # FLAN-T5-base on DialogSum, from the hub
    python detox_ppo.py --config checkpoints/tiny/config.yaml    # the bundled toy example: no network, two minutes
    python detox_ppo.py --help                                   # every option, its unit and why to change it

A run writes results.json, metrics.jsonl (one line per PPO step), comparison.csv, adapter/ and a model card to
--output_dir. Without --adapter_name the policy starts as the base model with a new LoRA; --sft_steps fine-tunes it
on the human summaries first. --resume continues an interrupted run. To use several processes:
`accelerate launch --multi_gpu --num_processes N detox_ppo.py ...`.

The front of the file, up to the heading "Back rooms", is the algorithm in reading order: options, data, policy,
classifier, rollout, PPO, SFT, evaluation, run. The back is everything else: evaluation alone, reading files, loading
checks, processes, report, checkpoints, errors, command line.

Shapes: B rows of a batch, S tokens of a prompt, T tokens of a response, N tokens of all responses in a batch,
V tokens of the vocabulary, d the model's hidden size.
"""

from __future__ import annotations

import atexit
import bisect
import copy
import csv
import dataclasses
import difflib
import functools
import gc
import hashlib
import inspect
import io
import itertools
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
import tempfile
import textwrap
import threading
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from packaging.version import Version

# The oldest tested versions. transformers 5.0 wrongly ties FLAN-T5's head to its embeddings.
unsupported = [
    f"{package} {version(package)} is older than {oldest}: pip install -U {package}"
    for package, oldest in {"torch": "2.13", "transformers": "5.1", "peft": "0.21.2"}.items()
    if Version(version(package)) < Version(oldest)
]
if sys.platform == "win32":
    unsupported.append("Windows lacks the file locks and signals that a run needs: use WSL or Docker")
if unsupported and __name__ != "__main__":
    raise ImportError(unsupported[0])


def temporary_directory() -> str:
    """A directory that is removed when the process exits."""
    directory = tempfile.mkdtemp(prefix="detox_ppo-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


if __name__ == "__main__":  # process-wide settings, which an import must not change
    if unsupported:
        print(f"detox_ppo.py: error: {unsupported[0]}", file=sys.stderr)
        sys.exit(2)
    # Libraries keep caches and settings in the home directory; some fail without one.
    if not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ["HOME"] = home = temporary_directory()
        print(f"no writable home directory: using {home}. Set HF_HOME to keep downloads", file=sys.stderr)
    # oneDNN caches kernels for 1,024 shapes by default, half a megabyte each; 128 are enough. Read on its first use.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # Excluding the imports' million long-lived objects from garbage collection saves a third of start and exit time.
    gc.disable()

import datasets
import evaluate
import huggingface_hub
import numpy as np
import pandas as pd
import peft
import pydantic
import regex
import torch
import transformers
import trl
import yaml
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather, gather_object, pad_across_processes, parse_flag_from_env, reduce
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from matplotlib.figure import Figure
from nltk.stem.porter import PorterStemmer
from pandas.io.common import get_handle
from pydantic import BeforeValidator, ConfigDict, Field, WrapValidator
from rouge_score import rouge_scorer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer.utils import selective_log_softmax

if __name__ == "__main__":
    gc.enable()
    gc.freeze()

NO_BAR = False if "ipykernel" in sys.modules else None  # tqdm's disable; None: no bar unless stderr is a terminal
PROMPT = "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n"  # as in the published notebooks

# Streams of random numbers. Every draw depends only on the seed, its stream and a key such as the step. So evaluating
# more often leaves the training unchanged, and a resumed run has no random state to restore.
ROLLOUT, EVALUATION, SHUFFLE, MINIBATCH, STATISTICS, SFT = range(6)


def random_stream(seed: int, stream: int, *key: int) -> np.random.Generator:
    """A generator determined by seed, stream and key alone, independent of earlier draws."""
    return np.random.default_rng([seed, stream, *key])


# --- Options: type, range, default and help of each in one place -----------------------------------------------------


def normalize(value):
    """Convert an option's value for printing and storing: a Path to str, a Dataset to the directory it is saved in.

    "" (an unset shell variable, SageMaker's None) and "None" become None. ValueError if a string is not printable.
    """
    if isinstance(value, datasets.Dataset):
        directory = temporary_directory()
        value.save_to_disk(directory)
        return directory
    if value in ("", "None"):
        return None
    name = str(value) if isinstance(value, Path) else value
    if not isinstance(name, str):
        return name
    if not name.strip() or not name.isprintable() or SECRETS.search(name):
        raise ValueError("it should be printable, without a token or password (the hub's token belongs in HF_TOKEN)")
    at_home = re.match("~(/|$)", name)  # shells do not expand --output_dir=~/run
    return os.path.expanduser(name) if at_home else name


def layer_names(value, validate_list):
    """Follow PEFT: a list holds layer names; a string is a regular expression or "all-linear".

    A flag's value is always a list, even of one string. A string of names becomes a list: "q v", or "['q', 'v']" as
    SageMaker writes it.
    """
    text = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(text, str):
        return validate_list(value)
    if not re.fullmatch(r"[\w.,\s]*|\[['\"].*['\"]\]", text):
        return text
    names = re.findall(r"[\w.]+", text)
    return validate_list(None if names in ([], ["None"]) else names)


def one_or_more(value, validate_list):
    """Accept a name or a list of names; a list of one becomes that name."""
    names = validate_list(value if isinstance(value, list) else [value])
    return names[0] if len(names) == 1 else names


def option(default, help: str):
    """A field of the configuration with its --help text."""
    return field(default=default, metadata={"help": help})


normalized = BeforeValidator(normalize)
PositiveInt, NaturalInt = Annotated[int, Field(ge=1, lt=2**31)], Annotated[int, Field(ge=0, lt=2**31)]
Positive, NonNegative = Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0)]
PositiveOrNone = Annotated[Positive | None, normalized]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name, NameOrNone = Annotated[str, normalized], Annotated[str | None, normalized]
LayerNames = Annotated[list[str] | None, WrapValidator(layer_names)]  # or a str, which TrlParser can't declare
OneOrMoreNames = Annotated[list[Name], Field(min_length=1), WrapValidator(one_or_more)]


@pydantic.dataclasses.dataclass(config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class DetoxConfig:
    """The options of a run. Flags override `--config FILE.yaml`, which overrides these defaults."""

    # models
    model_name: Name = option("google/flan-t5-base", "Encoder-decoder: hub id or directory. Larger writes better.")
    adapter_name: NameOrNone = option(None, "LoRA to start from: hub id or directory. None or empty: a new one.")
    lora_r: PositiveInt = option(32, "Rank of a new LoRA. Lower saves memory; a loaded adapter keeps its rank.")
    lora_alpha: PositiveInt = option(32, "Scale of a new LoRA, applied as lora_alpha / lora_r.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = option(0.05, "Dropout of a new LoRA during SFT.")
    lora_target_modules: LayerNames = option(
        None, "Layers of a new LoRA: names, a regular expression or all-linear. None: PEFT's default (T5: q v)."
    )
    reward_model_name: Name = option(
        "facebook/roberta-hate-speech-dynabench-r4-target",
        "Classifier that gives the reward: hub id or directory. Use another for other languages or kinds of toxicity.",
    )
    reward_label: NameOrNone = option("nothate", "Label whose raw logit is the score. None: toxic_label's, negated.")
    toxic_label: Name = option("hate", "Label whose probability is reported as toxicity.")
    judge_model_name: NameOrNone = option(None, "Second classifier, used for evaluation only: hub id or directory.")
    judge_label: Name = option("toxic", "Label of the judge whose probability is reported as toxicity.")
    # data
    dataset_name: Name = option(
        "knkarthick/dialogsum",
        "Dialogues: hub id (name@revision), directory with a train file, or file: csv, tsv, json, jsonl, parquet.",
    )
    dataset_config_name: NameOrNone = option(None, "Configuration of a hub dataset that has several.")
    eval_dataset_name: NameOrNone = option(
        None, "Rows to evaluate on, of any length. None: a directory's test file, or the end of the training rows."
    )
    dialogue_column: Name = option("dialogue", "Name of the column with the dialogues.")
    summary_column: OneOrMoreNames = option(
        "summary", "One or more columns of human summaries. ROUGE uses a row's best match, SFT and ptx_coef its first."
    )
    prompt: str = option(PROMPT, "Prompt template; the dialogue replaces {dialogue}.")
    input_min_text_length: NaturalInt = option(200, "Keep dialogues longer than this, in characters.")
    input_max_text_length: PositiveInt = option(1000, "Keep dialogues up to this, in characters. Lower is faster.")
    test_size: Annotated[float, Field(gt=0, lt=1)] = option(0.2, "Fraction of rows held out, at the end of the file.")
    # SFT
    sft_steps: NaturalInt = option(0, "SFT steps on the human summaries before PPO. 0: none.")
    sft_learning_rate: Positive = option(1e-3, "AdamW learning rate of SFT, decays to 0. Lower it if the loss jumps.")
    sft_batch_size: PositiveInt = option(16, "Dialogues per SFT step. Larger gives less noisy steps.")
    sft_max_target_length: PositiveInt = option(128, "Human summaries are truncated to this many tokens.")
    # PPO
    learning_rate: Positive = option(1.41e-5, "Learning rate of PPO (Adam). Higher learns faster; watch objective/kl.")
    lr_scheduler_type: Literal["constant", "linear"] = option(
        "constant", "Learning-rate schedule over the PPO steps: constant, or linear decay to 0."
    )
    batch_size: PositiveInt = option(16, "Prompts per PPO step. Larger gives less noisy, slower steps.")
    mini_batch_size: PositiveInt = option(4, "Responses per optimizer update; divides batch_size.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: slower, less memory.")
    ppo_epochs: PositiveInt = option(1, "Optimization epochs per batch. More learns faster but less on-policy.")
    max_ppo_steps: NaturalInt = option(10, "PPO steps. The notebooks' 10 are only a demonstration. 0: none.")
    score_clip: PositiveOrNone = option(None, "Clip scores to plus or minus this, to limit what clean text can gain.")
    init_kl_coef: NonNegative = option(0.2, "KL penalty coefficient. Raise it to stay closer to the reference.")
    adaptive_kl: bool = option(True, "Adapt the KL coefficient to reach target_kl; false keeps init_kl_coef.")
    target_kl: Positive = option(6.0, "Target of adaptive_kl, in nats per response. Warnings always use it.")
    kl_horizon: PositiveInt = option(10000, "Horizon of adaptive_kl, in responses. Lower adapts faster.")
    gamma: Fraction = option(1.0, "Discount per token, 0 to 1. 1 credits every token with the final score.")
    lam: Fraction = option(0.95, "GAE's lambda, 0 to 1. 1 trusts the sampled return, 0 the value head.")
    cliprange: Positive = option(0.2, "Clip range of the policy ratio. Lower makes smaller updates.")
    cliprange_value: Positive = option(0.2, "Clip range of the value per step, in units of the score.")
    vf_coef: NonNegative = option(0.1, "Weight of the value loss. Raising it loses content; 0.003 did better.")
    ratio_threshold: Annotated[float, Field(gt=1)] = option(10.0, "Skip minibatches whose mean ratio is above this.")
    max_grad_norm: PositiveOrNone = option(None, "Clip gradients to this norm. Set it if the loss spikes.")
    freeze_encoder: bool = option(False, "In PPO, train only the decoder's LoRA. The encoder runs once per step.")
    content_coef: NonNegative = option(0.0, "Weight in the score of a summary's similarity to its own dialogue.")
    ptx_coef: NonNegative = option(0.0, "Weight in PPO of the SFT loss on clean summaries. Raise it to keep content.")
    # responses
    output_min_length: PositiveInt = option(100, "Smallest max_new_tokens drawn for a response in PPO; not a minimum.")
    output_max_length: PositiveInt = option(400, "Largest max_new_tokens drawn for a response. Lower is faster.")
    score_text: Literal["query_response", "response"] = option(
        "query_response", "Scored text: dialogue + summary, or the summary alone (better where dialogues are toxic)."
    )
    # evaluation
    eval_samples: Annotated[int, Field(ge=-1, lt=2**31)] = option(100, "Number of test prompts to evaluate; -1: all.")
    eval_max_new_tokens: PositiveInt = option(100, "max_new_tokens of a summary in the evaluation.")
    # run
    seed: Annotated[int, Field(ge=0, lt=2**64)] = option(0, "Random seed. Run several to see the spread.")
    device: Name = option("auto", "cpu, cuda or cuda:N. auto: a GPU if there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Data type of the frozen base; the rest is float32. auto: bfloat16 if the hardware supports it."
    )
    output_dir: Name = option("checkpoints/run", "Directory for all files that a run writes.")
    model_dir: NameOrNone = option(None, "Directory for the adapter and its card. None: output_dir.")
    checkpoint_dir: NameOrNone = option(None, "Directory for the checkpoints. None: output_dir.")
    save_steps: PositiveInt = option(10, "Number of steps between two checkpoints.")
    save_total_limit: PositiveInt = option(2, "Number of newest checkpoints to keep. One of FLAN-T5-base takes 57 MB.")
    resume: bool = option(False, "Continue from the newest valid checkpoint.")
    logging_steps: PositiveInt = option(1, "PPO steps between printed lines. metrics.jsonl has every step.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "Tracker to log the metrics to.")
    hub_model_id: NameOrNone = option(None, "Hub repository to push adapter and model card to at the end.")
    dynamodb_table: NameOrNone = option(None, "DynamoDB table to write comparison.csv to at the end (awswrangler).")

    def __post_init__(self):
        if self.adapter_name and os.path.exists(os.path.join(self.adapter_name, "adapter", "adapter_config.json")):
            self.adapter_name = os.path.join(self.adapter_name, "adapter")  # a run's output_dir was given
        check_options(self)

    @property
    def summary_columns(self) -> list[str]:
        return [self.summary_column] if isinstance(self.summary_column, str) else self.summary_column


OPTIONS = [field.name for field in dataclasses.fields(DetoxConfig)]


# --- Data: dialogues to prompts --------------------------------------------------------------------------------------


def build_prompt(dialogue: str, prompt: str = PROMPT) -> str:
    return prompt.replace("{dialogue}", dialogue)


def build_dataset(rows, tokenizer, config: DetoxConfig, eval_rows=None) -> datasets.DatasetDict:
    """Build and tokenize the prompts: columns query and input_ids in the splits `train` and `test`.

    rows, from load_dialogues, are filtered by length; None if nothing is trained. eval_rows, of any length, become
    the test split; without them it is the end of rows, in file order. UserError if a split has too few rows.
    """
    template = config.prompt  # datasets hashes what the function uses: the template, not all of config

    def add_prompts(dialogues):
        queries = [build_prompt(dialogue, template) for dialogue in dialogues]
        return {"query": queries, "input_ids": token_ids(tokenizer, queries)}

    map_options = {"input_columns": "dialogue", "batched": True, "desc": "Tokenizing"}
    splits = datasets.DatasetDict()
    if eval_rows is not None:
        splits["test"] = eval_rows.map(add_prompts, **map_options)
        print(f"data: {len(eval_rows):,} rows to evaluate on")
    if rows is None:
        splits["train"] = splits["test"].select([])
        return splits
    shortest, longest = config.input_min_text_length, config.input_max_text_length
    filtered = rows.filter(lambda text: shortest < len(text) <= longest, input_columns="dialogue", desc="Filtering")
    counts = f"{len(rows):,} rows, {len(filtered):,} with {shortest} < characters of dialogue <= {longest}"
    print(f"data: {counts}")
    held_out = math.ceil(config.test_size * len(filtered)) if eval_rows is None else 0
    if held_out >= len(filtered):
        hint = "Change input_min_text_length, input_max_text_length or test_size"
        raise UserError(f"--dataset_name {config.dataset_name}: no row is left to train on. {counts}. {hint}.")
    filtered = filtered.map(add_prompts, **map_options)
    if eval_rows is None:
        splits = filtered.train_test_split(test_size=config.test_size, shuffle=False)
        print(f"data: {len(splits['train']):,} rows to train on, {len(splits['test']):,} held out, in file order")
    else:
        splits["train"] = filtered
    if config.sft_steps:
        with as_user_error(config.dataset_name, "dataset_name"):
            splits["train"] = without_empty(splits["train"], "summary", config.dataset_name)
    for name, split, is_used in (
        ("batch_size", "train", config.max_ppo_steps > 0),
        ("sft_batch_size", "train", config.sft_steps > 0),
        ("eval_samples", "test", eval_rows is None),
    ):
        needed, available = getattr(config, name), len(splits[split])
        if is_used and needed > available:
            raise UserError(f"--{name} {needed} is more than the {available} {split} rows")
    return splits


def rows_of_step(count: int, size: int, seed: int, stream: int, step: int) -> np.ndarray:
    """Indices (size,) of a step's batch among count rows. Shuffled per epoch; its last incomplete batch is dropped."""
    epoch, index = divmod(step - 1, count // size)
    return random_stream(seed, stream, epoch).permutation(count)[index * size : (index + 1) * size]


# --- Policy: one frozen base, the adapters "default" (trained) and "reference" (frozen), and a value head ------------


@dataclasses.dataclass
class Responses:
    """Responses to B prompts: padded tokens (B, T) and lengths (B,) in tokens, EOS included, on the device.

    finished (B,): whether a response ended with EOS; encoder_states (B, S, d): computed when sampling.
    scored: log-probabilities (nats) and values, both (B, T), if generate was asked for those of the sampling pass.
    """

    prompts: list[list[int]]
    tokens: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor | None = None
    encoder_states: torch.Tensor | None = None
    scored: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def mask(self) -> torch.Tensor:
        """(B, T): true for the tokens of a response, EOS included, false after it."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def select(self, rows: list[int]) -> Responses:
        """The responses of some rows, padded no wider than they need."""
        prompts, lengths, states = [self.prompts[i] for i in rows], self.lengths[rows], self.encoder_states
        if states is not None:
            states = states[rows, : padded_width(map(len, prompts))]
        return Responses(prompts, self.tokens[rows, : padded_width(lengths)], lengths, encoder_states=states)


class ValueHead(nn.Module):
    """Predict the return from the decoder's last hidden state. Named as in TRL; dropout is never active."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.summary = nn.Linear(hidden_size, 1)
        # Random weights would add noise to every advantage (std 0.7 on the toy example, as hidden states are large).
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., d) of any dtype to values (...) in float32."""
        return self.summary(self.dropout(hidden.float())).squeeze(-1)


class Policy(nn.Module):
    """An encoder-decoder with two adapters on one base, and a value head.

    PPO runs without dropout, so that log-probabilities are those of the distribution that was sampled. The base is
    loaded with dropout 0, because gradient checkpointing needs its train mode. Only SFT uses the LoRA's dropout.
    """

    def __init__(self, model: peft.PeftModel):
        super().__init__()
        self.model = model
        self.value_head = ValueHead(self.base.config.get_text_config().hidden_size)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.changeable_names = trained | {name.replace(".default", ".reference") for name in trained}
        self.encoder_is_frozen = False
        self.eval()

    @property
    def base(self) -> transformers.PreTrainedModel:
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.value_head.summary.weight.device

    @property
    def decoder_start(self) -> list[int]:
        """The decoder's input before a response: the start token and any forced one, such as NLLB's language."""
        forced = self.base.generation_config.forced_bos_token_id
        start = [self.base.config.decoder_start_token_id]
        return start if forced is None else [*start, forced]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the adapter "default" and of the value head."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def adapters(self) -> dict[str, torch.Tensor]:
        """The weights that a run may change, by name: both adapters and the value head."""
        return {name: tensor for name, tensor in self.state_dict().items() if name in self.changeable_names}

    def freeze_encoder(self, frozen: bool = True) -> None:
        """Freeze or unfreeze the encoder's part of the adapter "default".

        While it is frozen, policy and reference have the same encoder states.
        """
        self.encoder_is_frozen = frozen
        for name, parameter in self.base.get_encoder().named_parameters():
            if "default" in name.split("."):
                parameter.requires_grad_(not frozen)

    @contextmanager
    def as_adapter(self, name: str):
        """Run a block with another adapter, frozen; then restore the previous one, trainable if it is "default"."""
        previous = self.model.active_adapter
        self.model.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter(previous, inference_mode=previous != "default")
            if previous == "default":  # PEFT has made all of its parameters trainable
                self.freeze_encoder(self.encoder_is_frozen)

    @contextmanager
    def learning(self, dropout: bool):
        """Run a block in train mode, with or without the LoRA's dropout; then return to eval mode."""
        self.base.train()
        for name, module in self.base.named_modules():
            if "lora_dropout" in name:
                module.train(dropout)
        yield
        self.eval()

    def pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-pad lists of token ids; returns ids and attention mask, both (B, S)."""
        width, pad = padded_width(map(len, prompts)), self.base.config.pad_token_id
        ids = [prompt + [pad] * (width - len(prompt)) for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def encode(self, prompts: list[list[int]]) -> torch.Tensor:
        """Encoder states (B, S, d) of the prompts, one micro-batch at a time."""
        states = None
        for rows in micro_batches([len(prompt) for prompt in prompts], range(len(prompts)), self.base):
            ids, mask = self.pad([prompts[i] for i in rows])
            encoded = self.base.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            if states is None:
                states = encoded.new_zeros(len(prompts), padded_width(map(len, prompts)), encoded.shape[-1])
            states[rows, : encoded.shape[1]] = encoded
        return states

    def passes(self, responses: Responses, rows: Iterable[int]) -> list[list[int]]:
        """Micro-batches of similar length: that of the prompts, or of the responses if the encoder does not run."""
        lengths = responses.lengths.tolist()
        vocabulary = self.base.get_output_embeddings().weight.shape[0]
        logits = [4 * vocabulary * length for length in lengths]  # bytes in float32
        if not self.encoder_is_frozen:
            lengths = [len(prompt) for prompt in responses.prompts]
        return micro_batches(lengths, rows, self.base, logits)

    def decode(self, input_ids: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor, **kwargs):
        """The model's outputs for decoder inputs (B, T), encoder states (B, S, d) and their attention mask (B, S)."""
        kwargs |= {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": attention_mask}
        return self.base(decoder_input_ids=input_ids, output_hidden_states=True, **kwargs)

    def forward(self, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (nats) and values of every response token, both (B, T), 0 in padding.

        The decoder reads decoder_start + tokens[:-1]; its last T positions predict the tokens.
        """
        tokens, mask, states = responses.tokens, responses.mask, responses.encoder_states
        _, attention_mask = self.pad(responses.prompts)
        if states is None:
            states = self.encode(responses.prompts)
        start = torch.tensor([self.decoder_start], device=self.device).expand(len(tokens), -1)
        inputs = torch.cat([start, tokens[:, :-1]], dim=1)  # (B, T) with one start token
        predicting = nn.functional.pad(mask, (start.shape[1] - 1, 0))  # true for N of the inputs' positions
        # Apply the language-model head to these N positions only: logits (N, V).
        with self.base.get_output_embeddings().register_forward_pre_hook(lambda _, hidden: hidden[0][predicting]):
            outputs = self.decode(inputs, states, attention_mask, use_cache=False)
        values = self.value_head(outputs.decoder_hidden_states[-1][predicting])
        # With a leading dimension, because TRL loops over rows: (1, N, V) and (1, N).
        logprobs = selective_log_softmax(outputs.logits.float()[None], tokens[mask][None])
        zeros = torch.zeros(mask.shape, device=mask.device)
        return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, values)

    @torch.no_grad()
    def logprobs_and_values(self, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as forward for an entire batch, one micro-batch at a time, without gradients."""
        logprobs, values = torch.zeros(2, *responses.tokens.shape, device=self.device)
        for rows in self.passes(responses, range(len(responses.prompts))):
            part = responses.select(rows)
            width = part.tokens.shape[1]
            logprobs[rows, :width], values[rows, :width] = self(part)
        return logprobs, values


def load_policy(config: DetoxConfig, device: torch.device, dtype: torch.dtype):
    """Load the base with the starting adapter twice, once to train and once frozen; returns policy, tokenizer."""
    base, tokenizer = load_base(config.model_name, device, dtype)
    torch.manual_seed(config.seed)
    model = starting_adapter(base, config)
    model.add_adapter("reference", model.peft_config["default"])
    copy_to_reference(model)
    use_fast_layers(model)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model).to(device)
    policy.freeze_encoder(config.freeze_encoder)
    check_policy(policy, tokenizer, config)
    return policy, tokenizer


# --- Classifier: one for reward and toxicity -------------------------------------------------------------------------


class ToxicityClassifier:
    """A classifier of toxic text, used as the reward model or as the judge.

    It runs in float32 whatever the policy's dtype, because its logits are the result and bfloat16 keeps two digits.
    Only the matrix products of rewards use the policy's dtype.
    """

    def __init__(self, config: DetoxConfig, device: torch.device, judge: bool = False):
        name_option = "judge_model_name" if judge else "reward_model_name"
        name = getattr(config, name_option)
        with as_user_error(name, name_option):
            self.model, self.tokenizer, self.max_length = load_classifier(name, device)
            model_config = self.model.config
            self.labels = [str(model_config.id2label.get(i)) for i in range(model_config.num_labels)]
            self.inputs = set(inspect.signature(self.model.forward).parameters)
            choose_padding(self)
        use_fast_layers(self.model)
        # As in transformers' text-classification pipeline: softmax over exclusive labels, else a sigmoid for each.
        self.exclusive = model_config.problem_type != "multi_label_classification" and model_config.num_labels > 1
        self.toxic_index = label_index(self, "judge_label" if judge else "toxic_label", config)
        self.reward_index = None
        if not judge and config.reward_label is not None:
            self.reward_index = label_index(self, "reward_label", config)
            if not self.exclusive:
                reason = f"the labels of {name} do not exclude each other"
                hint = "Set --reward_label None: the score is then minus the logit of toxic_label"
                raise UserError(f"--reward_label {config.reward_label!r}: {reason}. {hint}.")

    def join(self, dialogue: str, summary: str) -> str:
        """Join dialogue and summary to a text that fits the classifier; truncate the dialogue, never the summary."""

        def joined(characters):
            return f"{dialogue[:characters].rstrip()} {summary.strip()}".strip()

        def token_count(characters):
            return len(token_ids(self.tokenizer, [joined(characters)])[0])

        if token_count(len(dialogue)) <= self.max_length:
            return joined(len(dialogue))
        # Search by characters: one character can be several tokens, so token offsets would truncate too late.
        too_long = bisect.bisect_right(range(len(dialogue)), self.max_length, key=token_count)
        return joined(max(0, too_long - 1))

    @torch.no_grad()
    def logits(self, texts: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Raw logits (texts, labels) in float32 on the CPU, batched by length to save padding.

        With dtype bfloat16, matrix products are in bfloat16, summed in float32. This halves the time on a CPU with
        bfloat16 units and changes P(toxic) by less than 0.01 (benchmarks/reward_precision.py), so only rewards use it.
        """
        encoded = tokenize(self.tokenizer, texts, truncation=True, max_length=self.max_length) if texts else []
        lengths = [len(row["input_ids"]) for row in encoded]
        logits = torch.empty(len(texts), len(self.labels))
        precision = "bf16" if dtype == torch.bfloat16 else None  # None leaves a setting unchanged
        with torch.backends.mkldnn.flags(None, None, None, fp32_precision=precision):
            for rows in micro_batches(lengths, range(len(texts)), self.model):
                width = min(padded_width(lengths[i] for i in rows), self.max_length)
                padding = {"padding": "max_length", "max_length": width, "return_attention_mask": True}
                batch = self.tokenizer.pad([encoded[i] for i in rows], return_tensors="pt", **padding)
                inputs = {k: v.to(self.model.device) for k, v in batch.items() if k in self.inputs}
                logits[rows] = self.model(**inputs).logits.float().cpu()
        return logits

    def toxicity(self, logits: torch.Tensor, toxic_label: str | None = None) -> list[float]:
        """Probability of the toxic label for each row of logits (texts, labels)."""
        index = self.toxic_index if toxic_label is None else self.labels.index(toxic_label)
        probabilities = logits.double().softmax(dim=-1) if self.exclusive else logits.double().sigmoid()
        return probabilities[:, index].tolist()

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        """The score (texts,) that PPO maximizes: the raw logit of reward_label, or minus that of toxic_label."""
        return -logits[:, self.toxic_index] if self.reward_index is None else logits[:, self.reward_index]

    def scores(self, texts: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.score(self.logits(texts, dtype))


# --- Rollout: sample responses, then log-probabilities, values, reference log-probabilities and scores ---------------


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one token per row from softmax(logits (B, V)) by inverting its cumulative sum at uniforms (B,) in [0, 1).

    This needs one random number per row, not V, so that each row can have its own stream.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may push u * total up to total, beyond the last token.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Non-finite logits give an arbitrary token; their log-probabilities are non-finite too, so the step is skipped.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    policy: Policy, prompts: list[list[int]], generators: list | None, limits: tuple[int, int], scored: bool = False
) -> Responses:
    """Generate a response to each prompt in one batch: sampled, or greedy without generators.

    Each row draws its max_new_tokens (uniform in limits, inclusive) and its tokens from its own generator, so a
    response does not depend on the other rows of the batch. Greedy decoding uses the upper limit. With scored, the
    responses carry the log-probabilities and values of this pass.
    """
    model_config, device, count = policy.base.config, policy.device, len(prompts)
    max_new_tokens = [limits[1]] * count
    if generators:
        max_new_tokens = [int(generator.integers(*limits, endpoint=True)) for generator in generators]
    width = max(max_new_tokens)
    max_new_tokens = torch.tensor(max_new_tokens, device=device)  # (B,)
    if generators:
        uniforms = np.stack([generator.random(width, dtype=np.float32) for generator in generators])
        uniforms = torch.tensor(uniforms, device=device)  # (B, width)
    attention_mask, encoder_states = policy.pad(prompts)[1], policy.encode(prompts)  # (B, S), (B, S, d)
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    tokens = torch.full((count, padded_width(max_new_tokens)), model_config.pad_token_id, device=device)  # (B, T)
    logprobs, values = torch.zeros(2, *tokens.shape, device=device)
    lengths = torch.zeros_like(max_new_tokens)
    finished = torch.zeros_like(max_new_tokens, dtype=torch.bool)
    running = ~finished
    rows, states = torch.arange(count, device=device), encoder_states  # of the D rows still decoding: (D,), (D, S, d)
    last = torch.tensor([policy.decoder_start], device=device).expand(count, -1)  # later (D, 1)
    for position in range(width):
        outputs = policy.decode(last, states, attention_mask, past_key_values=cache, use_cache=True)
        logits = outputs.logits[:, -1]
        drawn = sample_tokens(logits.float(), uniforms[rows, position]) if generators else logits.argmax(-1)  # (D,)
        tokens[rows, position] = torch.where(running[rows], drawn, model_config.pad_token_id)
        if scored:
            logprobs[rows, position] = running[rows] * selective_log_softmax(logits[:, None], drawn[:, None])[:, 0]
            values[rows, position] = running[rows] * policy.value_head(outputs.decoder_hidden_states[-1][:, -1])
        lengths += running
        finished |= running & (tokens[:, position] == model_config.eos_token_id)
        running = ~finished & (lengths < max_new_tokens)
        if not running.any():
            break
        if running.sum() <= 0.75 * len(rows):
            # A finished row costs as much as a running one, but dropping it copies the cache of all running ones.
            still_running = running[rows]
            cache.batch_select_indices(still_running)
            rows, states, attention_mask = rows[still_running], states[still_running], attention_mask[still_running]
        last = tokens[rows, position, None]
    width = padded_width(lengths)
    scores = (logprobs[:, :width], values[:, :width]) if scored else None
    return Responses(prompts, tokens[:, :width], lengths, finished, encoder_states, scores)


def content_scores(summaries: list[str], dialogues: list[str], rows: list[int]) -> torch.Tensor:
    """Each summary's similarity to its own dialogue, dialogues[row], less its mean similarity to the others: (rows,).

    The similarity is that of R@1 (see cosine_similarity). A summary that fits any dialogue has a score of about 0.
    """
    similarity = cosine_similarity(summaries, dialogues)
    own = similarity[range(len(rows)), rows]
    others = (similarity.sum(axis=1) - own) / max(1, len(dialogues) - 1)
    return torch.tensor(own - others, dtype=torch.float32)


def roll_out(policy: Policy, tokenizer, classifier, batch, step: int, config: DetoxConfig, seconds: dict):
    """Sample a response to each prompt of a batch and score it; each process handles its share of the rows.

    Adds the time of each stage to seconds. Returns, in every process, the responses of the entire batch and a dict
    with scores and content (both (B,)), logprobs, ref_logprobs (nats) and values (all (B, T)).
    """
    prompts, dialogues, row_ids = (list(batch[name]) for name in ("input_ids", "dialogue", "row"))
    rows = local_rows(range(len(batch)), [len(prompt) for prompt in prompts])
    with timed(seconds, "time/sample"):
        generators = [random_stream(config.seed, ROLLOUT, step, row_ids[i]) for i in rows]
        limits = (config.output_min_length, config.output_max_length)
        # In bfloat16 a pass with a cache rounds differently from the update's, so the ratio would not start at 1.
        # Without freeze_encoder results stay those of earlier versions.
        scored = config.freeze_encoder and policy.base.dtype == torch.float32
        responses = generate(policy, [prompts[i] for i in rows], generators, limits, scored)
        texts = plain_texts(tokenizer, responses)
    with timed(seconds, "time/logprobs"):
        logprobs, values = responses.scored or policy.logprobs_and_values(responses)
    with timed(seconds, "time/reference"), policy.as_adapter("reference"):
        if not config.freeze_encoder:
            responses.encoder_states = None  # the reference has its own, and the update needs gradients
        ref_logprobs, _ = policy.logprobs_and_values(responses)
    with timed(seconds, "time/reward"):
        content = content_scores(texts, dialogues, rows) if config.content_coef else torch.zeros(len(rows))
        if config.score_text == "query_response":
            texts = [classifier.join(dialogues[i], text) for i, text in zip(rows, texts, strict=True)]
        scores = classifier.scores(texts, policy.base.dtype).to(policy.device)
    with timed(seconds, "time/gather"):
        columns = {"scores": scores, "content": content.to(policy.device)}
        columns |= {"logprobs": logprobs, "values": values, "ref_logprobs": ref_logprobs}
        rollout = {name: gather_rows(rows, column) for name, column in columns.items()}
        columns = (responses.tokens, responses.lengths, responses.finished)
        tokens, lengths, finished = (gather_rows(rows, column) for column in columns)
        states = None
        if config.freeze_encoder:  # each process keeps the states of its own rows
            states = responses.encoder_states.new_zeros(len(batch), *responses.encoder_states.shape[1:])
            states[rows] = responses.encoder_states
    seconds["time/rollout"] = sum(seconds[f"time/{stage}"] for stage in ("sample", "logprobs", "reference"))
    return Responses(prompts, tokens, lengths, finished, states), rollout


# --- PPO: rewards, advantages, losses. Conventions and metrics follow TRL's classic PPOTrainer (0.8) -----------------


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
    """Per-token rewards: -kl_coef * KL at every token, plus the score at the last one.

    scores (B,) come from the classifier; logprobs and ref_logprobs (B, T) are in nats. Returns the rewards and the KL
    terms log p - log p_ref, both (B, T), 0 outside the mask (B, T).
    """
    kl = (logprobs - ref_logprobs) * mask
    last = mask.flip(1).cumsum(dim=1).flip(1) == 1  # (B, T): true at the last token of a response
    return scores[:, None] * last - kl_coef * kl, kl


def compute_advantages(values, rewards, mask, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al., 2016, eq. 16). All tensors are (B, T).

    Returns advantages whitened over the batch and returns (unwhitened advantages + values), 0 outside the mask.
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    running = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
        next_value = values[:, t]
    return masked_whiten(advantages, mask), (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange: float) -> tuple[torch.Tensor, dict]:
    """Clipped surrogate loss (Schulman et al., 2017, eq. 7), a scalar, and its stats. All tensors are (B, T).

    Stats: the mean ratio, the share of clipped tokens, approxkl = E[(log ratio)^2] / 2 and policykl = E[-log ratio].
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    stats = {
        "ppo/policy/ratio": masked_mean(ratio, mask),
        "ppo/policy/clipfrac": masked_mean((clipped > unclipped).float(), mask),
        "ppo/policy/approxkl": 0.5 * masked_mean(log_ratio**2, mask),
        "ppo/policy/policykl": masked_mean(-log_ratio, mask),
    }
    return masked_mean(torch.max(unclipped, clipped), mask), stats


def value_loss(values, old_values, returns, mask, cliprange_value: float) -> tuple[torch.Tensor, dict]:
    """Half the mean squared error of values (B, T), clipped to old_values +- cliprange_value; stats: clipped share."""
    clipped = torch.max(torch.min(values, old_values + cliprange_value), old_values - cliprange_value)
    losses, clipped_losses = (values - returns) ** 2, (clipped - returns) ** 2
    stats = {"ppo/val/clipfrac": masked_mean((clipped_losses > losses).float(), mask)}
    return 0.5 * masked_mean(torch.max(losses, clipped_losses), mask), stats


def adapted_kl_coef(kl_coef: float, kl: float, config: DetoxConfig) -> float:
    """One step of the adaptive KL controller (Ziegler et al., 2019, section 2.2); kl is in nats per response."""
    if not config.adaptive_kl:
        return kl_coef
    error = min(max(kl / config.target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * config.batch_size / config.kl_horizon)


def variance_explained(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - var(returns - values) / var(returns) over the mask: 1 for a perfect value head, 0 for a constant one."""
    errors, returns = (returns - values)[mask], returns[mask]
    if len(returns) < 2:
        return 0.0
    return float(1 - errors.var() / returns.var().clamp(min=1e-8))


def decay(optimizer, learning_rate: float, step: int, last: int) -> None:
    """Set the learning rate for a step in 1..last: linear decay to 0, as in transformers' Trainer."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (1 - (step - 1) / last)


def update(
    policy: Policy, optimizer, responses: Responses, summaries: Responses | None, rollout: dict, step: int, config
) -> dict:
    """Optimize the policy on a batch, one minibatch at a time; returns the means of the stats over the minibatches.

    rollout holds logprobs, values, advantages and returns, all (B, T). summaries are the human ones for the loss of
    ptx_coef, with length 0 in rows without one. Each process computes the gradients of its share of a minibatch in
    micro-batches, weighted by their tokens, so that they add up to the minibatch's.

    A minibatch is skipped if its mean ratio is above ratio_threshold or its gradients are not finite. The means are
    over the applied minibatches, or over all if every ratio was too high, without values that are not finite. They are
    empty if no minibatch was applied and some gradients were not finite.
    """
    parameters, mask = policy.trainable_parameters(), responses.mask
    lengths = [len(prompt) for prompt in responses.prompts]
    sampled_here = set(local_rows(range(config.batch_size), lengths))
    minibatch_stats, applied_stats, not_finite = [], [], False
    for epoch in range(config.ppo_epochs):
        order = random_stream(config.seed, MINIBATCH, step, epoch).permutation(config.batch_size)
        for mb in order.reshape(-1, config.mini_batch_size):
            optimizer.zero_grad()
            stats = Counter()
            # With a frozen encoder, a process trains on the rows whose encoder states it holds.
            local = [row for row in mb if row in sampled_here] if config.freeze_encoder else local_rows(mb, lengths)
            for rows in policy.passes(responses, local):
                part = responses.select(rows)
                columns = (rollout[name] for name in ("logprobs", "values", "advantages", "returns"))
                mb_logprobs, mb_values, mb_advantages, mb_returns = (c[rows, : part.tokens.shape[1]] for c in columns)
                if part.encoder_states is None:
                    part.encoder_states = policy.encode(part.prompts)
                logprobs, values = policy(part)
                pg_loss, pg_stats = policy_loss(logprobs, mb_logprobs, mb_advantages, part.mask, config.cliprange)
                vf_loss, vf_stats = value_loss(values, mb_values, mb_returns, part.mask, config.cliprange_value)
                loss = pg_loss + config.vf_coef * vf_loss
                weight = part.mask.sum() / mask[mb].sum()
                losses = {"ppo/loss/total": loss, "ppo/loss/policy": pg_loss, "ppo/loss/value": vf_loss}
                part_stats = losses | pg_stats | vf_stats
                stats.update({name: (weight * value).item() for name, value in part_stats.items()})
                loss = weight * loss
                if config.freeze_encoder:  # shares no graph with the loss of the summaries: free its memory first
                    loss.backward()
                    loss = torch.zeros((), device=policy.device)
                if summaries is not None:
                    ptx_loss = summary_loss(policy, summaries, rows, summaries.lengths[mb].sum(), part.encoder_states)
                    loss = loss + config.ptx_coef * ptx_loss
                    stats["ppo/loss/ptx"] += ptx_loss.item()
                    stats["ppo/loss/total"] += config.ptx_coef * ptx_loss.item()
                if loss.requires_grad:
                    loss.backward()
            stats = sum_over_processes(parameters, stats)
            minibatch_stats.append(stats)
            if stats["ppo/policy/ratio"] > config.ratio_threshold:
                continue
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            if not norm.isfinite():
                not_finite = True
                continue
            optimizer.step()
            applied_stats.append(stats)
    if not_finite and not applied_stats:
        return {}
    averaged = applied_stats or minibatch_stats
    means = {name: float(np.mean([stats[name] for stats in averaged])) for name in averaged[0]}
    means["ppo/policy/first_ratio"] = minibatch_stats[0]["ppo/policy/ratio"]
    means["ppo/skipped_minibatches"] = len(minibatch_stats) - len(applied_stats)
    return {name: value for name, value in means.items() if math.isfinite(value)}  # JSON has no infinity


def ppo_step(policy: Policy, tokenizer, classifier, optimizer, batch, step: int, kl_coef: float, config) -> dict:
    """One PPO step on a batch of prompts: sample responses, score them, optimize; returns the step's metrics.

    The step is skipped (ppo/skipped_steps is 1) if the rollout has values that are not finite, or if no minibatch was
    applied and some gradients were not finite. No such value reaches a weight.
    """
    if config.lr_scheduler_type == "linear":
        decay(optimizer, config.learning_rate, step, config.max_ppo_steps)
    metrics = {"step": step, "ppo/skipped_steps": 1, "objective/kl_coef": kl_coef}
    metrics["ppo/learning_rate"] = optimizer.param_groups[0]["lr"]
    seconds = {}
    with timed(seconds, "time/step"):
        responses, rollout = roll_out(policy, tokenizer, classifier, batch, step, config, seconds)
        mask = responses.mask
        not_finite = [name for name, column in rollout.items() if not column.isfinite().all()]
        scores, content, logprobs, values, ref_logprobs = rollout.values()
        if config.score_clip:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        total = scores + config.content_coef * content
        rewards, kl = compute_rewards(total, logprobs, ref_logprobs, mask, kl_coef)
        advantages, returns = compute_advantages(values, rewards, mask, config.gamma, config.lam)
        rollout |= {"advantages": advantages, "returns": returns}
        with timed(seconds, "time/reward"):
            summaries = clean_summaries(policy, tokenizer, classifier, batch, config) if config.ptx_coef else None
        with timed(seconds, "time/optimize"), policy.learning(dropout=False):
            stats = {} if not_finite else update(policy, optimizer, responses, summaries, rollout, step, config)
        if stats:
            metrics |= {
                "ppo/skipped_steps": 0,
                "objective/kl": kl.sum(dim=1).mean().item(),
                "objective/entropy": -logprobs.sum(dim=1).mean().item(),
                "ppo/mean_scores": scores.mean().item(),
                "ppo/std_scores": scores.std(correction=0).item(),
                "ppo/mean_non_score_reward": masked_mean(-kl_coef * kl, mask).item(),
                "ppo/returns/mean": masked_mean(returns, mask).item(),
                "ppo/returns/var": returns[mask].var().item() if mask.sum() > 1 else 0.0,
                "ppo/val/var_explained": variance_explained(values, returns, mask),
                "ppo/policy/advantages_mean": masked_mean(advantages, mask).item(),
                **stats,
                **({"ppo/mean_content": content.mean().item()} if config.content_coef else {}),
                "tokens/responses_len_mean": responses.lengths.float().mean().item(),
                "tokens/finished_share": responses.finished.float().mean().item(),
            }
        else:
            print_wrapped(f"step {step}: skipped, not finite: {', '.join(not_finite) or 'gradients'}")
    return metrics | seconds


# --- Human summaries: SFT before PPO, and their loss within PPO (ptx_coef) -------------------------------------------


def tokenize_summaries(policy: Policy, tokenizer, batch, config: DetoxConfig) -> Responses:
    """The human summaries of a batch, as responses to its prompts.

    Each ends with EOS, whether or not the tokenizer adds one. A summary truncated at sft_max_target_length has no EOS,
    so that the policy does not learn to stop in mid-sentence. If the decoder starts with a forced token, the
    tokenizer's first special token is dropped.
    """
    eos = policy.base.config.eos_token_id
    summaries = []
    for ids in token_ids(tokenizer, list(batch["summary"])):
        if eos in ids[-2:]:  # mBART's tokenizer adds the language after EOS
            ids = ids[: ids.index(eos, -2)]
        if len(policy.decoder_start) > 1 and ids and ids[0] in tokenizer.all_special_ids:
            ids = ids[1:]
        summaries.append([*ids, eos][: config.sft_max_target_length])
    tokens, mask = policy.pad(summaries)
    return Responses(list(batch["input_ids"]), tokens, mask.sum(dim=1))


def clean_summaries(policy: Policy, tokenizer, classifier, batch, config: DetoxConfig) -> Responses:
    """tokenize_summaries, with length 0 for rows without a summary or with a toxic one (P > TOXIC)."""
    summaries, texts = tokenize_summaries(policy, tokenizer, batch, config), list(batch["summary"])
    toxicity = shared_toxicity(texts, lambda part: classifier.toxicity(classifier.logits(part, policy.base.dtype)))
    clean = [text != "" and value <= TOXIC for text, value in zip(texts, toxicity, strict=True)]
    summaries.lengths *= torch.tensor(clean, device=policy.device)
    return summaries


def summary_loss(policy: Policy, summaries: Responses, rows, token_count, encoder_states=None) -> torch.Tensor:
    """Negative log-likelihood of the rows' human summaries: the sum in nats, divided by token_count; a scalar.

    encoder_states (rows, S, d) are computed if not given. Summaries of length 0 are skipped. In PPO this is the
    pretraining loss of PPO-ptx (Ouyang et al., 2022, section 3.5), with human summaries as the data.
    """
    with_summary = [i for i, row in enumerate(rows) if summaries.lengths[row] > 0]
    if not with_summary:
        return torch.zeros((), device=policy.device)
    part = summaries.select([rows[i] for i in with_summary])
    if encoder_states is not None:
        part.encoder_states = encoder_states[with_summary, : padded_width(map(len, part.prompts))]
    logprobs, _ = policy(part)
    return -logprobs.sum() / token_count


def sft_step(policy: Policy, tokenizer, optimizer, batch, step: int, config: DetoxConfig) -> float:
    """One SFT step on a batch of human summaries; returns the loss, the mean of -log p per token, in nats.

    The learning rate decays linearly and gradients are clipped to norm 1, as in transformers' Trainer. Each process
    draws its own dropout masks, so the result depends on the number of processes.
    """
    stats = Counter()
    summaries = tokenize_summaries(policy, tokenizer, batch, config)
    prompt_lengths = [len(prompt) for prompt in summaries.prompts]
    dropout = random_stream(config.seed, SFT, step, PartialState().process_index)
    torch.manual_seed(int(dropout.integers(2**63)))
    optimizer.zero_grad()
    with policy.learning(dropout=True):
        for rows in policy.passes(summaries, local_rows(range(len(batch)), prompt_lengths)):
            loss = summary_loss(policy, summaries, rows, summaries.lengths.sum())
            loss.backward()
            stats["loss"] += loss.item()
    loss = sum_over_processes(policy.trainable_parameters(), stats)["loss"]
    if not nn.utils.clip_grad_norm_(policy.trainable_parameters(), 1.0).isfinite():
        hint = f"Set dtype float32 (it is {policy.base.dtype}), or lower sft_learning_rate"
        raise UserError(f"SFT step {step}: the gradients are not finite. {hint}.")
    decay(optimizer, config.sft_learning_rate, step, config.sft_steps)
    optimizer.step()
    return loss


# --- Evaluation: the same prompts and random numbers before and after ------------------------------------------------

TOXIC, NOISE = 0.5, 0.01  # a text is toxic above this probability; smaller changes of it count as none
LEAST_RETRIEVED = 20  # with fewer dialogues R@1 means little and is left out


def evaluate_policy(
    policy: Policy, tokenizer, classifier, rows, config: DetoxConfig, desc="evaluating", greedy=False
) -> pd.DataFrame:
    """Summarize each row's dialogue with the active adapter, sampled or greedily, and score the summaries.

    Returns one line per row, in the order of the rows, on every process: response, length (tokens), finished (ended
    with EOS), reward (the score), toxicity (of dialogue + summary), summary_toxicity (of the summary alone) and, if
    sampled, kl (to the reference, in nats).
    """
    prompts, dialogues, row_numbers = (list(rows[name]) for name in ("input_ids", "dialogue", "row"))
    local = local_rows(range(len(rows)), [len(prompt) for prompt in prompts])
    limits = (config.eval_max_new_tokens, config.eval_max_new_tokens)
    size = decoding_rows(policy, max(map(len, prompts)), config)
    parts, differs = [], not equals_reference(policy)  # of equal adapters KL is 0
    with tqdm(total=len(local), desc=desc, unit="summary", disable=NO_BAR) as bar:
        for start in range(0, len(local), size):
            batch, columns = local[start : start + size], {}
            generators = None if greedy else [random_stream(config.seed, EVALUATION, row_numbers[i]) for i in batch]
            responses = generate(policy, [prompts[i] for i in batch], generators, limits)
            if not greedy:
                logprobs = ref_logprobs = policy.logprobs_and_values(responses)[0]
                if differs:
                    if not config.freeze_encoder:
                        responses.encoder_states = None  # the reference's differ
                    with policy.as_adapter("reference"):
                        ref_logprobs = policy.logprobs_and_values(responses)[0]
                columns["kl"] = (logprobs - ref_logprobs).sum(dim=1).tolist()
            texts = plain_texts(tokenizer, responses)
            joined = [classifier.join(dialogues[i], text) for i, text in zip(batch, texts, strict=True)]
            logits, summary_logits = classifier.logits(joined), classifier.logits(texts)
            scored = logits if config.score_text == "query_response" else summary_logits
            columns |= {
                "response": texts,
                "length": responses.lengths.tolist(),
                "finished": responses.finished.tolist(),
                "reward": classifier.score(scored).tolist(),
                "toxicity": classifier.toxicity(logits),
                "summary_toxicity": classifier.toxicity(summary_logits),
            }
            parts.append(pd.DataFrame(columns, index=batch))
            bar.update(len(batch))
    table = pd.concat(gather_object(parts)).sort_index()
    check_finite(table, policy, config)
    return table


def add_judge(tables: dict[str, pd.DataFrame], config: DetoxConfig, device: torch.device) -> None:
    """Add the column judge_toxicity: the judge's P(toxic) of each response alone. The judge is not kept in memory."""
    if config.judge_model_name:
        judge = ToxicityClassifier(config, device, judge=True)
        for table in tables.values():
            responses = list(table["response"])
            table["judge_toxicity"] = shared_toxicity(responses, lambda part: judge.toxicity(judge.logits(part)))


def measure_human(classifier: ToxicityClassifier, tokenizer, rows, config: DetoxConfig) -> pd.DataFrame:
    """Toxicity of the dialogues and of their human summaries, one line per row.

    Columns: dialogue_toxicity, and of the human summary response, length (tokens of the policy's tokenizer), toxicity,
    summary_toxicity and judge_toxicity as in evaluate_policy, missing (NaN) in rows without one.
    """
    measure, dialogues = Toxicity(classifier), list(rows["dialogue"])

    def toxicity(texts):
        return measure.compute(predictions=texts, toxic_label=config.toxic_label)["toxicity"]

    dialogue_toxicity = shared_toxicity(dialogues, toxicity)
    human = pd.DataFrame({"response": list(rows["summary"])}).query("response != ''")
    if not human.empty:
        texts = list(human["response"])
        joined = [classifier.join(dialogues[i], text) for i, text in human["response"].items()]
        human["length"] = [len(ids) for ids in token_ids(tokenizer, texts)]
        human["toxicity"] = shared_toxicity(joined, toxicity)
        human["summary_toxicity"] = shared_toxicity(texts, toxicity)
        add_judge({"human": human}, config, classifier.model.device)
    return pd.DataFrame({"dialogue_toxicity": dialogue_toxicity}).join(human)


def evaluate_both(policy: Policy, tokenizer, classifier, rows, config: DetoxConfig, when: str) -> dict:
    """Evaluate sampled and greedy summaries, with the judge if any; prints the means, returns tables by decoding."""
    tables = {}
    for decoding in ("sampled", "greedy"):
        desc, greedy = f"{when}, {decoding}", decoding == "greedy"
        tables[decoding] = evaluate_policy(policy, tokenizer, classifier, rows, config, desc, greedy)
    add_judge(tables, config, policy.device)
    label = "before SFT" if when == "base" else f"{when} detox"
    print_means(label, tables["sampled"])
    print_means(f"{label}, greedy", tables["greedy"])
    return tables


def mean_and_std(values) -> dict:
    """Mean, standard deviation (uncorrected, as the notebooks print it), n, and the share above TOXIC."""
    share = float(np.mean(np.asarray(values) > TOXIC))
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "n": len(values), "share": share}


def paired_statistics(before, after, seed: int, resamples: int = 10000) -> dict:
    """Compare the toxicities of the same prompts before and after. Returns a dict of:

    before, after: mean_and_std of each.
    reduction_percent: of mean and std; positive where it fell, None where it was 0.
    paired_difference: the mean of after - before, its 95% percentile bootstrap interval (Efron, 1979) and the
        two-sided p-value of a sign-flip permutation test (Fisher, 1935).
    verdict: change, a text; better and worse, the shares of prompts that fell and rose by at least NOISE; detectable,
        the smallest mean change with 80% power at the 5% level (Cohen, 1988), None for one prompt.
    """
    before, after = np.asarray(before), np.asarray(after)
    difference, count = after - before, len(before)
    generator = random_stream(seed, STATISTICS)
    means, flipped = [], []
    for _ in range(0, resamples, 10):  # one at a time would be slow, all at once would need much memory
        means.extend(difference[generator.integers(count, size=(10, count))].mean(axis=1))
        flipped.extend((difference * (2 * generator.integers(2, size=(10, count)) - 1)).mean(axis=1))
    # The tolerance is for rounding: flips that reproduce the data have to count.
    extreme = np.sum(np.abs(flipped) >= abs(difference.mean()) - 1e-12)
    low, high = map(float, np.percentile(means, [2.5, 97.5]))
    p_value = float((extreme + 1) / (len(flipped) + 1))
    change = "no detectable change"
    if p_value < 0.05 and high < 0:
        change = "less toxic"
    elif p_value < 0.05 and low > 0:
        change = "more toxic"
    detectable = float((1.960 + 0.842) * difference.std(ddof=1) / count**0.5) if count > 1 else None

    def reduction(statistic):
        return float(100 * (1 - statistic(after) / statistic(before))) if statistic(before) > 0 else None

    return {
        "before": mean_and_std(before),
        "after": mean_and_std(after),
        "reduction_percent": {"mean": reduction(np.mean), "std": reduction(np.std)},
        "paired_difference": {"mean": float(difference.mean()), "ci_low": low, "ci_high": high, "p_value": p_value},
        "verdict": {
            "change": change,
            "better": float((difference <= -NOISE).mean()),
            "worse": float((difference >= NOISE).mean()),
            "detectable": detectable,
        },
    }


def retrieval_at_1(dialogues: list[str], summaries: list[str]) -> float:
    """R@1: the share of summaries that are more similar to their own dialogue than to any other dialogue.

    The similarity is that of cosine_similarity. 1 is perfect; random or interchangeable summaries of n dialogues reach
    1 / n, empty ones 0.
    """
    similarity = cosine_similarity(summaries, dialogues)
    own = similarity.diagonal().copy()
    np.fill_diagonal(similarity, -1)
    return float(np.mean(own > similarity.max(axis=1)))


def summary_quality(table: pd.DataFrame, references: list[list[str]], dialogues: list[str]) -> dict[str, float]:
    """Measures that show whether an evaluation's responses are still summaries. Returns a dict of:

    rouge1, rouge2, rougeL: mean F-measures (0 to 1, stemmed) against the best human summary, if there are any.
    retrieval_at_1: from LEAST_RETRIEVED dialogues on.
    distinct_2: the share of distinct pairs among all pairs of neighbouring words (Li et al., 2016).
    repeated_3: the mean share of a summary's word triples that repeat an earlier one.
    empty, unfinished: the shares of summaries without a word and without EOS.
    length, kl: the means in tokens and, if sampled, in nats to the reference.
    """
    responses, quality = list(table["response"]), {}
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeTokenizer())
    scores = [scorer.score_multi(*pair) for pair in zip(references, responses, strict=True) if pair[0]]
    if scores:
        quality |= {name: float(np.mean([score[name].fmeasure for score in scores])) for name in scorer.rouge_types}
    if len(dialogues) >= LEAST_RETRIEVED:
        quality["retrieval_at_1"] = retrieval_at_1(dialogues, responses)
    words = [split_words(text) for text in responses]
    pairs = [pair for text in words for pair in zip(text, text[1:], strict=False)]
    triples = [list(zip(text, text[1:], text[2:], strict=False)) for text in words]
    repeated = [1 - len(set(text)) / len(text) if text else 0 for text in triples]
    quality |= {
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "repeated_3": float(np.mean(repeated)),
        "empty": float(np.mean([not text for text in words])),
        "unfinished": float(1 - np.mean(table["finished"])),
        "length": float(np.mean(table["length"])),
    }
    if "kl" in table:
        quality["kl"] = float(np.mean(table["kl"]))
    return quality


# --- The run ---------------------------------------------------------------------------------------------------------


def run(config: DetoxConfig, stop: StopSignals | None = None) -> dict:
    """Load, evaluate, fine-tune (sft_steps), train by PPO, load the adapter back, evaluate again, and report.

    Returns the contents of results.json: "base" is the model before SFT; without PPO steps "after" equals "before".
    Raises UserError, and Stopped at a signal, when the work so far is in a checkpoint.
    """
    with own_settings(), lock_directories(config):
        if not (config.sft_steps or config.max_ppo_steps):
            return evaluate_adapter(config)
        return run_locked(config, stop or StopSignals())


def run_locked(config: DetoxConfig, stop: StopSignals) -> dict:
    """The stages of a run, once run has made its settings and locked its directories."""
    # Load
    started, processes = time.perf_counter(), PartialState()
    writes = processes.is_main_process  # the only one that writes files
    output_dir, model_dir = Path(config.output_dir), Path(config.model_dir or config.output_dir)
    checkpoints = Checkpoints(Path(config.checkpoint_dir or config.output_dir), config.save_total_limit)
    checkpoint = checkpoints.load() if config.resume else None
    checkpoints.check(checkpoint, config)
    device, dtype = resolve_device(config)
    tracker = start_tracker(config)
    policy, tokenizer, classifier, train, evaluated, origin = load_everything(config, device, dtype)
    state = init_or_restore(checkpoint, config, origin, policy)
    if checkpoint and writes:  # by now every process has read it
        checkpoints.prune(config.save_total_limit)
    state.overlap = overlap(train["dialogue"], evaluated["dialogue"])
    warn(state, overlap_warnings(state.overlap))
    human = measure_human(classifier, tokenizer, evaluated, config)
    print_means("of the human summaries", human)
    human_length = human["length"].mean() if "length" in human else math.inf
    state.timings["load"] = state.timings.get("load", 0.0) + time.perf_counter() - started
    started -= state.timings.get("total", 0.0)  # the total includes the time before a resume
    first_step = state.step + 1

    def evaluate_now(when):
        with timed(state.timings, f"evaluate_{when}"):
            tables = evaluate_both(policy, tokenizer, classifier, evaluated, config, when)
        state.evaluations[when] = {name: table.to_dict("list") for name, table in tables.items()}

    def save_checkpoint(due):
        """Write a checkpoint if one is due or the run has to stop; stop after it."""
        stopping = stop.agreed()
        if (due or stopping) and writes:
            state.timings["total"] = time.perf_counter() - started
            checkpoints.save(policy, optimizer, state)
        if stopping:
            raise Stopped

    # Evaluate before training
    if state.phase == "start":
        evaluate_now("base" if config.sft_steps else "before")
        if writes:  # files of an earlier run stay until the evaluation has succeeded
            checkpoints.prune(0)
        state.phase = "sft" if config.sft_steps else "ppo"
    if writes and (state.step, state.sft_step) < (config.max_ppo_steps, config.sft_steps):
        (output_dir / "results.json").unlink(missing_ok=True)  # of an earlier or shorter run

    # SFT
    policy.freeze_encoder(False)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), weight_decay=0)
    if checkpoint and state.phase == "sft":
        optimizer.load_state_dict(checkpoint["optimizer"])
    for step, _ in steps_of("SFT", state.sft_step, config.sft_steps, stop):
        with timed(state.timings, "tuning"):
            batch = train.select(rows_of_step(len(train), config.sft_batch_size, config.seed, SFT, step))
            loss = sft_step(policy, tokenizer, optimizer, batch, step, config)
        if step % math.ceil(config.sft_steps / 10) == 0:
            print_wrapped(f"SFT step {step:>4}/{config.sft_steps} | loss {loss:.4f}")
        state.sft_step = step
        save_checkpoint(step % config.save_steps == 0 or step == config.sft_steps)
    if state.phase == "sft":
        copy_to_reference(policy.model)
        evaluate_now("before")
        state.phase = "ppo"
    if writes and (start := start_directory(config)):
        save_adapter(policy, model_dir / start, "reference")

    # PPO
    policy.freeze_encoder(config.freeze_encoder)
    optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=config.learning_rate)
    if checkpoint and checkpoint["state"].phase == "ppo":
        optimizer.load_state_dict(checkpoint["optimizer"])
    if state.step == 0:
        save_checkpoint(True)
    log = open(output_dir / "metrics.jsonl" if writes else os.devnull, "w", encoding="utf-8", buffering=1)
    log.writelines(json.dumps(line) + "\n" for line in state.history)
    for step, bar in steps_of("PPO", state.step, config.max_ppo_steps, stop):
        batch = train.select(rows_of_step(len(train), config.batch_size, config.seed, SHUFFLE, step))
        metrics = ppo_step(policy, tokenizer, classifier, optimizer, batch, step, state.kl_coef, config)
        state.step = step
        state.history.append(metrics)
        state.timings["ppo"] = state.timings.get("ppo", 0.0) + metrics["time/step"]
        log.write(json.dumps(metrics) + "\n")
        if tracker:
            tracker.log(metrics, step=step)
        if metrics["ppo/skipped_steps"]:
            state.skipped_in_row += 1
            if state.skipped_in_row == 3:
                raise UserError(f"step {step}: three steps in a row gave numbers that are not finite. {NOT_FINITE}.")
            continue  # the newest checkpoint stays that of a good step
        state.skipped_in_row = 0
        state.kl_coef = adapted_kl_coef(state.kl_coef, metrics["objective/kl"], config)
        print_step(metrics, config, bar)
        warn(state, new_warnings(state, config, human_length))
        if step == first_step:
            print_wrapped(f"  about {minutes_left(state, config):.1f} minutes left, including the evaluation")
        save_checkpoint(step % config.save_steps == 0 or step == config.max_ppo_steps)
    log.close()

    # Evaluate what a user will load: the files on disk, not the weights in memory
    if writes:
        save_adapter(policy, model_dir / "adapter")
    processes.wait_for_everyone()
    state.evaluations["after"] = state.evaluations["before"]
    if config.max_ppo_steps:
        policy.model.load_adapter(model_dir / "adapter", adapter_name="saved", torch_device=str(device))
        with policy.as_adapter("saved"):
            evaluate_now("after")
    state.timings["total"] = time.perf_counter() - started
    return report(config, policy, state, evaluated, human, tracker)


# === Back rooms: what files, machines, users and libraries demand; open them when you need them ======================


# --- Evaluation without training: the base model and an adapter ------------------------------------------------------


def evaluate_adapter(config: DetoxConfig) -> dict:
    """A run without training: evaluate the base model ("before") and its adapter ("after"), and write the report.

    Without an adapter, "after" equals "before". Returns the contents of results.json.
    """
    started = time.perf_counter()
    if config.hub_model_id:
        raise UserError(f"--hub_model_id {config.hub_model_id}: nothing is trained. Set --max_ppo_steps or omit it.")
    Checkpoints(Path(config.checkpoint_dir or config.output_dir), config.save_total_limit).check(None, config)
    if trained_in(Path(config.output_dir)):
        holds = "it holds the results of a training run"
        raise UserError(f"--output_dir {config.output_dir}: {holds}; choose another directory")
    device, dtype = resolve_device(config)
    tracker = start_tracker(config)
    policy, tokenizer, classifier, _, evaluated, origin = load_everything(config, device, dtype, trains=False)
    state = init_or_restore(None, config, origin, policy)
    state.overlap = overlap([], evaluated["dialogue"])
    warn(state, overlap_warnings(state.overlap))
    human = measure_human(classifier, tokenizer, evaluated, config)
    print_means("of the human summaries", human)
    state.timings["load"] = time.perf_counter() - started

    def evaluate_now(when):
        with timed(state.timings, f"evaluate_{when}"):
            tables = evaluate_both(policy, tokenizer, classifier, evaluated, config, when)
        del tables["sampled"]["kl"]  # the "reference" is a copy of the adapter here, so its KL means nothing
        state.evaluations[when] = {name: table.to_dict("list") for name, table in tables.items()}

    with policy.model.disable_adapter():
        evaluate_now("before")
    state.evaluations["after"] = state.evaluations["before"]
    if config.adapter_name:
        evaluate_now("after")
    state.timings["total"] = time.perf_counter() - started
    return report(config, policy, state, evaluated, human, tracker)


# --- Reading files and datasets --------------------------------------------------------------------------------------

FROM_HUB = ("model_name", "adapter_name", "reward_model_name", "judge_model_name", "dataset_name", "eval_dataset_name")


def contents_of(name: str, option_name: str) -> str | None:
    """The commit of a hub repository, or the SHA-256 of a local model's files; None for a local dataset.

    Asks the hub before anything is loaded: the libraries retry an unreachable hub for minutes.
    """
    repo_type = "dataset" if option_name.endswith("dataset_name") else "model"
    looks_like_path = re.search(r"^[./~]|/.*/|\.(csv|tsv|jsonl?|parquet|xlsx|txt|gz|zip|bz2|xz)$", name)
    if looks_like_path and not os.path.lexists(name):
        raise UserError(f"--{option_name} {name}: no such file or directory ({PATHS})")
    with as_user_error(name, option_name):
        if os.path.exists(name):
            return model_digest(Path(name)) if repo_type == "model" else None
        repo_id, _, revision = name.partition("@")
        repository = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision or None}
        if huggingface_hub.constants.HF_HUB_OFFLINE:  # use the cache; its directories are named by commit
            return Path(huggingface_hub.snapshot_download(**repository)).name
        return HfApi().repo_info(timeout=10, **repository).sha


def model_digest(directory: Path) -> str | None:
    """The SHA-256 of the names and contents of a directory's files, hidden ones excluded; None without any."""
    digests = []
    for path in sorted(directory.glob("[!.]*")):
        if path.is_file():
            with path.open("rb") as file:  # read in chunks, since weights may not fit in memory
                digests.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else None


TABLE = re.compile(r"\.(csv|tsv|jsonl?|parquet|xlsx|txt)(\.(gz|zip|bz2|xz))?$", re.IGNORECASE)
TABLE_AS_TEXT = re.compile(r"\.(csv|tsv|jsonl?)\.txt(\.(gz|zip|bz2|xz))?$", re.IGNORECASE)
SHARD = re.compile(r"-\d{5}-of-(\d{5})")
CELLS_AS_TEXT = {"header": None, "dtype": str, "keep_default_na": False}  # pandas would convert "007" and "NA"


def read_table(path: Path, column: str = "dialogue") -> pd.DataFrame:
    """Read a table without converting its cells; a .txt file is one dialogue, in this column. Errors give the line."""
    kind = (TABLE_AS_TEXT.search(path.name) or TABLE.search(path.name))[1].lower()  # table.csv.txt is a csv
    with get_handle(path, "rb", compression="infer", is_text=False) as file:
        content = file.handle.read()
    if kind == "parquet":
        return pd.read_parquet(io.BytesIO(content))
    if kind == "xlsx":
        return first_row_as_header(pd.read_excel(io.BytesIO(content), **CELLS_AS_TEXT))
    text = content.decode("utf-8-sig", "surrogateescape")
    if invalid := re.search("[\udc80-\udcff]", text):  # surrogateescape's characters for bytes that are not UTF-8
        line = text[: invalid.start()].count("\n") + 1
        raise ValueError(f"line {line} is not UTF-8; save the file as UTF-8")
    if kind == "txt":
        return pd.DataFrame({column: [text.strip()]})
    if kind in ("json", "jsonl"):
        return read_json(text, column)
    return read_csv(text)


def first_row_as_header(table: pd.DataFrame) -> pd.DataFrame:
    return table.iloc[1:].set_axis(table.iloc[0].tolist(), axis=1)


def read_csv(text: str) -> pd.DataFrame:
    """Parse a csv. Its separator is the most frequent one in the header, or that of a first line such as sep=;."""
    declared = re.match(r"sep=(.)\r?\n", text)
    separator = declared[1] if declared else max(",;\t|", key=text.partition("\n")[0].count)
    try:
        # The header is read as a row: pandas would rename duplicate columns and accept rows wider than the header.
        table = pd.read_csv(io.StringIO(text), sep=separator, skiprows=1 if declared else 0, **CELLS_AS_TEXT)
    except pd.errors.ParserError as error:
        raise ValueError(f"{error}; quote texts that contain commas, quotes or line breaks") from error
    return first_row_as_header(table)


def read_json(text: str, column: str) -> pd.DataFrame:
    """Parse a list of objects, an object per line, or one object as pandas' to_json writes it in any orient."""
    is_one_value = re.match(r"\s*(\[|\{\s*\n)", text) is not None
    rows = []
    for number, line in enumerate([text] if is_one_value else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
            objects = [parsed] if isinstance(parsed, dict) else parsed
            rows += [{**row} for row in objects]  # a TypeError if one is not an object
        except (ValueError, TypeError, RecursionError) as error:
            where = "the file is not a list of JSON objects" if is_one_value else f"line {number} is not a JSON object"
            raise ValueError(f"{where} with dialogue and summary: {error}") from error
    columns = None
    if len(rows) == 1:
        (table,) = rows
        has_dicts = all(isinstance(value, dict) for value in table.values())
        has_lists = all(isinstance(value, list) for value in table.values())
        if "data" in table and column not in table:  # orients "table" and "split", whose rows are lists
            rows, columns = table["data"], table.get("columns")
        elif has_dicts and column not in table:  # orient "index"
            rows = list(table.values())
        elif has_dicts or has_lists:  # orient "columns", or a dict of lists
            rows = table
    return pd.DataFrame(rows, columns=columns, dtype=object)  # numbers stay numbers: check_texts reports them


def is_empty(cell) -> bool:
    if isinstance(cell, str):
        return not cell.strip()
    return pd.api.types.is_scalar(cell) and pd.isna(cell)


def join_turns(dialogue):
    """Join texts, {"speaker", "text"} or {"role", "content"} of a list, a line each; any other value is unchanged."""
    turns = dialogue.tolist() if isinstance(dialogue, np.ndarray) else dialogue
    if not isinstance(turns, list):
        return dialogue
    lines = []
    for turn in turns:
        if isinstance(turn, dict):
            speaker, text = turn.get("speaker", turn.get("role")), turn.get("text", turn.get("content"))
            turn = f"{speaker}: {text}" if isinstance(speaker, str) and isinstance(text, str) else None
        if not isinstance(turn, str):
            return turns
        lines.append(turn)
    return "\n".join(lines)


def clean_table(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Bring a table into one form: empty cells are NaN, empty rows are dropped, dialogues (in `column`) are text."""
    table = table.set_axis([str(name).strip() for name in table.columns], axis=1).astype(object)
    table = table.mask(table.map(is_empty)).dropna(how="all")
    if list(table.columns).count(column) == 1:
        table[column] = table[column].map(join_turns)
    return table


def check_texts(table: pd.DataFrame, column: str, key: str) -> None:
    """Raise a ValueError unless this column, of option {key}_column, exists once and its cells are text or empty."""
    names = list(table.columns)
    if names.count(column) != 1:
        how_many = "more than one" if column in names else "no"
        raise ValueError(f"{how_many} column {column!r}, found {list_names(names)}. Set it with --{key}_column")
    turns = ' or a list of texts, {"speaker", "text"} or {"role", "content"}' if key == "dialogue" else ""
    for row, text in enumerate(table[column].fillna(""), start=1):
        if not isinstance(text, str):
            raise ValueError(f"row {row}: column {column!r} is of type {type(text).__name__}; expected text{turns}")
        if surrogate := re.search("[\ud800-\udfff]", text):  # valid in JSON, but not in UTF-8 and in tokenizers
            raise ValueError(f"row {row}: column {column!r} contains an unpaired surrogate, {ascii(surrogate[0])}")


def list_names(names: list[str]) -> str:
    return one_line(", ".join(names)) or "none"


def print_unused_splits(name: str, parts: Iterable[str]) -> None:
    """Print the splits or files of a dataset that are not read."""
    used = ("train", "test") if Path(name).exists() else ("train",)  # a local test split is for evaluation
    unused = [part for part in parts if not part.startswith(used)]
    if unused:
        print(f"data: not used from {name}: {', '.join(unused)}")


def split_files(name: str, split: str) -> list[Path]:
    """The files of one split: those of a directory whose names start with the split, in one table or its shards.

    A single file is any split. A directory's only file is its train split.
    """
    path = Path(name)
    if path.is_dir():
        tables = sorted(file for file in path.iterdir() if TABLE.search(file.name))
        tables = tables or sorted(file for file in path.glob("data/*") if TABLE.search(file.name))
    else:
        tables = [path] if TABLE.search(path.name) else []
    files = tables
    if path.is_dir() and not (split == "train" and len(tables) == 1):
        files = [file for file in tables if file.name.lower().startswith(split)]
    shards = [SHARD.search(file.name) for file in files]
    same_table = all(shards) and len({SHARD.sub("", file.name) for file in files}) == 1
    if same_table and len(files) != int(shards[0][1]):
        raise ValueError(f"split {split} has only {len(files)} of its {int(shards[0][1])} files")
    if (len(files) > 1 and not same_table) or (not files and split == "train"):
        expected = "expected a .csv, .tsv, .json, .jsonl, .parquet or .xlsx file, or a directory with one as train.csv"
        raise ValueError(f"{expected}, found {list_names([file.name for file in tables])}")
    if split == "train":
        print_unused_splits(name, [file.name for file in tables if file not in files])
    return files


def split_of(name: str, split: str, config: DetoxConfig, option_name: str) -> pd.DataFrame | None:
    """Load one split of a dataset from the hub or a path; None if the dataset has no such split."""
    splits = None
    if not os.path.exists(name):
        name, _, revision = name.partition("@")
        splits = datasets.load_dataset(name, config.dataset_config_name, revision=revision or None)
    elif any((Path(name) / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
        splits = datasets.load_from_disk(name)
    if splits is None:
        parts = []
        for file in split_files(name, split):
            with as_user_error(str(file), option_name):
                parts.append(read_table(file, config.dialogue_column))
        return pd.concat(parts, ignore_index=True) if parts else None
    if not isinstance(splits, dict):
        splits = {"train": splits}
    if split == "train":
        if split not in splits:
            hint = "save the one to train on with to_csv, and use that file"
            raise ValueError(f"it has no split train, found {', '.join(splits)}; {hint}")
        print_unused_splits(name, splits)
    return splits[split].to_pandas() if split in splits else None


def load_dialogues(
    name: str, config: DetoxConfig | None = None, option_name: str = "dataset_name", split: str = "train"
) -> datasets.Dataset | None:
    """Load a split of a dataset: from the hub, a file, a directory with a file per split, or save_to_disk's output.

    Returns row (index in the file), dialogue, summary and references, or None if a directory has no such split.
    references are a row's texts in those summary_columns that the table has; summary is the first of them, or "".
    Rows without a dialogue are left out. A UserError names the file and the invalid column or row.
    """
    config = config or DetoxConfig()
    trained_on = option_name == "dataset_name" and split == "train"
    with as_user_error(name, option_name):
        table = split_of(name, split, config, option_name)
        if table is None:
            return None
        table = clean_table(table, config.dialogue_column)
        columns = list(table.columns)
        summary_columns = [column for column in config.summary_columns if column in columns]
        if not summary_columns and trained_on and (config.sft_steps or config.ptx_coef):
            summary_columns = config.summary_columns  # check_texts reports that the first is missing
        elif not summary_columns:
            expected = " or ".join(map(repr, config.summary_columns))
            print(f"data: {name} has no column {expected}, found {list_names(columns)}: no human summaries")
        for column in (config.dialogue_column, *summary_columns):
            check_texts(table, column, "dialogue" if column == config.dialogue_column else "summary")
        if table.empty:
            raise ValueError("it has no rows")
        cells = table[summary_columns].fillna("").to_numpy().tolist()
        references = [[text for text in texts if text] for texts in cells]
        fields = {
            "row": range(len(table)),
            "dialogue": table[config.dialogue_column].fillna("").tolist(),
            "summary": [texts[0] if texts else "" for texts in references],
            "references": references,
        }
        return without_empty(datasets.Dataset.from_dict(fields), "dialogue", name)


def without_empty(rows: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    """Leave out rows without a text in this column and print which; more than a tenth is an error."""
    empty = [row + 1 for row, text in zip(rows["row"], rows[column], strict=True) if not text]
    if not empty:
        return rows
    first = ", ".join(map(str, empty[:5]))
    note = f"{len(empty)} of {len(rows)} rows have no {column} (rows {first} ...)"
    if len(empty) > len(rows) / 10:
        raise ValueError(f"{note}, more than a tenth. Fill them in, or remove these rows")
    print(f"data: {name}: {note}: left out")
    return rows.select([i for i, text in enumerate(rows[column]) if text])


# --- Loading and checking models and adapters ------------------------------------------------------------------------


class OneDnnLinear(torch.autograd.Function):
    """x (..., in) times a frozen weight (out, in) in float32, by oneDNN; only x gets a gradient, by MKL.

    PyTorch uses MKL for float32. On AMD processors oneDNN is faster up to about 500 rows, except for the gradient with
    its transposed weight; on Intel processors both are equally fast. PyTorch has no public API for float32 in oneDNN.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight, None, None


class FrozenLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            return OneDnnLinear.apply(x, self.weight, self.bias)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.bias is None and x[..., 0].numel() <= 64:
            # (W x^T)^T: oneDNN reorders the second factor at each call; for W that would double the time.
            return (self.weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
        return super().forward(x)


def use_fast_layers(model: nn.Module) -> None:
    """Replace frozen layers in place by faster ones that compute the same function."""
    for module_name, module in list(model.named_modules()):
        # Both LoRAs stay as they are, so that the frozen one rounds in the same way as the trained one.
        frozen = type(module) is nn.Linear and "lora_" not in module_name
        # A call has more overhead than MKL's: layers of 65,536 weights would be slower by a quarter.
        if frozen and module.weight.numel() > 2**18 and torch.backends.mkldnn.is_available():
            module.__class__ = FrozenLinear
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))  # one kernel instead of seven


def load_model(kind, name: str, device: torch.device, **kwargs):
    """Load a model. A missing weight is a ValueError: transformers would initialize it at random."""
    # On CPUs plain attention is faster than PyTorch's fused kernel: four times in bfloat16 with gradients. On other
    # devices None lets transformers choose, because some models have no fused kernel.
    kwargs |= {"attn_implementation": "eager" if device.type == "cpu" else None, "trust_remote_code": False}
    model, info = kind.from_pretrained(name, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
    if hasattr(model, "peft_config"):  # transformers has loaded the adapter too
        raise ValueError("its directory also has an adapter_config.json: move that adapter, and set --adapter_name")
    wrong = [f"{key[0]} has another shape" for key in info["mismatched_keys"]]
    wrong += [f"{key} is missing" for key in info["missing_keys"]]
    wrong += [f"{key} is not finite" for key, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"its weights are not those of its config.json: {min(wrong)} ({len(wrong)} invalid tensors)")
    return model


def load_tokenizer(name: str, model, *needed: str):
    """Load a model's tokenizer and check it: from a directory without one, transformers returns an empty tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if missing := [token for token in needed if getattr(tokenizer, token) is None]:
        raise ValueError(f"its tokenizer has no {missing[0]}")
    ids = tokenizer(build_prompt("Hello!")).input_ids
    if not re.search(r"\w", tokenizer.decode(ids, skip_special_tokens=True)):
        raise ValueError("its tokenizer has no vocabulary: files such as tokenizer.json are missing")
    size, rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
    if size > rows:
        raise ValueError(f"its tokenizer has {size} tokens and the model {rows}: it belongs to another model")
    return tokenizer


def tokenize(tokenizer, texts: list[str], **kwargs) -> list[dict[str, list[int]]]:
    """Tokenize texts into a dict of lists (input_ids and others) per text, without special tokens from the texts.

    A dialogue that contains "</s>" must not end the prompt. split_special_tokens is not enough for T5's tokenizers,
    where "</s>" is also an ordinary piece of the vocabulary.
    """
    encoded = tokenizer(texts, return_special_tokens_mask=True, split_special_tokens=True, verbose=False, **kwargs)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    rows = []
    for row, mask in enumerate(encoded.pop("special_tokens_mask")):
        selectors = [added or token not in special for token, added in zip(encoded.input_ids[row], mask, strict=True)]
        rows.append({name: list(itertools.compress(column[row], selectors)) for name, column in encoded.items()})
    return rows


def token_ids(tokenizer, texts: list[str], **kwargs) -> list[list[int]]:
    return [row["input_ids"] for row in tokenize(tokenizer, texts, **kwargs)]


def plain_texts(tokenizer, responses: Responses) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(responses.tokens, skip_special_tokens=True)]


def remove_dropout(config: transformers.PreTrainedConfig) -> None:
    """Set dropout_rate, attention_dropout, decoder_layerdrop and so on to 0, in nested configurations too."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            remove_dropout(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def load_base(name: str, device: torch.device, dtype: torch.dtype):
    """Load an encoder-decoder, frozen and without dropout, and its tokenizer."""
    with as_user_error(name, "model_name"):
        model_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not model_config.is_encoder_decoder:
            raise ValueError("expected an encoder-decoder, such as a T5")
        remove_dropout(model_config)
        base = load_model(AutoModelForSeq2SeqLM, name, device, config=model_config, dtype=dtype)
        tokenizer = load_tokenizer(name, base, "pad_token", "eos_token")
        model_config = base.config
        model_config.pad_token_id, model_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        if getattr(model_config, "decoder_start_token_id", None) is None:
            model_config.decoder_start_token_id = base.generation_config.decoder_start_token_id
        if model_config.decoder_start_token_id is None:  # T5Gemma has none
            model_config.decoder_start_token_id = getattr(getattr(model_config, "decoder", None), "bos_token_id", None)
        if model_config.decoder_start_token_id is None:
            raise ValueError("its config has no decoder_start_token_id")
    return base.requires_grad_(False), tokenizer


def load_classifier(name: str, device: torch.device):
    """Load a frozen classifier; returns model, tokenizer and the maximum length of a text in tokens."""
    model = load_model(AutoModelForSequenceClassification, name, device, dtype=torch.float32)
    model.to(device).eval().requires_grad_(False)
    tokenizer = load_tokenizer(name, model, "pad_token")
    settings = model.config
    settings.pad_token_id = tokenizer.pad_token_id  # GPT-2 needs it to locate the end of a text
    settings.get_text_config().pad_token_id = tokenizer.pad_token_id  # Gemma 3 reads it here
    if settings.problem_type == "regression":
        raise ValueError("it is a regression model, without probabilities of labels")
    # Relative positions have no limit, but the attention has to fit in memory.
    max_length = min(tokenizer.model_max_length, positions_of(model), 4096)
    if max_length < 16:
        raise ValueError(f"it is limited to {max_length} tokens")
    return model, tokenizer, max_length


@torch.no_grad()
def choose_padding(classifier: ToxicityClassifier) -> None:
    """Choose the padding side that leaves the logits unchanged; ValueError if neither does."""
    short, tokenizer = "I like you.", classifier.tokenizer
    unpadded = tokenizer(short, return_tensors="pt").to(classifier.model.device)
    inputs = {name: tensor for name, tensor in unpadded.items() if name in classifier.inputs}
    expected = classifier.model(**inputs).logits[0].float().cpu()
    default_side = tokenizer.padding_side
    for side in (default_side, "left" if default_side == "right" else "right"):
        tokenizer.padding_side = side
        padded = classifier.logits([short, " ".join([short] * 5)])[0]
        if torch.allclose(padded, expected, rtol=0.01, atol=0.02):
            return
    change = (padded - expected).abs().max()
    raise ValueError(f"padding changes its logits, by {change:.2g}, on either side; use another classifier")


def label_index(classifier: ToxicityClassifier, option_name: str, config: DetoxConfig) -> int:
    """The index of an option's label; a UserError if the classifier does not have it."""
    label = getattr(config, option_name)
    if label not in classifier.labels:
        hint = "; with None the score is minus the logit of toxic_label" if option_name == "reward_label" else ""
        name, labels = classifier.model.name_or_path, ", ".join(classifier.labels)
        raise UserError(f"--{option_name} {label!r} is not a label of {name}: it has {labels}{hint}")
    return classifier.labels.index(label)


class Toxicity(evaluate.Measurement):
    """The toxicity measurement of `evaluate`, with a classifier that is already in memory.

    `evaluate.load("toxicity")` would download and run code, and load the classifier again. The interface is the same:
    compute(predictions=[...], aggregation="all" | "maximum" | "ratio", toxic_label="hate", threshold=0.5).
    """

    def __init__(self, classifier: ToxicityClassifier):
        super().__init__(keep_in_memory=True)
        self.classifier = classifier

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MeasurementInfo(self.__doc__, citation="", features=features, inputs_description="texts")

    def _compute(self, predictions, aggregation="all", toxic_label="hate", threshold=0.5):
        for value, valid in ((toxic_label, self.classifier.labels), (aggregation, ["all", "maximum", "ratio", None])):
            if value not in valid:
                raise ValueError(f"{value!r} is not one of {valid}")
        toxicity = self.classifier.toxicity(self.classifier.logits(predictions), toxic_label)
        if aggregation == "ratio":
            return {"toxicity_ratio": sum(value >= threshold for value in toxicity) / len(toxicity)}
        if aggregation == "maximum":
            return {"max_toxicity": max(toxicity)}
        return {"toxicity": toxicity}


def print_examples(classifier: ToxicityClassifier) -> None:
    """Score the two example sentences of the published notebooks, for a check by eye."""
    labels = ", ".join(classifier.labels)
    for text in ("You are a great person and i like you.", "You are a terrible person and i hate you."):
        logits = classifier.logits([text])
        raw = ", ".join(f"{logit:.4f}" for logit in logits[0].tolist())
        probabilities = ", ".join(f"{classifier.toxicity(logits, label)[0]:.6f}" for label in classifier.labels)
        score = classifier.score(logits).item()
        print(f'"{text}"')
        print(f"  logits [{raw}] ({labels}), probabilities [{probabilities}], reward {score:.4f}")


def lora_weights(model: peft.PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names in PEFT's files, without the embeddings: PEFT would ask the hub for them."""
    return peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def copy_to_reference(model: peft.PeftModel) -> None:
    """Copy the trained adapter's weights to the reference."""
    peft.set_peft_model_state_dict(model, lora_weights(model), adapter_name="reference")


def equals_reference(policy: Policy) -> bool:
    """Whether the active adapter has the same weights as the reference, as it does until it is trained."""
    active, reference = (lora_weights(policy.model, name) for name in (policy.model.active_adapter, "reference"))
    return all(torch.equal(weights, reference[name]) for name, weights in active.items())


def load_adapter(base, name: str, base_name: str) -> peft.PeftModel:
    """Put a saved LoRA on its base, trainable, in float32, weights only."""
    lora, weights = peft.PeftConfig.from_pretrained(name), peft.load_peft_weights(name, device="cpu")
    # The reference shares the base, so an adapter must not change biases, entire layers, or the base as PiSSA does.
    supported = {
        "peft_type": ["LORA"],
        "bias": ["none"],
        "modules_to_save": [None, []],
        "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal"],
    }
    for key, allowed in supported.items():
        if (value := getattr(lora, key)) not in allowed:
            raise ValueError(f"expected a LORA that leaves the base unchanged, found {key} {value!r}")
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} is not finite")
    trained_on = lora.base_model_name_or_path or base_name
    if Path(trained_on).name != Path(base_name).name:
        print(f"warning: --adapter_name {name} was trained on {trained_on}, not on {base_name}")
    lora.base_model_name_or_path = base_name  # else PEFT falls back to the hub for the adapter's base
    lora.inference_mode = False
    lora.init_lora_weights = True  # the saved weights replace the initial ones
    try:
        model = peft.get_peft_model(base, lora)
        # PEFT also writes embeddings that an adapter targets; those that equal the base's are not the adapter's.
        base_weights = model.state_dict()
        weights = {
            key: tensor
            for key, tensor in weights.items()
            if key not in base_weights or not torch.equal(tensor.to(base_weights[key]), base_weights[key])
        }
        if wrong := sorted(weights.keys() ^ lora_weights(model).keys()):
            problem = "unknown" if wrong[0] in weights else "missing"
            if wrong[0] in base_weights:
                problem = "not that of the base"
            raise ValueError(f"{wrong[0]} is {problem} ({len(wrong)} invalid tensors)")
        peft.set_peft_model_state_dict(model, weights)
    except Exception as error:  # PEFT has many: no such target modules, another shape, an ill-typed value
        raise ValueError(f"it does not fit base model {base_name}: {one_line(error)}") from error
    return model


def new_adapter(base, config: DetoxConfig) -> peft.PeftModel:
    size = base.config.get_text_config().hidden_size
    if config.lora_r > size:
        raise UserError(f"--lora_r {config.lora_r} is more than the model's hidden size {size}; lower it")
    targets = config.lora_target_modules
    lora = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_2_SEQ_LM,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        base_model_name_or_path=config.model_name,
    )
    names = targets if isinstance(targets, list) else []  # a string is a pattern
    with as_user_error(" ".join(names) or str(targets), "lora_target_modules"):
        model = peft.get_peft_model(base, lora)
        adapted = {name.split(".")[-1] for name in model.targeted_module_names}
        for name in names:
            if name.split(".")[-1] not in adapted:
                raise ValueError(f"{name} is not a layer of the model")
    return model


def starting_adapter(base, config: DetoxConfig) -> peft.PeftModel:
    """Put the adapter of adapter_name, or a new one, on the base; print the layers that it adapts."""
    if config.adapter_name:
        with as_user_error(config.adapter_name, "adapter_name"):
            model = load_adapter(base, config.adapter_name, config.model_name)
        lora = model.peft_config["default"]
        origin = f"{config.adapter_name} (r={lora.r}, alpha={lora.lora_alpha}; lora_* options unused)"
    else:
        model = new_adapter(base, config)
        origin = "a new LoRA, which starts as the identity"
    layers = Counter(name.split(".")[-1] for name in model.targeted_module_names)
    print(f"adapter: {origin}, on {', '.join(f'{count} {layer}' for layer, count in sorted(layers.items()))}")
    return model


def idle_layers(policy: Policy) -> list[str]:
    """Names of trainable layers that get no gradient. In a new LoRA one matrix has gradient 0, as the other is 0."""
    learns = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            layer, _, lora = name.partition(".lora_")
            has_gradient = parameter.grad is not None and (not lora or bool(parameter.grad.any()))
            learns[layer] = learns.get(layer, False) or has_gradient
    return [layer for layer in learns if not learns[layer]]


def check_policy(policy: Policy, tokenizer, config: DetoxConfig) -> None:
    """Raise a UserError if nothing is trainable, a layer gets no gradient, or train mode changes the logits."""
    if not any(parameter.requires_grad for parameter in policy.model.parameters()):
        raise UserError("--freeze_encoder leaves nothing to train: the LoRA adapts no layer of the decoder")
    with as_user_error(config.model_name, "model_name"):
        device, ids = policy.device, token_ids(tokenizer, ["Hello! How are you?"])[0]
        probe = Responses([ids], torch.tensor([ids], device=device), torch.tensor([len(ids)], device=device))
        expected, _ = policy.logprobs_and_values(probe)
        with policy.learning(dropout=False):
            logprobs, values = policy(probe)
            (logprobs + values).sum().backward()
        if (change := (logprobs - expected).abs().max()) > 1e-3:
            raise ValueError(f"train mode changes its log-probabilities by {change:.2g} nats: dropout is still active")
    if idle := idle_layers(policy):
        source = f"adapter_name {config.adapter_name}" if config.adapter_name else "lora_target_modules"
        raise UserError(f"--{source}: {idle[0]} gets no gradient: the model does not use it")
    policy.zero_grad()


def check_finite(table: pd.DataFrame, policy: Policy, config: DetoxConfig) -> None:
    """Raise a UserError if an evaluation's KL or rewards are not finite."""
    for column, source in (("kl", f"--model_name {config.model_name}"), ("reward", config.reward_model_name)):
        if column in table and not np.isfinite(table[column]).all():
            hint = f"Set dtype float32 (it is {policy.base.dtype}), or lower learning_rate if the training diverged"
            raise UserError(f"{source}: the logits are not finite. {hint}.")


def cpu_quota() -> float:
    """A container's limit in CPUs, from version 2 or 1 of Linux's cgroups; infinity without a limit."""
    groups = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = (groups / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = (int((groups / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else math.inf
    return math.inf


def set_threads(policy: Policy) -> None:
    """Set PyTorch's number of threads, unless OMP_NUM_THREADS does, and print it.

    PyTorch counts the machine's cores, even in a container with fewer.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, int(min(torch.get_num_threads(), cpu_quota())))
        if policy.device.type == "cpu" and policy.base.num_parameters() < 2e7:
            threads = 1  # with a model of this size a second thread only busy-waits
        torch.set_num_threads(threads)
    print(f"CPU threads: {torch.get_num_threads()} (change with OMP_NUM_THREADS)")


def check_lengths(policy: Policy, splits, classifier_length: int, config: DetoxConfig) -> None:
    """Raise a UserError with the option to lower if it allows more tokens than a model can process.

    T5 has no limit, despite its tokenizer's model_max_length of 512, because its positions are relative.
    """
    base = policy.base.config
    responses = ["output_max_length", "eval_max_new_tokens"]
    longest = {name: getattr(config, name) for name in responses}
    if config.sft_steps:
        longest["sft_max_target_length"] = config.sft_max_target_length
    longest["input_max_text_length"] = max(len(ids) for split in splits.values() for ids in split["input_ids"])
    for name, tokens in longest.items():
        part = "encoder" if name.startswith("input") else "decoder"
        settings = getattr(base, part, base).get_text_config()
        positions = getattr(settings, "max_position_embeddings", math.inf)  # BART's; LED has others for each part
        positions = getattr(settings, f"max_{part}_position_embeddings", positions)
        if part == "decoder":
            positions -= len(policy.decoder_start) - 1
        if math.isfinite(positions):
            positions = positions // 16 * 16  # padded_width rounds up to a multiple of 16
        limits = {f"the {part} of {config.model_name}": positions}
        if name in responses:
            limits[config.reward_model_name] = classifier_length
        model, limit = min(limits.items(), key=lambda item: item[1])
        if tokens > limit:
            length = f"--{name} {getattr(config, name)} allows {tokens:,} tokens"
            raise UserError(f"{length}, but {model} is limited to {limit:,.0f}; lower it")


def check_summaries(classifier, train, config: DetoxConfig) -> None:
    """Raise a UserError if there is no clean human summary for the loss of ptx_coef."""
    texts = [text for text in train["summary"] if text]
    for start in range(0, len(texts), config.batch_size):
        if min(classifier.toxicity(classifier.logits(texts[start : start + config.batch_size]))) <= TOXIC:
            return
    problem = f"{config.reward_model_name} rates all of them as toxic" if texts else "there are none"
    hint = "Set it to 0, or use another --dataset_name"
    raise UserError(f"--ptx_coef {config.ptx_coef} needs clean human summaries, but {problem}. {hint}.")


def positions_of(model) -> float:
    """The maximum number of tokens that a model reads: its learned positions, or infinity if they are relative."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", math.inf))  # the latter: MPT
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - module.padding_idx - 1  # RoBERTa's first position follows padding_idx
    return positions if positions > 0 else math.inf  # XLNet has -1


def print_parameters(policy: Policy) -> None:
    """Print the numbers of trainable and of all parameters: policy, policy with value head, and reference."""
    print(policy.value_head)
    head = sum(parameter.numel() for parameter in policy.value_head.parameters())
    trainable, with_reference = policy.model.get_nb_trainable_parameters()
    total = with_reference - sum(tensor.numel() for tensor in lora_weights(policy.model, "reference").values())
    with policy.as_adapter("reference"):
        trainable_in_reference, _ = policy.model.get_nb_trainable_parameters()
    counts = {
        "policy": (trainable, total),
        "policy with value head": (trainable + head, total + head),
        "reference": (trainable_in_reference, total + head),
    }
    for name, (trainable, total) in counts.items():
        print(f"{name}: trainable {trainable:,} of {total:,} = {trainable / total:.2%}")


def save_adapter(policy: Policy, directory: Path, adapter: str = "default") -> None:
    """Write an adapter in PEFT's format; next to the trained one also the value head, with TRL's key names."""
    directory.mkdir(parents=True, exist_ok=True)
    lora = copy.copy(policy.model.peft_config[adapter])
    lora.inference_mode = True
    if isinstance(lora.target_modules, set):
        lora.target_modules = sorted(lora.target_modules)  # a set's order changes from run to run
    lora.save_pretrained(directory)
    files = {"adapter_model": lora_weights(policy.model, adapter)}
    if adapter == "default":
        files["value_head"] = policy.value_head.state_dict(prefix="v_head.")
    for name, weights in files.items():
        weights = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
        save_file(weights, directory / f"{name}.safetensors", metadata={"format": "pt"})


def load_everything(config: DetoxConfig, device: torch.device, dtype: torch.dtype, trains: bool = True):
    """Load what a run needs: first what fails the fastest.

    Returns policy, tokenizer, classifier, rows to train on, rows to evaluate on, and the origin of models and data.
    """
    changed = {name: getattr(config, name) for name in OPTIONS if getattr(config, name) != getattr(DetoxConfig, name)}
    print(yaml.safe_dump(changed, sort_keys=False), end="")
    print(f"device {device}, base model in {str(dtype).removeprefix('torch.')}, adapter and classifier in float32")
    trained_on = trains or not config.eval_dataset_name
    sources = {name: getattr(config, name) for name in FROM_HUB if trained_on or name != "dataset_name"}
    commits = {name: contents_of(source, name) for name, source in sources.items() if source}
    evaluated = None
    if config.eval_dataset_name:
        for split in ("test", "validation", "train"):  # the first that exists
            evaluated = evaluated or load_dialogues(config.eval_dataset_name, config, "eval_dataset_name", split)
    elif os.path.isdir(config.dataset_name):
        evaluated = load_dialogues(config.dataset_name, config, split="test")
    rows = load_dialogues(config.dataset_name, config) if trained_on else None
    has_summaries = any(text for part in (rows, evaluated) if part for text in part["summary"])
    if not has_summaries and config.summary_column != DetoxConfig.summary_column:
        names = " ".join(config.summary_columns)
        raise UserError(f"--summary_column {names}: no row has a summary there; use a column that has some")
    policy, tokenizer = load_policy(config, device, dtype)
    set_threads(policy)
    print_parameters(policy)
    classifier = ToxicityClassifier(config, device)
    print_examples(classifier)
    splits = build_dataset(rows, tokenizer, config, evaluated)
    check_lengths(policy, splits, classifier.max_length, config)
    if config.ptx_coef and config.max_ppo_steps:
        check_summaries(classifier, splits["train"], config)
    texts = [list(splits[split][column]) for split in ("train", "test") for column in ("query", "summary")]
    texts += [several for split in ("train", "test") for several in splits[split]["references"] if len(several) > 1]
    fingerprint = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    evaluated = splits["test"]
    if config.eval_samples > 0:
        evaluated = evaluated.select(range(min(len(evaluated), config.eval_samples)))
    origin = {"commits": commits, "dataset_fingerprint": fingerprint}
    return policy, tokenizer, classifier, splits["train"], evaluated, origin


# --- Micro-batches and several processes -----------------------------------------------------------------------------


@contextmanager
def timed(seconds: dict[str, float], name: str):
    """Add the duration of a block, in seconds, to seconds[name]."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def padded_width(lengths: Iterable[int]) -> int:
    """The maximum of the lengths, rounded up to a multiple of 16: oneDNN generates and caches code for every width."""
    return -(-max(map(int, lengths)) // 16) * 16


def micro_batches(lengths: list[int], rows: Iterable[int], model, logits: list[int] | None = None) -> list[list[int]]:
    """Split rows into groups of similar length (tokens), one forward pass each.

    Similar lengths need little padding. Two bounds limit the memory of a pass: the bytes of its hidden states and
    those of its logits, which are given per row. Both are larger without gradients, where activations are not kept,
    and on a GPU, which needs large groups.
    """
    if model.device.type != "cpu":
        bound, logits_bound = 2**27, 2**31  # bytes
    elif torch.is_grad_enabled():
        bound, logits_bound = 3 * 2**18, 2**28
    else:
        bound, logits_bound = 3 * 2**19, 2**29
    max_tokens = bound // (model.config.get_text_config().hidden_size * model.dtype.itemsize)
    logits = logits or [0] * len(lengths)
    groups = []
    for row in sorted(map(int, rows), key=lambda row: lengths[row]):
        group = [*groups[-1], row] if groups else [row]
        max_logits = max(logits[i] for i in group)
        fits = len(group) * lengths[row] <= max_tokens and len(group) * max_logits <= logits_bound
        if groups and fits:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def decoding_rows(policy: Policy, longest: int, config: DetoxConfig) -> int:
    """How many prompts to decode at once: large batches are faster, but their keys and values must fit in memory."""
    settings = policy.base.config.get_text_config(decoder=True)
    token_bytes = settings.num_hidden_layers * 2 * settings.hidden_size * policy.base.dtype.itemsize
    row_bytes = token_bytes * (padded_width([longest]) + config.eval_max_new_tokens)
    cache_bytes = 2**30 if policy.device.type == "cpu" else 2**32
    return max(config.batch_size, cache_bytes // row_bytes)


def local_rows(rows: Iterable[int], lengths: list[int]) -> list[int]:
    """This process's share of the rows: every num_processes-th by length, so that all processes have equal work."""
    state = PartialState()
    return sorted(map(int, rows), key=lambda row: lengths[row])[state.process_index :: state.num_processes]


def gather_rows(rows: list[int], column: torch.Tensor) -> torch.Tensor:
    """Gather a column (b, ...) of each process's rows (equally many) into the batch's (B, ...), padded with 0."""
    order = gather(torch.tensor(rows, device=column.device))
    return gather(pad_across_processes(column, dim=1))[order.argsort()]


def shared_toxicity(texts: list[str], toxicity: Callable[[list[str]], list[float]]) -> list[float]:
    """The toxicity of each text: every process computes its share, and all processes return the complete list."""
    rows = sorted(local_rows(range(len(texts)), [len(text) for text in texts]))
    values = toxicity([texts[row] for row in rows]) if rows else []
    by_row = {}
    for part in gather_object([dict(zip(rows, values, strict=True))]):
        by_row |= part
    return [by_row[row] for row in range(len(texts))]


def sum_over_processes(parameters: list[nn.Parameter], stats: Counter) -> Counter:
    """Sum the gradients of all processes in place; returns the sum of their stats."""
    for parameter in parameters:
        if parameter.grad is None:  # this process had no rows, or it is the value head during SFT
            parameter.grad = torch.zeros_like(parameter)
    if PartialState().num_processes == 1:
        return stats
    gradients = [parameter.grad for parameter in parameters]
    summed = reduce(nn.utils.parameters_to_vector(gradients), "sum")  # in a single message
    nn.utils.vector_to_parameters(summed, gradients)
    total = Counter()
    for part in gather_object([stats]):
        total.update(part)
    return total


# --- Words and characters of any language ----------------------------------------------------------------------------


# A character, with its marks, of a script without spaces between words; Line_Break=SA: Thai, Khmer and others.
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=SA}]\p{M}*")


def split_words(text: str) -> list[str]:
    """The lower-case words between spaces; in a script without spaces each character is a word."""
    text = unicodedata.normalize("NFKC", text).lower()  # the form that sentencepiece, and so most policies, writes
    return UNSPACED.sub(r" \g<0> ", text).split()


class RougeTokenizer:
    """Stemmed words of any language; on ASCII text those of rouge_score's own tokenizer, which drops other letters."""

    stem = staticmethod(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        words = regex.findall(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*", " ".join(split_words(text)))
        return [self.stem(word) if len(word) > 3 else word for word in words]


def character_counts(texts: list[str], buckets: int = 2**15) -> np.ndarray:
    """1 + log(count) of each text's character 4-grams, lower-cased and hashed into buckets: (texts, buckets)."""
    counts = np.zeros((len(texts), buckets), dtype=np.float32)
    for row, text in enumerate(texts):
        codes = np.frombuffer(text.lower().ljust(4).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
        grams = np.lib.stride_tricks.sliding_window_view(codes, 4)
        # A polynomial hash modulo 2^64, then Knuth's multiplicative hash, whose upper bits are mixed best.
        hashed = grams @ np.array([1000003**k % 2**64 for k in range(4)], dtype=np.uint64)
        hashed = (hashed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - int(math.log2(buckets)))
        columns, repeats = np.unique(hashed, return_counts=True)
        counts[row, columns] = 1 + np.log(repeats)
    return counts


def cosine_similarity(texts: list[str], dialogues: list[str]) -> np.ndarray:
    """Cosines (texts, dialogues) of tf-idf vectors of character 4-grams, so it works in any language.

    tf = 1 + log(count) and idf = 1 + log((1 + n) / (1 + df)) over the n dialogues (Manning et al., 2008, chapter 6).
    """

    def blocks(texts):  # of 64 MiB
        return (character_counts(texts[i : i + 512]) for i in range(0, len(texts), 512))

    def normalized(block):
        weighted = block * idf
        return weighted / np.linalg.norm(weighted, axis=1, keepdims=True).clip(min=1e-9)

    idf = 1 + np.log((1 + len(dialogues)) / (1 + sum((block > 0).sum(axis=0) for block in blocks(dialogues))))
    columns = [normalized(block) for block in blocks(dialogues)]
    return np.concatenate([np.hstack([normalized(block) @ c.T for c in columns]) for block in blocks(texts)])


# --- Report: warnings, results, pictures, model card, uploads --------------------------------------------------------


MIN_LENGTH_SHARE = 0.6  # summaries are too short below this share of the length before, if also below the human one


def degradation(before: dict[str, float], after: dict[str, float], human_length: float = math.inf) -> list[str]:
    """List what got worse in the summaries, as messages; empty if nothing did.

    before and after are summary_quality's; human_length is the mean length of the human summaries in tokens, if any.
    """
    losses = []
    measures = (("retrieval_at_1", "R@1", 0.9), ("rougeL", "ROUGE-L", 0.9), ("distinct_2", "distinct-2", 0.5))
    for name, label, min_share in measures:
        if name in before and after[name] < min_share * before[name]:
            losses.append(f"{label} fell from {before[name]:.3f} to {after[name]:.3f}")
    if after["length"] < min(MIN_LENGTH_SHARE * before["length"], human_length):
        losses.append(f"the mean length fell from {before['length']:.1f} to {after['length']:.1f} tokens")
    for name, label in (("repeated_3", "are repetitive"), ("empty", "are empty"), ("unfinished", "are unfinished")):
        if after[name] > before[name] + 0.1:
            losses.append(f"{after[name]:.0%} {label} ({before[name]:.0%} before)")
    return losses


def step_warnings(history: list[dict], config: DetoxConfig, human_length: float = math.inf) -> dict[str, str]:
    """Warnings about the latest step by kind, each with the problem and a remedy.

    history has the metrics of all steps that were not skipped; human_length is the mean length of the human summaries
    in tokens, if any.
    """
    first, latest = history[0], history[-1]
    stay_close = "Raise init_kl_coef or lower learning_rate."
    warned = {}

    kl = latest["objective/kl"]
    if kl > 3 * config.target_kl:
        warned["kl"] = f"objective/kl {kl:.1f} is over three times target_kl. {stay_close}"
    if kl < -1:
        warned["negative kl"] = f"objective/kl {kl:.1f} is below 0: the estimate is noisy. Raise batch_size."

    skipped = latest["ppo/skipped_minibatches"]
    if skipped:
        problem = f"{skipped} minibatches were skipped: over ratio_threshold or not finite"
        warned["skipped"] = f"{problem}. Lower learning_rate or ppo_epochs."

    first_entropy = first["objective/entropy"] / first["tokens/responses_len_mean"]
    entropy = latest["objective/entropy"] / latest["tokens/responses_len_mean"]
    if entropy < 0.1 * first_entropy:
        problem = f"entropy fell from {first_entropy:.3f} to {entropy:.3f} nats per token"
        warned["entropy"] = f"{problem}: the policy gives nearly the same response to every prompt. {stay_close}"

    first_length = first["tokens/responses_len_mean"]
    length = np.mean([step["tokens/responses_len_mean"] for step in history[-5:]])
    if length < min(MIN_LENGTH_SHARE * first_length, human_length):
        problem = f"the mean response length fell from {first_length:.1f} to {length:.1f} tokens"
        warned["short"] = f"{problem}. Raise ptx_coef, content_coef or init_kl_coef."

    # Compared with the first steps, so that a score that rose at once and stayed high is not flat.
    scores = [step["ppo/mean_scores"] for step in history]
    rise = np.mean(scores[-25:]) - np.mean(scores[:5])
    noise = 2 * (first["ppo/std_scores"] ** 2 / (5 * config.batch_size) + np.var(scores[-25:]) / 25) ** 0.5
    if len(scores) >= 50 and rise <= noise:
        warned["flat"] = f"the score has not risen in {len(scores)} steps. Raise learning_rate or batch_size."

    truncated = 1 - latest["tokens/finished_share"]
    if truncated > 0.5:
        problem = f"{truncated:.0%} of the responses were truncated, so incomplete sentences were scored"
        warned["cut"] = f"{problem}. Raise output_max_length."
    return warned


def overlap(train: Iterable[str], evaluated: Iterable[str]) -> dict[str, int]:
    """Count the evaluated dialogues: all, those in the training data, and those that repeat an earlier one."""
    trained, counts = set(train), Counter(evaluated)
    also_trained = sum(count for dialogue, count in counts.items() if dialogue in trained)
    return {"n": counts.total(), "also_trained": also_trained, "duplicates": counts.total() - len(counts)}


def overlap_warnings(counts: dict[str, int]) -> dict[str, str]:
    """Warnings by kind if the evaluated dialogues are not held out or not distinct; counts are overlap's."""
    warned, of_all = {}, f"of the {counts['n']} evaluated dialogues"
    if counts["also_trained"]:
        problem = f"{counts['also_trained']} {of_all} are also trained on, so they are not held out"
        warned["overlap"] = f"{problem}. Set eval_dataset_name to other dialogues."
    if counts["duplicates"]:
        problem = f"{counts['duplicates']} {of_all} are duplicates: the confidence interval is too narrow"
        warned["duplicates"] = f"{problem}. Remove the duplicate rows."
    return warned


def print_step(metrics: dict, config: DetoxConfig, bar: tqdm) -> None:
    """Show a step on the progress bar and, every logging_steps, print it in at most 100 columns, the score first."""
    step, last = metrics["step"], config.max_ppo_steps
    names = {"score": "ppo/mean_scores", "kl": "objective/kl", "returns/mean": "ppo/returns/mean"}
    bar.set_postfix({name: f"{metrics[key]:.2f}" for name, key in names.items()})
    if step % config.logging_steps == 0 or step == last:
        names["advantages_mean"] = "ppo/policy/advantages_mean"
        values = ", ".join(f"{name} {metrics[key]:6.3f}" for name, key in names.items())
        print_wrapped(f"step {step:>4}/{last}: {values}, {metrics['time/step']:.1f} s")


def new_warnings(state: RunState, config: DetoxConfig, human_length: float = math.inf) -> dict[str, str]:
    """Warnings about the latest step, with its number; only kinds that the run has not had yet."""
    history = [line for line in state.history if not line["ppo/skipped_steps"]]
    warned = step_warnings(history, config, human_length)
    return {kind: f"step {state.step}: {text}" for kind, text in warned.items() if kind not in state.warnings}


def warn(state: RunState, warned: dict[str, str]) -> None:
    """Print warnings, which are given by kind, and record them for the report."""
    state.warnings |= warned
    for text in warned.values():
        print_wrapped(f"  warning, {text}")


def minutes_left(state: RunState, config: DetoxConfig) -> float:
    """Estimate the minutes that the remaining steps and the last evaluation take."""
    steps = config.max_ppo_steps - state.step
    return (steps * state.history[-1]["time/step"] + state.timings["evaluate_before"]) / 60


def print_means(label: str, table: pd.DataFrame) -> None:
    """Print the mean and standard deviation of each toxicity in the table."""
    for key in ("toxicity", "summary_toxicity", "judge_toxicity"):
        if key in table:
            mean, std = table[key].mean(), table[key].std(ddof=0)
            print(f"{key.replace('_', ' ')} [mean, std] {label}: [{mean:.4f}, {std:.4f}]")


NOT_FINITE = "The newest checkpoint is the last good state. Lower learning_rate, or set dtype float32"


def build_results(tables: dict[str, dict], human: pd.DataFrame, rows, state, config: DetoxConfig) -> dict:
    """The measured blocks of results.json, and the warnings.

    tables[phase][decoding] is evaluate_policy's table of the rows; phases are "before", "after" and, with SFT, "base";
    decodings are "sampled" and "greedy". human is measure_human's table.
    """
    references, dialogues = list(rows["references"]), list(rows["dialogue"])
    toxic = human["dialogue_toxicity"].to_numpy() > TOXIC
    keys = ("toxicity", "summary_toxicity")

    def compare(decoding, key, chosen=slice(None)):
        values = {phase: by_decoding[decoding][key].to_numpy()[chosen] for phase, by_decoding in tables.items()}
        base = {"base": mean_and_std(values["base"])} if "base" in values else {}
        return base | paired_statistics(values["before"], values["after"], config.seed)

    def measured(decoding):
        by_phase = {phase: by_decoding[decoding] for phase, by_decoding in tables.items()}
        quality = {phase: summary_quality(table, references, dialogues) for phase, table in by_phase.items()}
        block = {key: compare(decoding, key) for key in keys}
        for key in ("length", "reward"):
            block[key] = {phase: {"mean": float(table[key].mean())} for phase, table in by_phase.items()}
        block["rouge"] = {}
        for phase, values in quality.items():
            block["rouge"][phase] = {name: value for name, value in values.items() if name.startswith("rouge")}
        return block | {"quality": quality}

    results = measured("sampled") | {"greedy": measured("greedy")}
    if config.judge_model_name:
        results["judge"] = {"summary_toxicity": compare("sampled", "judge_toxicity")}
        results["judge"]["greedy"] = {"summary_toxicity": compare("greedy", "judge_toxicity")}
    results["human"] = human_figures(human, dialogues)
    results["toxic_dialogues"] = {"n": int(toxic.sum())}
    if toxic.any():
        results["toxic_dialogues"] |= {key: compare("sampled", key, toxic) for key in keys}

    human_length = results["human"].get("length", {"mean": math.inf})["mean"]
    losses = {}
    for decoding, block in (("sampled", results), ("greedy", results["greedy"])):
        losses[decoding] = degradation(block["quality"]["before"], block["quality"]["after"], human_length)
    table = results_table(results)
    results["warnings"] = dict(state.warnings)
    skipped = sum(line["ppo/skipped_steps"] for line in state.history)
    if skipped:
        results["warnings"]["not finite"] = f"{skipped} of {len(state.history)} steps were skipped. {NOT_FINITE}."
    results["warnings"] |= reward_hacking_warnings(table, losses)
    results["verdict"] = verdict_sentence(results, table, lost=any(losses.values()))
    results["overlap"] = state.overlap
    return results


def reward_hacking_warnings(table: pd.DataFrame, losses: dict[str, list[str]]) -> dict[str, str]:
    """Warnings by kind if toxicity fell, but the summaries got worse or the judge sees no improvement.

    table is results_table's; losses are degradation's messages by decoding.
    """
    before, after = toxicity_rows(table, "before"), toxicity_rows(table, "after")
    hacked, unconfirmed = [], []
    for decoding, messages in losses.items():
        if messages and after["mean"][decoding] < before["mean"][decoding]:
            hacked.append(f"{'; '.join(messages)} ({decoding})")
        change = after["verdict"][decoding]
        judged = after["verdict"].get(f"judge, {decoding}", change)
        if change == "less toxic" and judged != "less toxic":
            unconfirmed.append(decoding)
    warned = {}
    if hacked:
        problem = f"reward hacking: toxicity fell, but the summaries got worse: {'; '.join(hacked)}"
        hint = "Raise ptx_coef, content_coef or init_kl_coef, lower learning_rate or stop earlier"
        warned["reward hacking"] = f"{problem}. {hint}."
    if unconfirmed:
        problem = f"the summaries ({' and '.join(unconfirmed)}) are less toxic by the classifier, but not by the judge"
        cause = "The policy may have learned the classifier's blind spots"
        warned["judge"] = f"{problem}. {cause}. Raise init_kl_coef or stop earlier."
    return warned


def human_figures(human: pd.DataFrame, dialogues: list[str]) -> dict[str, dict | float]:
    """The human summaries' block of results.json, from measure_human's table; empty without human summaries."""
    human = human.assign(dialogue=dialogues).dropna()
    if human.empty:
        return {}
    keys = ("toxicity", "summary_toxicity", "judge_toxicity")
    figures = {key: mean_and_std(human[key]) for key in keys if key in human}
    figures["length"] = {"mean": float(human["length"].mean())}
    if len(human) >= LEAST_RETRIEVED:
        figures["retrieval_at_1"] = retrieval_at_1(list(human["dialogue"]), list(human["response"]))
    return figures


MEASURES = {  # label in the terminal, card and picture: key in results.json
    "toxicity": "summary_toxicity",
    "judge's toxicity": "judge_toxicity",
    "with dialogue": "toxicity",
    "R@1": "retrieval_at_1",
    "ROUGE-L": "rougeL",
    "length": "length",
    "reward": "reward",
}


def results_table(results: dict) -> pd.DataFrame:
    """The measures of results.json as one long table, from which terminal, card and picture select.

    Index: measure, decoding (sampled, greedy) and phase (base, before, after); decoding and phase of the human
    summaries are both "human". Columns: mean; for toxicities also std, n and share and, in the phase after, those of
    format_change. The measure "share toxic" repeats the share of "toxicity" as its mean.
    """
    sampled, greedy, human = dict(results), dict(results["greedy"]), {"quality": {"human": {}}}
    if "judge" in results:
        sampled["judge_toxicity"] = results["judge"]["summary_toxicity"]
        greedy["judge_toxicity"] = results["judge"]["greedy"]["summary_toxicity"]
    for key, value in results["human"].items():
        if isinstance(value, dict):
            human[key] = {"human": value}
        else:
            human["quality"]["human"][key] = value
    blocks = {"sampled": sampled, "greedy": greedy, "human": human}
    rows = {}
    for (measure, key), (decoding, block) in itertools.product(MEASURES.items(), blocks.items()):
        for phase, quality in block["quality"].items():
            if key in quality:
                rows[measure, decoding, phase] = {"mean": quality[key]}
            elif key in block:
                rows[measure, decoding, phase] = block[key][phase]
        if "verdict" in block.get(key, {}):
            rows[measure, decoding, "after"] = block[key]["after"] | format_change(block[key])
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["measure", "decoding", "phase"])
    shares = table.loc[["toxicity"], ["share"]].set_axis(["mean"], axis=1)
    return pd.concat([shares.rename({"toxicity": "share toxic"}), table])


def format_change(statistics: dict) -> dict[str, str]:
    """Columns of results_table from a result of paired_statistics."""
    paired, verdict = statistics["paired_difference"], statistics["verdict"]
    columns = {}
    for name, percent in statistics["reduction_percent"].items():
        columns[f"{name} change"] = "was 0" if percent is None else f"{0 - percent:+.1f}%"  # "+0.0%", not "-0.0%"
    columns["95% interval"] = f"{paired['ci_low']:+.3f} to {paired['ci_high']:+.3f}"
    columns["p"] = format_p(paired["p_value"]).removeprefix("= ")
    columns["fell"], columns["rose"] = f"{verdict['better']:.0%}", f"{verdict['worse']:.0%}"
    columns["verdict"] = verdict["change"]
    columns["detectable"] = "unknown" if verdict["detectable"] is None else f"{verdict['detectable']:.4f}"
    return columns


def toxicity_rows(table: pd.DataFrame, phase: str) -> pd.DataFrame:
    """The toxicities of results_table in one phase, indexed by decoding and judge; the last is "with dialogue"."""
    rows = table.xs(phase, level="phase").dropna(subset="share").drop(("with dialogue", "greedy"))
    names = {"toxicity": "{}", "judge's toxicity": "judge, {}", "with dialogue": "with dialogue"}
    return rows.set_axis([names[measure].format(decoding) for measure, decoding in rows.index])


def content_measure(table: pd.DataFrame) -> str:
    """The best available measure of how much content is kept: R@1, else ROUGE-L, else length."""
    return next(name for name in ("R@1", "ROUGE-L", "length") if (name, "sampled", "before") in table.index)


def format_p(p_value: float) -> str:
    """Format as in "p < 0.001": the least p is 1 / (resamples + 1), so smaller values would not be exact."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.4f}"


def verdict_sentence(results: dict, table: pd.DataFrame, lost: bool) -> str:
    """The result in one sentence: shares of toxic summaries, and whether content was lost, as degradation finds."""
    before, after = (toxicity_rows(table, phase)["share"] for phase in ("before", "after"))

    def shares(name):
        return f"{before[name]:.1%} and {after[name]:.1%}"

    text = f"{before['sampled']:.1%} of the summaries were toxic, now {after['sampled']:.1%}"
    text += f"; greedy {shares('greedy')}"
    if "judge" in results:
        text += f"; by the judge {shares('judge, sampled')}, greedy {shares('judge, greedy')}"
    sampled = results["summary_toxicity"]
    change, p_value = sampled["verdict"]["change"], sampled["paired_difference"]["p_value"]
    text += f"; {sampled['before']['n']} prompts, p {format_p(p_value)}: {change}"
    contents = []
    for measure in dict.fromkeys([content_measure(table), "length"]):  # they may be the same
        digits, unit = (1, " tokens") if measure == "length" else (3, "")
        changes = []
        for decoding in ("sampled", "greedy"):
            old, new = (table["mean"][measure, decoding, phase] for phase in ("before", "after"))
            changes.append(f"{old:.{digits}f} -> {new:.{digits}f}{unit} {decoding}")
        contents.append(f"{measure} {', '.join(changes)}")
    text += f"; content {'lost' if lost else 'kept'}: {', '.join(contents)}"
    if change == "no detectable change":
        text += "; for a clear change, train for more steps (--max_ppo_steps)"
        text += " or use --config checkpoints/flan-t5-base.yaml"
    return text


def build_comparison(rows, before: dict[str, pd.DataFrame], after: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per prompt, the largest gain in reward first; before and after are evaluation tables by decoding."""
    table = pd.DataFrame({"dialogue": list(rows["dialogue"]), "human_summary": list(rows["summary"])})
    for prefix, decoding in (("", "sampled"), ("greedy_", "greedy")):
        for column in ("response", "reward", "toxicity", "summary_toxicity", "judge_toxicity"):
            if column in before[decoding]:
                table[f"{prefix}{column}_before"] = before[decoding][column]
                table[f"{prefix}{column}_after"] = after[decoding][column]
    table["reward_diff"] = table["reward_after"] - table["reward_before"]
    return table.sort_values("reward_diff", ascending=False, kind="stable", ignore_index=True)


def write_comparison(comparison: pd.DataFrame, path: Path) -> None:
    """Write comparison.csv so that a spreadsheet shows every text and runs none as a formula."""
    # A spreadsheet runs cells that start with = + - @, a tab or a carriage return. They get a leading quote, and so do
    # those that start with a quote; .replace("^'", "", regex=True) restores the texts.
    table = comparison.replace(r"^(['=+\-@\t\r])", r"'\1", regex=True)
    text = table.to_csv(index=False)
    if "\r" in text:  # to_csv does not quote it by default, and most readers would start a new row there
        text = table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    # Excel needs a BOM to read non-ASCII text.
    path.write_text(text, encoding="utf-8" if text.isascii() else "utf-8-sig", newline="")


def print_results(results: dict, table: pd.DataFrame, examples: pd.DataFrame) -> None:
    """Print the verdict, the toxicities, the means, the examples (rows of the comparison) and the warnings."""
    print()
    print_wrapped(results["verdict"])
    after = toxicity_rows(table, "after")
    print(after.loc[:, "mean change":"verdict"].to_string())
    print(f"fell, rose: prompts whose toxicity changed by at least {NOISE}")
    sampled, greedy = after["detectable"][["sampled", "greedy"]]
    print(f"mean change that is detectable with 80% power: {sampled} sampled, {greedy} greedy")
    toxic = results["toxic_dialogues"]
    if toxic["n"]:
        old, new = (toxic["summary_toxicity"][phase]["mean"] for phase in ("before", "after"))
        print(f"summaries of the {toxic['n']} prompts with a toxic dialogue: {old:.4f} before, {new:.4f} after")
    means = table["mean"].unstack(["decoding", "phase"], sort=False).rename_axis(None)
    means.columns = [f"greedy {phase}" if decoding == "greedy" else phase for decoding, phase in means.columns]
    print(f"\n{means.to_string(float_format='{:.4f}'.format, na_rep='')}")
    kinds = ("response", "greedy_response") if len(examples) == 1 else ("response",)
    for row in examples.to_dict("records"):
        print(f"\nreward {row['reward_diff']:+.3f}")
        for kind, phase in itertools.product(kinds, ("before", "after")):
            toxicity = row[f"{kind.replace('response', 'summary_toxicity')}_{phase}"]
            label = f"greedy {phase}" if kind == "greedy_response" else phase
            print_wrapped(f"{label} (toxicity {toxicity:.4f}): {row[f'{kind}_{phase}']}")
    for kind in ("reward hacking", "judge"):
        if kind in results["warnings"]:
            print_wrapped(f"warning: {results['warnings'][kind]}")


BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # safe for colour-blind readers (Okabe, Ito)


def draw_training(history: list[dict]) -> Figure:
    """Draw the PPO steps, one panel per metric, from the lines of metrics.jsonl."""
    panels = {
        "ppo/mean_scores": "score (logit), batch mean",
        "objective/kl": "KL to the reference (nats per response)",
        "ppo/returns/mean": "return (score minus KL penalty), mean",
        "objective/entropy": "entropy (nats per response)",
        "tokens/responses_len_mean": "response length (tokens), mean",
        "ppo/val/var_explained": "return variance explained by the value head",
    }
    lines = [line for line in history if not line["ppo/skipped_steps"]]
    table = pd.DataFrame(lines, columns=["step", *panels, "objective/kl_coef"]).set_index("step").astype(float)
    window = max(1, len(table) // 20)
    means = table.rolling(window, min_periods=1).mean()
    figure = Figure(figsize=(10, 9), layout="constrained")
    grid = figure.subplots(3, 2, sharex=True)
    for axes, (name, title) in zip(grid.flat, panels.items(), strict=True):
        axes.plot(table[name], color=BLUE, alpha=0.35, label="each step", marker="." if window == 1 else "")
        if window > 1:
            axes.plot(means[name], color=BLUE, linewidth=2, label=f"mean of the last {window}")
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(alpha=0.3)
        axes.set_xlabel("PPO step")
        axes.locator_params(axis="x", integer=True)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    kl_coef, kl_coef_axes = table["objective/kl_coef"], grid[0, 1].twinx()
    kl_coef_axes.plot(kl_coef, color=ORANGE, linestyle="--", linewidth=2)
    kl_coef_axes.set_ylim(0, 1.2 * max(kl_coef, default=0) or 1)  # 1 if all are 0
    kl_coef_axes.set_ylabel("KL coefficient (dashed)", color=ORANGE)
    return figure


def draw_toxicity(table: pd.DataFrame, before: dict[str, pd.DataFrame], after: dict[str, pd.DataFrame]) -> Figure:
    """Draw the shares of toxic summaries by decoding and classifier, each prompt's change, and the content kept.

    table is results_table's; before and after are evaluate_policy's tables by decoding.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    shares, changes, contents = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    measure, phases = content_measure(table), {"before": ORANGE, "after": BLUE}
    toxic = pd.DataFrame({phase: 100 * toxicity_rows(table, phase)["share"] for phase in phases})
    content = table["mean"].unstack("phase").loc[[(measure, "sampled"), (measure, "greedy")]].droplevel("measure")
    for axes, panel, digits in ((shares, toxic, 1), (contents, content, 1 if measure == "length" else 3)):
        for shift, (phase, colour) in zip((-0.2, 0.2), phases.items(), strict=True):
            bars = axes.bar(np.arange(len(panel)) + shift, panel[phase], 0.38, color=colour, label=phase)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides the human level's line
            axes.bar_label(bars, fmt=f"%.{digits}f", padding=2, bbox=behind)
        axes.set_xticks(range(len(panel)), [name.replace(" ", "\n") for name in panel.index])
    shares.set(ylim=(0, 100), ylabel="% of the summaries")
    shares.set_title(f"toxic summaries (P > {TOXIC})", pad=14)  # room for a bar's label
    count = len(before["sampled"])
    for colour, decoding in ((GREEN, "sampled"), (PURPLE, "greedy")):
        difference = after[decoding]["summary_toxicity"] - before[decoding]["summary_toxicity"]
        edges = np.linspace(0, 100, count + 1)  # stairs, because a thousand bars take seconds to draw
        changes.stairs(np.sort(difference), edges, color=colour, linewidth=2, baseline=None, label=decoding)
    changes.axhline(0, color="black", linewidth=0.8)
    changes.set(xlim=(0, 100), ylim=(-1, 1), title="change in toxicity per prompt")
    changes.set_xlabel(f"% of the {count} prompts, sorted by change")
    if (measure, "human", "human") in table.index:
        level = table["mean"][measure, "human", "human"]
        contents.axhline(level, color="black", linestyle="--", linewidth=1.5, label="human")
    contents.margins(y=0.15)
    contents.set_ylabel("mean length (tokens)" if measure == "length" else measure)
    contents.set_title("content kept", pad=14)
    for axes in (shares, changes, contents):
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


CARD = """---
base_model: {base_model}
library_name: peft
pipeline_tag: summarization
tags: [lora, ppo, detoxification]{datasets}
---

# {name}: LoRA adapter for non-toxic summaries

**{verdict}.**{warnings}

{table}

- toxicity: the classifier's probability of `toxic_label` for the summary alone. Above {limit} a summary is toxic.
- with dialogue: the same probability for dialogue and summary as one text.
- judge's toxicity: that of a second classifier, which was not used in training.
- R@1: the share of summaries that are more similar to their own dialogue than to any other evaluated dialogue.
- length: in tokens. reward: the classifier's score, before the KL penalty.

All measures are in results.json and all evaluated prompts in comparison.csv, in the run's output directory.

Training options:

{options}

![Share of toxic summaries before and after, change in toxicity per prompt, content kept](toxicity.png)

![Score, KL, return, entropy, response length and value head by PPO step](training.png)

## Examples

Sampled summaries of the prompts with the largest, median and smallest gain in reward. They may be offensive.

{examples}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

base = {base!r}  # hub id or local directory of the base model
adapter = {adapter!r}  # hub id, or the directory next to this card
prompt = {prompt!r}
dialogue = {dialogue!r}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), adapter).eval()
inputs = tokenizer(prompt.replace("{{dialogue}}", dialogue), return_tensors="pt")
summary = model.generate(**inputs, max_new_tokens={max_new_tokens})
print(tokenizer.decode(summary[0], skip_special_tokens=True))
```

## Limits

- Toxicity is what a classifier detects; the policy may have learned its blind spots. The default classifier is for
  English only.
- The score does not measure whether a summary is faithful, complete or useful; ROUGE and R@1 only hint at it.
- The results are for these prompts, all from one dataset.
"""


def fenced(text: str) -> str:
    """Text as a fenced code block of Markdown; the fence is longer than any run of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def card_name(name: str) -> str:
    """The name to show: a hub id without its revision, or the last part of a path as a valid repository name."""
    if not Path(name).exists():
        return name.partition("@")[0]
    return re.sub(r"[^0-9A-Za-z]+", "-", Path(name).resolve().name)[:96].strip("-") or "local"


def start_directory(config: DetoxConfig) -> str | None:
    """The directory in model_dir with the adapter that PPO started from; None if that was new and had no effect."""
    if config.sft_steps:
        return "sft_adapter"
    return "start_adapter" if config.adapter_name else None


def model_card(config: DetoxConfig, results: dict, table: pd.DataFrame, examples: pd.DataFrame) -> str:
    """A Hugging Face model card: verdict, table, options, pictures, examples, use, limits; no local paths."""
    names = {option: card_name(name) for option in FROM_HUB if (name := getattr(config, option))}
    shown = "reward_label toxic_label judge_label score_text sft_steps max_ppo_steps learning_rate init_kl_coef seed"
    options = names | {option: getattr(config, option) for option in shown.split()}
    phases, columns = table.index.unique("phase"), ["mean change", "95% interval", "p"]
    cells = [["measure", "decoding", *phases, *columns], ["---"] * (len(phases) + 5)]
    for (measure, decoding), changes in table.xs("after", level="phase")[columns].fillna("").iterrows():
        places = [(measure, "human" if phase == "human" else decoding, phase) for phase in phases]
        means = [f"{table['mean'][place]:.4g}" if place in table.index else "" for place in places]
        cells.append([measure, decoding, *means, *changes])
    hub_dataset, base = "", names["model_name"]
    if not Path(config.dataset_name).exists():
        hub_dataset = f"\ndatasets: {json.dumps([names['dataset_name']])}"
    if Path(config.model_name).exists():
        base = f"path/to/{base}"
    example = "{dialogue}\n\nbefore: {response_before}\n\nafter: {response_after}\n\nreward: {reward_diff:+.3f}"
    return CARD.format(
        base_model=json.dumps(names["model_name"]),
        datasets=hub_dataset,
        name=config.hub_model_id or card_name(config.output_dir),
        verdict=results["verdict"],
        warnings="".join(f"\n\n**Warning:** {text}" for text in results["warnings"].values()),
        table="\n".join(f"| {' | '.join(row)} |" for row in cells),
        limit=TOXIC,
        options=fenced(yaml.safe_dump(options, sort_keys=False, allow_unicode=True).strip()),
        examples="\n\n".join(fenced(example.format(**row)) for row in examples.to_dict("records")),
        base=base,
        adapter=config.hub_model_id or "adapter",
        prompt=config.prompt,
        dialogue=examples["dialogue"][0],
        max_new_tokens=config.eval_max_new_tokens,
    )


def report(config: DetoxConfig, policy: Policy, state: RunState, evaluated, human: pd.DataFrame, tracker) -> dict:
    """Compute the results and, in the main process, write and publish them; returns the contents of results.json."""
    tables = {}
    for phase, by_decoding in state.evaluations.items():
        tables[phase] = {decoding: pd.DataFrame(columns) for decoding, columns in by_decoding.items()}
    with timed(state.timings, "total"):
        measured = build_results(tables, human, evaluated, state, config)
    results = {"config": state.config, "environment": environment(config, policy, state.origin)}
    results |= measured | {"timings": state.timings}
    if PartialState().is_main_process:
        write_report(config, results, state, evaluated, tables)
        finish_tracker(tracker, measured, state.step)
        if config.hub_model_id:
            publish(config, Path(config.model_dir or config.output_dir))
        if config.dynamodb_table:
            upload_comparison(config.dynamodb_table, config.output_dir, config.prompt)
    return results


def write_report(config: DetoxConfig, results: dict, state: RunState, evaluated, tables: dict[str, dict]) -> None:
    """Write comparison.csv, the pictures, the model card and, last, results.json, so that it marks a complete report.

    An evaluation without training has no card.
    """
    output_dir, model_dir = Path(config.output_dir), Path(config.model_dir or config.output_dir)
    before, after = tables["before"], tables["after"]
    comparison = build_comparison(evaluated, before, after)
    with atomic_write(output_dir / "comparison.csv") as path:
        write_comparison(comparison, path)
    # Those with the largest, the median and the smallest gain in reward.
    examples = comparison.iloc[sorted({0, len(comparison) // 2, len(comparison) - 1})]
    table = results_table(results)
    draw_toxicity(table, before, after).savefig(output_dir / "toxicity.png", dpi=120)
    files = f"{output_dir}/results.json"
    if state.phase != "start":
        draw_training(state.history).savefig(output_dir / "training.png", dpi=120)
        for name in ("toxicity.png", "training.png"):  # next to the card, which shows them
            (model_dir / name).write_bytes((output_dir / name).read_bytes())
        card = model_card(config, results, table, examples)
        (model_dir / "README.md").write_text(card, encoding="utf-8")
        files += f" and {model_dir}/README.md"
    with atomic_write(output_dir / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_results(results, table, examples)
    print(f"\n{results['timings']['total']:.0f} s in total; see {files}")


def start_tracker(config: DetoxConfig) -> Accelerator | None:
    """Start the tracker that report_to names. Its Accelerator only logs: it moves no model and sets no seed."""
    if config.report_to == "none" or not PartialState().is_main_process:
        return None
    with as_user_error(config.report_to, "report_to"):
        if config.report_to not in map(str, get_available_trackers()):
            raise ValueError(f"not installed; pip install {config.report_to}")
        tracker = Accelerator(log_with=config.report_to, project_dir=config.output_dir)
        options = {name: value if value is None else str(value) for name, value in vars(config).items()}
        tracker.init_trackers("detox_ppo", options, {"wandb": {"dir": config.output_dir}})
        return tracker


def finish_tracker(tracker: Accelerator | None, measured: dict, step: int) -> None:
    """Log the results under flat names such as final/summary_toxicity/after/mean, and close the tracker."""
    if tracker is None:
        return
    flat = pd.json_normalize(measured, sep="/").iloc[0]
    tracker.log({f"final/{name}": value for name, value in flat.items() if isinstance(value, float)}, step=step)
    tracker.end_training()


def publish(config: DetoxConfig, model_dir: Path) -> None:
    """Upload the adapter to the root of a hub repository, and the card, pictures and start adapter next to it."""
    names = ["README.md", "training.png", "toxicity.png"]
    start = start_directory(config)
    if start:
        names.append(f"{start}/*")
    try:
        repo_id = HfApi().create_repo(config.hub_model_id, exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=repo_id, folder_path=model_dir / "adapter")
        HfApi().upload_folder(repo_id=repo_id, folder_path=model_dir, allow_patterns=names)
    except Exception as error:  # huggingface_hub raises a dozen types
        adapter = shlex.join(["hf", "upload", config.hub_model_id, f"{model_dir}/adapter", "."])
        rest = shlex.join(["hf", "upload", config.hub_model_id, str(model_dir), ".", "--include", *names])
        retry = f"{adapter} && {rest}"
        raise UserError(f"--hub_model_id: {one_line(error)}. All files are saved; to retry: {retry}") from error
    print(f"adapter and card are at {huggingface_hub.constants.ENDPOINT}/{repo_id}")


def upload_comparison(table: str, directory: str | Path, prompt: str = PROMPT) -> None:
    """Upload a directory's comparison.csv to a DynamoDB table with the key conversation_id, a number from 1."""
    try:
        import awswrangler

        # Read as text, so that Decimal gets the exact digits.
        rows = pd.read_csv(Path(directory) / "comparison.csv", dtype=str, keep_default_na=False)
        rows = rows.replace("^'", "", regex=True).astype(object)  # see write_comparison
        rows.insert(0, "query", [build_prompt(dialogue, prompt) for dialogue in rows["dialogue"]])
        rows = rows[["query", "response_before", "response_after", "reward_before", "reward_after"]]
        for name in ("reward_before", "reward_after"):
            rows[name] = rows[name].map(Decimal)
        rows.insert(0, "conversation_id", range(1, len(rows) + 1))
        awswrangler.dynamodb.put_df(rows, table)
    except Exception as error:  # awswrangler and boto3 raise a dozen types
        reason = "pip install awswrangler" if isinstance(error, ImportError) else one_line(error)
        retry = f"All files are saved in {directory}; to retry, see Operation in the project's README"
        raise UserError(f"--dynamodb_table {table}: {reason}. {retry}.") from error
    print(f"uploaded {len(rows)} rows of comparison.csv to the DynamoDB table {table}")


PACKAGES = (torch, transformers, datasets, peft, trl, evaluate, np, pd)


def environment(config: DetoxConfig, policy: Policy, origin: dict) -> dict:
    """What the results depend on besides the options: versions, hardware, processes, dtype, seed, models and data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package.__name__: package.__version__ for package in PACKAGES},
        "device": torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "num_processes": PartialState().num_processes,
        "dtype": str(policy.base.dtype).removeprefix("torch."),
        "seed": config.seed,
        **origin,
    }


# --- Checkpoints: a resumed run gives the same output as an uninterrupted one ----------------------------------------

# Options that may differ when a run is resumed. Models and data are compared by their contents, not by their names.
MAY_CHANGE = """resume output_dir model_dir checkpoint_dir save_steps save_total_limit max_ppo_steps logging_steps
    report_to hub_model_id dynamodb_table gradient_checkpointing""".split()
MAY_CHANGE += FROM_HUB


@dataclasses.dataclass
class RunState:
    """Everything that the next step depends on, except the weights and the optimizer state."""

    config: dict
    origin: dict  # of models and data: commits, dataset_fingerprint
    phase: str = "start"  # then "sft" if there are SFT steps, then "ppo"
    sft_step: int = 0
    step: int = 0  # of PPO
    kl_coef: float = 0.0
    skipped_in_row: int = 0
    history: list = field(default_factory=list)  # one dict of metrics per PPO step
    evaluations: dict = field(default_factory=dict)  # when ("base", "before", "after") -> decoding -> columns
    overlap: dict = field(default_factory=dict)  # counts of overlap()
    warnings: dict = field(default_factory=dict)  # kind -> text
    timings: dict = field(default_factory=dict)  # part of the run -> seconds


class Stopped(BaseException):
    """Raised on SIGTERM, SIGHUP or Ctrl-C. Not an Exception, so that no library handles it as an error."""


class StopSignals:
    """Handler of SIGTERM, SIGHUP and Ctrl-C. It stops the run at once, or after the current step if one is running.

    A second signal stops the run during a step, too.
    """

    in_step, received = False, None

    def __call__(self, number, frame):
        is_second = self.received is not None
        self.received = number
        if is_second or not self.in_step:
            raise Stopped
        print(f"{signal.Signals(number).name}: stopping after the current step", file=sys.stderr)

    def agreed(self) -> bool:
        """Whether any process received a signal, so that all processes stop after the same step."""
        received = [number for number in gather_object([self.received]) if number is not None]
        if received:
            self.received = self.received or received[0]
        return bool(received)  # a signal that arrives during the gather counts at the next call


@contextmanager
def own_settings():
    """Set the torch defaults that a run needs; afterwards restore the caller's, and its logging handlers."""
    dtype, threads, handlers = torch.get_default_dtype(), torch.get_num_threads(), list(logging.root.handlers)
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        logging.root.handlers[:] = handlers  # rouge_score adds one, which would disable the caller's basicConfig


def steps_of(desc: str, done: int, last: int, stop: StopSignals):
    """Yield (step, progress bar) for each remaining step. A signal takes effect at the end of a step."""
    stop.in_step = True
    bar = tqdm(range(done + 1, last + 1), desc=desc, unit="step", initial=done, total=last, disable=NO_BAR)
    for step in bar:
        yield step, bar
    agreed = stop.agreed()
    stop.in_step = False  # what follows may be stopped at any point
    if agreed:
        raise Stopped


def init_or_restore(checkpoint: dict | None, config: DetoxConfig, origin: dict, policy: Policy) -> RunState:
    """The state of a new run, or that of a checkpoint, whose weights are loaded into the policy.

    Raises UserError if models or data differ from those of the checkpoint or between processes.
    """
    options = {name: getattr(config, name) for name in OPTIONS if name != "resume"}
    state = RunState(options, origin, kl_coef=config.init_kl_coef)
    if checkpoint:
        state = dataclasses.replace(checkpoint["state"], config=options)
        old, new = state.origin["commits"] | state.origin, origin["commits"] | origin
        names = sorted((old.keys() | new.keys()) - {"commits"})
        changed = [name for name in names if old.get(name) != new.get(name)]
        if changed:
            restore = "restore the contents, or start a new run in another --output_dir"
            raise UserError(f"--resume: {', '.join(changed)} changed since the run started; {restore}")
        policy.load_state_dict(checkpoint["weights"], strict=False)
    by_process = gather_object([[origin, state.sft_step, state.step]])
    if any(other != by_process[0] for other in by_process):
        raise UserError("models, data or checkpoints differ between processes; give all the same options and files")
    return state


def is_foreign(path: Path) -> bool:
    """Whether another program wrote a file with a checkpoint's name: a pickle, or a zip file without a checksum.

    A checkpoint of this script is a zip file followed by its SHA-256; if truncated or altered, it is corrupt.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(1)
        file.seek(max(0, path.stat().st_size - 22))  # the end record of a zip file
        end = file.read(4)
    return first == b"\x80" or end == b"PK\x05\x06"


class Checkpoints:
    """The checkpoints of a run: checkpoint-<n>.pt is written after n steps of SFT and PPO together.

    The one before the first PPO step replaces the last one of SFT: it contains the evaluation before PPO.
    A checkpoint has no random state, because all random numbers and batches are functions of the seed and the step.
    A file is the output of torch.save followed by its SHA-256, which detects corruption.
    """

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit, self.unusable = directory, limit, []

    def paths(self) -> list[Path]:
        """The run's checkpoints, newest first, without files of other programs."""
        numbered = []
        for path in self.directory.glob("*.pt"):
            match = re.fullmatch(r"checkpoint-(\d+)\.pt", path.name)
            if match and not is_foreign(path):
                numbered.append((int(match[1]), path))
        return [path for _, path in sorted(numbered, reverse=True)]

    def save(self, policy: Policy, optimizer, state: RunState) -> None:
        """Write a checkpoint and delete those beyond the limit."""
        content = {"weights": policy.adapters(), "optimizer": optimizer.state_dict(), "state": vars(state)}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with atomic_write(self.directory / f"checkpoint-{state.sft_step + state.step}.pt") as path:
            path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
        self.prune(self.limit)

    def prune(self, limit: int) -> None:
        """Delete all but the newest `limit` checkpoints, those that load() skipped, and partly written files."""
        usable = [path for path in self.paths() if path not in self.unusable]
        for path in [*usable[limit:], *self.unusable, *self.directory.glob(".checkpoint-*.partial")]:
            path.unlink()
        self.unusable = []

    def load(self) -> dict | None:
        """The newest valid checkpoint. Those that are corrupt or of another version are reported and skipped.

        None if there is no valid one. That is not an error: the first upload of a spot job may be incomplete.
        """
        for path in self.paths():
            with as_user_error(str(path), "resume"):  # a read error may be temporary, so it is not corruption
                content, problem = path.read_bytes(), "it is corrupt"
                if hashlib.sha256(content[:-32]).digest() == content[-32:]:
                    checkpoint = torch.load(io.BytesIO(content[:-32]), "cpu", weights_only=True)
                    if checkpoint["state"].keys() == {entry.name for entry in dataclasses.fields(RunState)}:
                        print(f"resuming from {path}")
                        return checkpoint | {"state": RunState(**checkpoint["state"])}
                    problem = "another version of this script wrote it"
            self.unusable.append(path)
            print(f"warning: {path} is not used: {problem}")
        print(f"--resume: no valid checkpoint in {self.directory}, starting from scratch")
        return None

    def check(self, checkpoint: dict | None, config: DetoxConfig) -> None:
        """Raise UserError if the checkpoint is of another run, or if a new run would overwrite an unfinished one."""
        if checkpoint:
            # The checkpoint of an older script lacks newer options; their defaults are what its run did.
            old, step = vars(DetoxConfig()) | checkpoint["state"].config, checkpoint["state"].step
            fixed = [name for name in OPTIONS if name not in MAY_CHANGE]
            changed = [name for name in fixed if getattr(config, name) != old[name]]
            if changed:
                values = [f"{name} was {old[name]!r} and is {getattr(config, name)!r}" for name in changed]
                raise UserError(f"--resume needs the checkpoint's options: {', '.join(values)}")
            if step > config.max_ppo_steps:
                limit = f"--max_ppo_steps {config.max_ppo_steps} is below it; raise it to at least {step}"
                raise UserError(f"--resume: the checkpoint is at step {step}, {limit}")
        elif self.paths() and not config.resume and not (Path(config.output_dir) / "results.json").exists():
            fix = "use --resume to continue it, choose another directory, or delete this one"
            raise UserError(f"--output_dir: {self.directory} holds an unfinished run ({self.paths()[0].name}); {fix}")


OUTPUT_FILES = ("README.md", "results.json", "comparison.csv", "training.png", "toxicity.png")


def check_foreign_files(directory: Path, option_name: str) -> None:
    """Raise UserError if a run would overwrite files in a directory that no run has written to."""
    if (directory / ".lock").exists() or (directory / "metrics.jsonl").exists() or Checkpoints(directory, 1).paths():
        return
    foreign = [name for name in (*OUTPUT_FILES, "adapter") if os.path.lexists(directory / name)]
    foreign += [path.name for path in directory.glob("checkpoint-*.pt") if is_foreign(path)]
    if foreign:
        overwritten = f"a run would overwrite files of another program: {', '.join(foreign)}"
        raise UserError(f"--{option_name} {directory}: {overwritten}; choose another directory")


def check_writable(directory: Path, option_name: str) -> None:
    """Raise UserError at the start if a run could not write one of its files at the end."""
    folders = [directory, *(directory / name for name in ("adapter", "sft_adapter", "start_adapter"))]
    names = (*OUTPUT_FILES, "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors")
    files = [folder / name for folder in folders for name in (*names, "value_head.safetensors")]
    for kind, paths, is_kind in (("directory", folders, Path.is_dir), ("file", files, Path.is_file)):
        for path in paths:
            if path.exists() and not (is_kind(path) and os.access(path, os.W_OK)):
                raise UserError(f"--{option_name} {directory}: can't be written: {path} is not a writable {kind}")


def trained_in(output_dir: Path) -> bool:
    """Whether the results in a directory are those of a training run, which an evaluation must not replace."""
    results = output_dir / "results.json"
    config = json.loads(results.read_text(encoding="utf-8"))["config"] if results.exists() else {}
    return bool(config.get("sft_steps") or config.get("max_ppo_steps"))


@contextmanager
def lock_directories(config: DetoxConfig):
    """Create and lock the run's directories in the main process. Unused directories are removed at the end."""
    names = ("checkpoint_dir", "model_dir", "output_dir") if PartialState().is_main_process else ()
    directories = {Path(getattr(config, name) or config.output_dir): name for name in names}
    for directory, name in directories.items():
        check_foreign_files(directory, name)
    with ExitStack() as at_end:
        for directory, name in directories.items():
            new = [path for path in (directory, *directory.parents) if not path.exists()]
            before = set(directory.glob("*"))
            try:
                directory.mkdir(parents=True, exist_ok=True)
                at_end.enter_context(FileLock(directory / ".lock").acquire(timeout=0))
            except Timeout as error:
                raise UserError(f"--{name} {directory}: another run is using it; choose another directory") from error
            except OSError as error:
                raise UserError(f"--{name} {directory}: can't be written: {error.strerror}") from error
            at_end.callback(remove_unused, directory, before, new)
            check_writable(directory, name)
        yield


def remove_unused(directory: Path, before: set[Path], new: list[Path]) -> None:
    """Remove the lock file if nothing else was written to a directory, then the new directories that are empty."""
    with suppress(OSError):
        if set(directory.glob("*")) - before == {directory / ".lock"}:
            (directory / ".lock").unlink()
        for path in new:
            path.rmdir()


# --- Errors: a user error is one line and exit code 2, without a stack trace -----------------------------------------

# user:password in a URL, secret parameters of its query, and tokens of the hub: hf_ and 34 letters and digits
SECRET_PARAM = r"[\w-]*(token|signature|credential|key|secret|password)[\w-]*="
SECRETS = re.compile(
    rf"(?<=://)[^/\s]+(?=@)|(?<=[?&])(?i:{SECRET_PARAM})[^&\s]+|\bhf_[A-Za-z0-9]{{34}}(?![A-Za-z0-9])"
)
RESUME_HINT = "Fix that and use --resume to continue from the newest checkpoint"
KNOWN_ERRORS = {  # pattern in the message of an error that is not a bug of this script -> what to do
    "MemoryError|can't allocate memory|could not (create|execute) a (primitive|memory)|bad_alloc": "Out of memory: "
    "lower --mini_batch_size for the update, or --batch_size, --output_max_length or --input_max_text_length for "
    "sampling",
    r"Dist\w*Error|gloo": "Another process of this run has ended: see its error, then use --resume to continue",
}
PATHS = "relative paths start at the current directory; in a --config file also at its directory and the script's"
TOY_EXAMPLE = "python detox_ppo.py --config checkpoints/tiny/config.yaml"


class UserError(Exception):
    """A failure that the user can fix. The message is one line, with secrets masked and control characters escaped."""

    def __init__(self, message: str):
        text = SECRETS.sub("***", " ".join(message.split()))
        chars = [char if char.isprintable() else ascii(char)[1:-1] for char in text]
        super().__init__("".join(chars))


def one_line(text: Exception | str) -> str:
    """A text, or the type and message of an error, in one line of at most 400 characters."""
    if isinstance(text, Exception):
        text = f"{type(text).__name__}: {text}".removesuffix(": ")
    return " ".join(text.split())[:400]


def explain(error: Exception) -> str | None:
    """The message of a failure that the user can fix, in one line; None for a bug of this script."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError | RuntimeError | MemoryError | SafetensorError):
        return None
    message = one_line(error)
    hints = [hint for pattern, hint in KNOWN_ERRORS.items() if re.search(pattern, message, re.IGNORECASE)]
    if isinstance(error, OSError | SafetensorError):
        hints.append(RESUME_HINT)
    return str(UserError(f"{message}. {hints[0]}.")) if hints else None


@contextmanager
def as_user_error(name: str, option_name: str):
    """Turn an error while `name` is loaded into a UserError with the option, the name and the cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise a dozen types
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        bugs = AttributeError | NameError | TypeError | KeyError | AssertionError
        if isinstance(error, bugs) and innermost.filename == __file__:
            raise  # a bug of this script
        reason = str(error) if type(error) is ValueError else one_line(error)
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if cause is not error:
            reason += f" (because of {one_line(cause)})"
        if isinstance(error, pickle.UnpicklingError):
            reason = "its weights are a pickle of more than tensors, which could run code; use a safetensors file"
        elif isinstance(error, NotImplementedError) and "meta tensor" in str(error).lower():  # no weights fit
            reason = "the shapes of its weights differ from those in its config.json"
        elif option_name in FROM_HUB and not os.path.lexists(name):  # Path.exists rejects long names
            hub = f"the hub at {huggingface_hub.constants.ENDPOINT} was queried"
            hints = "set HF_ENDPOINT for another hub, HF_HUB_OFFLINE=1 to use earlier downloads"
            hints = f"{hints}, or run the bundled toy example: {TOY_EXAMPLE}"
            reason = f"{reason.rstrip('.')}. No such file or directory ({PATHS}), so {hub}: {hints}"
        elif isinstance(error, huggingface_hub.errors.HFValidationError):
            reason = "a file that it needs is missing"  # so the library looked for the path on the hub
        raise UserError(f"--{option_name} {name}: can't be loaded: {reason}") from error


@contextmanager
def atomic_write(path: Path):
    """Yield a temporary path, and rename it to `path` once it is on the disk. Until then the old file stays."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # Python's and torch's errors for a full disk
        partial.unlink(missing_ok=True)  # it would keep the disk full
        raise UserError(f"{path}: can't be written: {one_line(error)}. {RESUME_HINT}.") from error


def print_wrapped(text: str) -> None:
    """Print a text above the progress bar, wrapped at 100 columns."""
    tqdm.write(textwrap.fill(text, 100, subsequent_indent="    ", break_on_hyphens=False), file=sys.stdout)


class SafeStream:
    """A stream that discards output once its reader is gone or its disk is full: printing must not end a run."""

    def __init__(self, stream):
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):  # replace unencodable characters, flush every line
            stream.reconfigure(line_buffering=True, errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return len(text)


# --- Command line ----------------------------------------------------------------------------------------------------

# First option of a group in --help -> heading of the group.
HEADINGS = {"model_name": "models", "dataset_name": "data", "sft_steps": "SFT", "learning_rate": "PPO"}
HEADINGS |= {"output_min_length": "responses", "eval_samples": "evaluation", "seed": "run"}


def converted(kind, text: str):
    """The value of a flag. An empty or ill-typed one stays text, which DetoxConfig reports as an error."""
    try:
        return kind(text) if text else text
    except ValueError:
        return text


class OptionParser(trl.TrlParser):
    """TrlParser with headings in its help, and with one-line errors instead of the usage of every option."""

    heading = None

    def add_argument(self, *flags, **kwargs):
        name = flags[0].removeprefix("--")
        if name in HEADINGS:
            self.heading = self.add_argument_group(HEADINGS[name])
        if name in OPTIONS:  # HfArgumentParser gives a list no default
            kwargs.setdefault("default", getattr(DetoxConfig, name))
        if "type" in kwargs:
            kwargs["type"] = functools.partial(converted, kwargs["type"])
        return (self.heading.add_argument if self.heading else super().add_argument)(*flags, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see: python detox_ppo.py --help)")


def read_options(path: str) -> dict:
    """The options of a YAML file. TrlParser's own reader would let it set environment variables with an `env` key."""
    with as_user_error(path, "config"):
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        options = yaml.safe_load(text)
        if not isinstance(options, dict):
            raise ValueError("expected a YAML mapping, a line `option: value` for each option")
        names = set()
        for key, node in yaml.compose(text).value:
            if key.value in names:  # YAML would silently use the last one
                raise ValueError(f"{key.value} is given twice")
            names.add(key.value)
            if node.tag.endswith(":int") and re.match(r"[-+]?0\d|.*:", node.value):  # YAML 1.1: 016 is 14
                raise ValueError(f"{key.value}: {node.value} is octal or base 60 in YAML; write a decimal number")
    unknown = [str(name) for name in options if name not in OPTIONS]
    if unknown:
        raise UserError(f"--config {path}: {unknown_option(unknown[0])}")
    folders = ("", Path(path).expanduser().parent, Path(__file__).parent)
    for name in FROM_HUB:
        value = options.get(name)
        if value and isinstance(value, str):
            paths = (os.path.join(folder, value) for folder in folders)
            options[name] = next(filter(os.path.exists, paths), value)
    return options


def unknown_option(given: str) -> str:
    """The error message for an unknown option, with the option that it resembles most."""
    name = given.split("=")[0].strip("-").replace("-", "_")
    close = difflib.get_close_matches(name, OPTIONS, n=1)
    if name.startswith("no_") and isinstance(getattr(DetoxConfig, name[3:], None), bool):
        close = [f"{name[3:]} false"]
    if given.endswith((".yaml", ".yml")):
        close = ["config " + given]
    hint = f"did you mean --{close[0]}?" if close else "see: python detox_ppo.py --help"
    return f"unknown option: {given} ({hint})"


SAGEMAKER = Path("/opt/ml")  # directory of a SageMaker training job's files


def sagemaker_options() -> dict:
    """Options from the environment of a SageMaker job. It restarts with the same command, so it always resumes."""
    variables = {"output_dir": "SM_OUTPUT_DATA_DIR", "model_dir": "SM_MODEL_DIR"}
    options = {name: os.environ[variable] for name, variable in variables.items() if variable in os.environ}
    channels = [name for name in sorted(os.environ) if name.startswith("SM_CHANNEL_")]
    if channels and channels not in (["SM_CHANNEL_TRAIN"], ["SM_CHANNEL_TRAINING"]):
        raise UserError(f"{', '.join(channels)}: use one channel, train or training, with the dialogues")
    if channels:
        options["dataset_name"] = os.environ[channels[0]]
    if "model_dir" in options:
        synced = SAGEMAKER / "checkpoints"
        options |= {"resume": True, "checkpoint_dir": str(synced) if synced.is_dir() else None}
    return options


def check_options(config: DetoxConfig) -> None:
    """Raise UserError for options that do not fit together."""
    if config.eval_samples == 0:
        raise UserError("--eval_samples is 0: it should be at least 1, or -1 for all")
    if config.toxic_label == config.reward_label:
        raise UserError(f"--toxic_label is {config.toxic_label!r}: it should differ from --reward_label")
    if config.prompt.count("{dialogue}") != 1:
        raise UserError(f"--prompt {config.prompt!r}: it should contain {{dialogue}} once")
    if config.judge_model_name == config.reward_model_name:
        judge = f"--judge_model_name {config.judge_model_name}"
        raise UserError(f"{judge}: it is also the reward model; use another classifier")
    if config.hub_model_id and "/" not in config.hub_model_id:
        raise UserError(f"--hub_model_id {config.hub_model_id}: it should be OWNER/NAME")
    for low, high in (("input_min_text_length", "input_max_text_length"), ("output_min_length", "output_max_length")):
        if getattr(config, low) >= getattr(config, high):
            raise UserError(f"--{low} {getattr(config, low)} must be below --{high} {getattr(config, high)}")
    if config.batch_size % config.mini_batch_size:
        sizes = f"--batch_size {config.batch_size} is not a multiple of --mini_batch_size {config.mini_batch_size}"
        raise UserError(sizes)


def parse_config(args: list[str]) -> DetoxConfig:
    """Parse flags and `--config FILE.yaml` into a checked configuration.

    The directories of a SageMaker job override the file; flags override both. Raises UserError, which names the first
    option that is unknown, ill-typed or out of range and what was expected.
    """
    parser = OptionParser(DetoxConfig, prog="detox_ppo.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--config", metavar="FILE.yaml", action="append", help="YAML file of these options.")
    files = parser.parse_known_args(args)[0].config or []
    if len(files) > 1:
        raise UserError("--config is given more than once; use a single --config FILE.yaml")
    defaults = read_options(files[0]) if files else {}
    parser.set_defaults_with_config(**defaults | sagemaker_options())
    values, unknown = parser.parse_known_args(args)
    if unknown:
        raise UserError(unknown_option(unknown[0]))
    try:
        return DetoxConfig(**{name: getattr(values, name) for name in OPTIONS})
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        expected = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        name = problem["loc"][0]
        meaning = DetoxConfig.__dataclass_fields__[name].metadata["help"]
        raise UserError(f"--{name} is {one_line(repr(problem['input']))}: {expected}. {meaning}") from error


def resolve_device(config: DetoxConfig) -> tuple[torch.device, torch.dtype]:
    """The device of this process and the dtype of the frozen weights. `auto` depends on what the hardware supports."""
    processes, name = PartialState(), config.device
    count = processes.num_processes
    for size in ("batch_size", "sft_batch_size"):
        if getattr(config, size) % count:
            raise UserError(f"--{size} {getattr(config, size)} is not a multiple of the number of processes, {count}")
    if count > 1 and name not in ("auto", processes.device.type):
        raise UserError(f"--device {name}: each of several processes uses its own {processes.device.type}; use auto")
    if name == "auto" or count > 1:
        # accelerate numbers even the CPU, which safetensors rejects.
        name = "cpu" if processes.device.type == "cpu" else str(processes.device)
    with as_user_error(name, "device"):
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise ValueError("use auto, cpu, cuda or cuda:N")
        device = torch.empty(0, device=name).device
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    if device.type == "cuda":
        fast_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast_bfloat16 = any(torch.cpu.get_capabilities().get(unit) for unit in ("amx_bf16", "avx512_bf16"))
    return device, torch.bfloat16 if fast_bfloat16 else torch.float32


def check_accelerate() -> None:
    """Raise UserError for settings of `accelerate launch` that this script does not support."""
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{plugin}"):
            raise UserError(f"ACCELERATE_USE_{plugin} is not supported: every process holds the whole model; unset it")
    for setting, fix in (("MIXED_PRECISION", "use --dtype"), ("DYNAMO_BACKEND", "set it to no")):
        value = os.environ.get(f"ACCELERATE_{setting}", "no")
        if value.lower() not in ("", "no"):
            raise UserError(f"ACCELERATE_{setting} is {value}, which is not supported: {fix}")


def first_to_exit() -> bool:
    """Whether this process is the first of the run to end early; only that one prints the reason."""
    if not torch.distributed.is_initialized():
        return True
    try:
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        return store.add("ended", 1) == 1
    except torch.distributed.DistError:  # the process with the store has ended
        return True


def main(args: list[str] | None = None) -> None:
    """Parse the options and run.

    Exit codes: 2 after a user error, which is one line on stderr; 0 after SIGTERM or SIGHUP and 130 after Ctrl-C, when
    a checkpoint has been written.
    """
    # Hide notices that the libraries address to developers, such as T5's about tied weights.
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    stop, handlers, streams = StopSignals(), {}, (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = map(SafeStream, streams)
    try:
        check_accelerate()
        if threading.current_thread() is threading.main_thread():  # other threads cannot handle signals
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP, a shell's background job Ctrl-C
                    handlers[number] = handler
        if signal.SIGINT in handlers:  # Python's handler would not run while PyTorch waits for the other processes
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        count = os.environ.get("WORLD_SIZE", "1")
        if count != "1" and os.environ.get("RANK") == "0":
            print(f"waiting for all {count} processes (WORLD_SIZE)", file=sys.stderr)
        processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
        if not processes.is_main_process:  # only the main process prints, except for the last message below
            sys.stdout = sys.stderr = open(os.devnull, "w")
        for number in handlers:
            signal.signal(number, stop)
        run(parse_config(sys.argv[1:] if args is None else args), stop)
        processes.destroy_process_group()
    except Stopped:
        if first_to_exit():
            stopped = f"stopped by {signal.Signals(stop.received).name}"
            print(f"{stopped}; the same command with --resume continues from the newest checkpoint", file=streams[1])
        sys.exit(130 if stop.received == signal.SIGINT else 0)
    except Exception as error:
        if first_to_exit():
            reason, trace = explain(error), SECRETS.sub("***", traceback.format_exc())
            with suppress(OSError):  # no such directory, or a full disk
                (SAGEMAKER / "output" / "failure").write_text(reason or trace)
            if not reason:
                raise
            if os.environ.get("DETOX_DEBUG") == "1":
                print(trace, file=streams[1])
            print(f"detox_ppo.py: error: {reason}", file=streams[1])
        sys.exit(2)
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
