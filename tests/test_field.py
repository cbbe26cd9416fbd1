"""Faults from public bug reports, each with the smallest input that shows it."""

import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_points
import numpy as np
import pandas as pd
import peft
import pytest
import torch
from kill_points import FAST, differences, left, strike
from safetensors.torch import load_file, save_file
from test_resume import complaint
from transformers import AutoModelForSeq2SeqLM, M2M100Config, M2M100ForConditionalGeneration

import detox_ppo
from detox_ppo import UserError, load_policy, parse_config

pytestmark = pytest.mark.usefixtures("quick")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return kill_points.make_dialogues(tmp_path_factory.mktemp("few"))


def load(small_config, **options):
    return load_policy(small_config(**options), CPU, torch.float32)[0]


# Loading


@pytest.mark.parametrize("kind", ["base", "classifier"])
def test_a_model_s_directory_that_also_holds_an_adapter_is_refused(small_config, tiny, tmp_path, kind):
    shutil.copytree(tiny / kind, tmp_path / "both")
    shutil.copytree(tiny / "adapter", tmp_path / "both", dirs_exist_ok=True)
    if kind == "classifier":  # PEFT looks for the names of its layers
        path = tmp_path / "both" / "adapter_config.json"
        config = json.loads(path.read_text()) | {"target_modules": ["query"], "task_type": "SEQ_CLS"}
        path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="adapter_config.json"):
        if kind == "base":
            load(small_config, model_name=tmp_path / "both", adapter_name="")
        else:
            detox_ppo.ToxicityClassifier(small_config(reward_model_name=tmp_path / "both"), CPU)


@pytest.mark.parametrize("given", ["q_proj v_proj q", "q wi_9"])
def test_target_modules_that_match_nothing_are_named(small_config, given):
    wrong = next(name for name in given.split() if name not in ("q", "v"))
    with pytest.raises(UserError, match=f"--lora_target_modules {given}: .*{wrong} is not a layer of the model"):
        load(small_config, adapter_name="", lora_target_modules=given)


@pytest.mark.parametrize(
    "given, told",
    [
        ("q", "6 q"),
        (r".*decoder.*\.(q|v)", "4 q, 4 v"),
        (r".*SelfAttention.[qv]", "4 q, 4 v"),
        ("all-linear", "6 k, 6 o, 6 q, 6 v, 4 wi_0, 4 wi_1, 4 wo"),
    ],
)
def test_the_adapted_layers_are_printed(small_config, capsys, given, told):
    policy = load(small_config, adapter_name="", lora_target_modules=given)
    assert f"which starts as the identity, on {told}\n" in capsys.readouterr().out
    names = {name.split(".lora_")[0].split(".")[-1] for name, _ in policy.named_parameters() if ".lora_" in name}
    assert names == {part.split()[1] for part in told.split(", ")}


def test_an_adapter_of_another_base_gives_a_warning(small_config, tiny, tmp_path, capsys):
    shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    for base, warned in (("t5-small", True), ("elsewhere/base", False), (None, False)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        load(small_config, adapter_name=tmp_path / "adapter")
        assert ("warning: --adapter_name " in capsys.readouterr().out) == warned


def test_target_modules_that_no_step_uses_are_an_error(small_config):
    with pytest.raises(UserError, match="--lora_target_modules: .*shared.* gets no gradient"):
        load(small_config, adapter_name="", lora_target_modules="q v shared")


def changed_adapter(tiny, directory, **changes):
    """The bundled adapter with other entries in its adapter_config.json."""
    shutil.copytree(tiny / "adapter", directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_an_adapter_that_no_step_uses_is_an_error_of_its_own_option(small_config, tiny, tmp_path):
    """An aLoRA is only active after its invocation tokens, which never occur in an encoder-decoder."""
    adapter = changed_adapter(tiny, tmp_path / "alora", alora_invocation_tokens=[5, 6])
    with pytest.raises(UserError, match=f"--adapter_name {adapter}: .* gets no gradient"):
        load(small_config, adapter_name=adapter)


@pytest.fixture
def with_tokens(tiny, tmp_path):
    """An adapter with rows of the embedding that learn (trainable_token_indices), as PEFT saves it."""
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny / "base")
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q"], trainable_token_indices=[5, 6])
    torch.manual_seed(0)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "tokens")
    return tmp_path / "tokens"


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_a_checkpoint_has_all_trainable_weights(small_config, with_tokens, freeze_encoder):
    """Token rows of both adapters, and the encoder's LoRA, which SFT trains even if PPO does not."""
    options = {"adapter_name": with_tokens, "freeze_encoder": freeze_encoder}
    policy, again = load(small_config, **options), load(small_config, **options)
    policy.freeze_encoder(False)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_()
    detox_ppo.copy_to_reference(policy.model)
    policy.freeze_encoder(freeze_encoder)
    again.load_state_dict(policy.adapters(), strict=False)
    moved = [name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, again.state_dict()[name])]
    assert not moved and len(policy.adapters()) < len(policy.state_dict()) / 2
    weights = detox_ppo.lora_weights(again.model, "reference")
    assert [name for name in weights if "trainable_tokens_delta" in name]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in detox_ppo.lora_weights(policy.model).items())
    tokens = [p for name, p in policy.named_parameters() if "trainable_tokens_delta.default" in name]
    assert [p.requires_grad for p in tokens] == [not freeze_encoder]  # the encoder reads them too


@pytest.mark.parametrize("targets", ["q v lm_head", "all-linear", "encoder.block.0.layer.0.SelfAttention.q"])
def test_what_is_saved_can_be_loaded(small_config, tmp_path, targets):
    policy = load(small_config, adapter_name="", lora_target_modules=targets)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_()
    detox_ppo.save_adapter(policy, tmp_path / "adapter")
    again = load(small_config, adapter_name=tmp_path / "adapter")
    saved, loaded = detox_ppo.lora_weights(policy.model), detox_ppo.lora_weights(again.model)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_the_head_as_peft_saves_it(small_config, tiny, tmp_path, dtype):
    """With the head's own weights, which have to be the base's."""
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "lm_head"])
    peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(tiny / "base"), lora).save_pretrained(tmp_path)
    config = small_config(adapter_name=tmp_path)
    policy = load_policy(config, CPU, dtype)[0]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (head,) = (name for name in weights if "base_layer" in name)
    assert weights.keys() - {head} == detox_ppo.lora_weights(policy.model).keys()
    save_file(weights | {head: weights[head] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=f"--adapter_name {tmp_path}: .* does not fit .*{head} is not that of the base"
    ):
        load_policy(config, CPU, dtype)


def test_what_is_not_implemented_is_reported_as_it_is():
    with pytest.raises(UserError, match="can't be loaded: NotImplementedError: no such kernel"):
        with detox_ppo.as_user_error(str(Path.cwd()), "model_name"):
            raise NotImplementedError("no such kernel")


@pytest.mark.parametrize("start", ["eva", "orthogonal"])
def test_adapters_that_keep_the_base_weights_are_loaded(small_config, tiny, tmp_path, start):
    shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
    policy, expected = load(small_config, adapter_name=tmp_path / "adapter"), load(small_config)
    for (name, found), plain in zip(policy.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(found, plain), name


def test_sft_of_a_family_without_decoder_inputs_from_labels(small_config, tiny, tmp_path):
    """M2M100's and NLLB's; the loss falls."""
    base = load(small_config).base
    config = M2M100Config(
        vocab_size=base.config.vocab_size,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    M2M100ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    for file in (tiny / "base").glob("token*"):
        shutil.copy(file, tmp_path / "model")
    options = {"model_name": tmp_path / "model", "adapter_name": "", "lora_target_modules": "q_proj fc1"}
    config = small_config(sft_steps=20, sft_learning_rate=0.05, lora_r=8, **options)
    policy, tokenizer = load_policy(config, CPU, torch.float32)
    batch = {"input_ids": [[5, 6, 7, 1]] * 4, "summary": ["A short summary."] * 4}
    rows = detox_ppo.datasets.Dataset.from_dict(batch)
    optimizer = torch.optim.AdamW(policy.trainable_parameters())
    losses = [detox_ppo.sft_step(policy, tokenizer, optimizer, rows, step, config) for step in range(1, 21)]
    assert losses[-1] < losses[0] - 0.1


# Environment of a job and the machine


def test_both_channels_that_jobs_name_are_read_and_others_are_errors(small_arguments, few, tiny, monkeypatch):
    arguments = small_arguments()
    place = arguments.index("--dataset_name")
    without = arguments[:place] + arguments[place + 2 :]
    for name in ("SM_CHANNEL_TRAIN", "SM_CHANNEL_TRAINING"):
        monkeypatch.setenv(name, str(few))
        assert parse_config(without).dataset_name == str(few)
        for flag in ("--dataset_name", "--dataset-name"):
            assert parse_config([*without, flag, "other"]).dataset_name == "other"
        monkeypatch.setenv("SM_CHANNEL_EXTRA", "/somewhere")
        with pytest.raises(UserError, match=f"SM_CHANNEL_EXTRA, {name}: use one channel"):
            parse_config(without)
        monkeypatch.delenv("SM_CHANNEL_EXTRA")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["max_grad_norm", "adapter_name", "dynamodb_table", "model_dir", "checkpoint_dir"])
def test_an_empty_text_is_not_given_for_what_is_optional(small_arguments, name):
    assert getattr(parse_config([*small_arguments(), f"--{name}", ""]), name) is None


@pytest.mark.parametrize("name", ["reward_label", "score_clip", "max_grad_norm"])
def test_none_is_written_as_in_the_messages(small_arguments, name):
    assert getattr(parse_config([*small_arguments(), f"--{name}", "None"]), name) is None


def test_an_empty_text_for_what_is_needed_is_one_line(small_arguments):
    with pytest.raises(UserError, match="--max_ppo_steps is '': it should be a valid integer"):
        parse_config([*small_arguments(), "--max_ppo_steps", ""])


@pytest.mark.parametrize(
    "setting, value, way", [("MIXED_PRECISION", "bf16", "--dtype"), ("DYNAMO_BACKEND", "INDUCTOR", "set it to no")]
)
def test_accelerate_settings_that_change_results_are_errors(small_arguments, capsys, monkeypatch, setting, value, way):
    monkeypatch.setenv(f"ACCELERATE_{setting}", value)
    line = complaint(small_arguments(), capsys)
    assert f"ACCELERATE_{setting} is {value}" in line and way in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_waiting_for_missing_processes_is_reported_and_can_be_interrupted(small_arguments, tmp_path, number):
    env = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(Path(detox_ppo.__file__)), *small_arguments(output_dir=tmp_path / "run")]
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, env=env | {"MASTER_PORT": "0"}, **options)
    assert process.stderr.readline() == "waiting for all 2 processes (WORLD_SIZE)\n"
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(20) == -number


def test_no_home_directory():
    env = os.environ | {"HOME": "/dev/null/nowhere"}
    done = subprocess.run([sys.executable, detox_ppo.__file__, "--help"], env=env, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 0 and "HF_HOME" in line
    assert not os.path.exists(re.search(r"using (\S+)\. ", line)[1])  # removed at the end


def test_an_import_leaves_the_process_as_it_is():
    code = """
import gc, os
gc.disable()
import detox_ppo
assert not gc.isenabled() and gc.get_freeze_count() == 0
assert os.environ["HOME"] == "/dev/null/nowhere" and "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
"""
    env = os.environ | {"HOME": "/dev/null/nowhere"}
    env.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    options = {"cwd": Path(detox_ppo.__file__).parent, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], env=env, **options)
    assert done.returncode == 0, done.stderr


def test_a_run_leaves_the_caller_s_settings(small_config, monkeypatch, tmp_path):
    """The results do not depend on them."""
    results = detox_ppo.run(small_config(output_dir=tmp_path / "plain"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(logging.root, "handlers", [])
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = detox_ppo.run(small_config(output_dir=tmp_path / "odd"))
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64 and torch.get_num_threads() == 2
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert found["reward"] == results["reward"] and logging.root.handlers == []


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_threads_are_bounded_by_the_container_s_quota(small, monkeypatch, capsys, files, expected):
    def read_text(path):
        name = str(path.relative_to("/sys/fs/cgroup"))
        if name not in files:
            raise FileNotFoundError(name)
        return files[name]

    set_to = []
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1] if set_to else 3)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(type(small.policy.base), "num_parameters", lambda *_: 3e7)
    assert detox_ppo.cpu_quota() == expected
    detox_ppo.set_threads(small.policy)
    assert set_to == [1 if expected < 2 else 3]
    assert f"CPU threads: {set_to[0]} " in capsys.readouterr().out


# Output


def test_a_closed_pipe_does_not_end_the_run(small_arguments, few, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    options = {"dataset_name": few, "output_dir": tmp_path / "run", "max_ppo_steps": 1}
    with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        detox_ppo.main(small_arguments(**options))
        assert sys.stdout is stream  # put back
    assert (tmp_path / "run" / "results.json").is_file()


def test_characters_that_the_terminal_cannot_show(small_arguments, few, tmp_path, monkeypatch):
    table = pd.read_csv(few / "train.csv")
    table["dialogue"] = table["dialogue"].str.replace("#Person1#: ", "#Person1#: Za\u017c\u00f3\u0142\u0107. ", n=1)
    (tmp_path / "data").mkdir()
    table.to_csv(tmp_path / "data" / "train.csv", index=False)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252"))
    monkeypatch.setattr(
        detox_ppo, "plain_texts", lambda _, responses: ["Za\u017c\u00f3\u0142\u0107."] * len(responses.prompts)
    )
    options = {"dataset_name": tmp_path / "data", "output_dir": tmp_path / "run", "max_ppo_steps": 0}
    detox_ppo.main(small_arguments(**options))
    sys.stdout.flush()
    assert b"Za?\xf3??." in shown.getvalue()
    comparison = pd.read_csv(tmp_path / "run" / "comparison.csv")
    assert set(comparison["response_after"]) == {"Za\u017c\u00f3\u0142\u0107."}


def test_results_are_written_before_anything_is_printed_of_them(small_arguments, few, tmp_path, monkeypatch):
    def print_results(*_):
        assert (tmp_path / "run" / "results.json").is_file()
        raise RuntimeError("nothing can be printed")

    monkeypatch.setattr(detox_ppo, "print_results", print_results)
    options = {"dataset_name": few, "output_dir": tmp_path / "run", "max_ppo_steps": 0}
    with pytest.raises(RuntimeError, match="nothing can be printed"):
        detox_ppo.main(small_arguments(**options))


# Stopping and resuming


def test_a_closed_terminal_stops_as_sigterm_does(undisturbed, forked, tmp_path):
    args = [*undisturbed.args, "--save_steps", "100"]
    stopped = forked.run(args, tmp_path, [strike("sampling", 10, "SIGHUP")])
    assert stopped.code == 0 and stopped.error.startswith("stopped by SIGHUP; the same command with --resume")
    assert (tmp_path / "run" / "checkpoint-5.pt").is_file()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_nohup_is_respected(undisturbed, forked, tmp_path, name):
    """And so is a shell that ignores Ctrl-C in its background processes."""
    done = forked.run(undisturbed.args, tmp_path, [["forks:ignore", {"name": name}], strike("sampling", 10, name)])
    assert done.code == 0 and "stopped by" not in done.output
    assert differences(undisturbed.left, left(tmp_path / "run")) == []


def test_a_project_that_was_moved_is_resumed(undisturbed, forked, tiny, tmp_path):
    """Other paths to the same models and data, or the same paths spelt otherwise."""
    assert forked.run(undisturbed.args, tmp_path, [strike("update", 8)]).code == -signal.SIGKILL
    shutil.copytree(tiny / "base", tmp_path / "moved")
    shutil.copytree(undisturbed.dialogues, tmp_path / "data")
    given = dict(zip(undisturbed.args[::2], undisturbed.args[1::2], strict=True))
    moved = {"--model_name": "./moved", "--dataset_name": str(tmp_path / "data")}
    args = [part for pair in (given | moved).items() for part in pair]
    resumed = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert resumed.code == 0 and "resuming from run/checkpoint-" in resumed.output
    changed = differences(undisturbed.left, left(tmp_path / "run"))
    assert set(changed) <= {"results.json", "README.md", *(name for name in changed if name.endswith((".pt", "json")))}
    assert "comparison.csv" not in changed and "metrics.jsonl" not in changed


def test_another_model_at_the_same_path_is_not(undisturbed, forked, tiny, tmp_path):
    given = dict(zip(undisturbed.args[::2], undisturbed.args[1::2], strict=True)) | {"--model_name": "model"}
    args = [part for pair in given.items() for part in pair]
    shutil.copytree(tiny / "base", tmp_path / "model")
    assert forked.run(args, tmp_path, [strike("update", 8)]).code == -signal.SIGKILL
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text(settings.read_text() + "\n")
    run = forked.run([*args, "--resume"], tmp_path, [FAST])
    assert run.code == 2 and "--resume: model_name changed since the run started" in run.error


# The comparison that was edited by hand


def test_an_empty_reward_is_named(tmp_path):
    pytest.importorskip("awswrangler")
    table = {"dialogue": ["a"], "response_before": "b", "response_after": "c", "reward_before": np.nan}
    pd.DataFrame(table | {"reward_after": 1.0, "reward_diff": 1.0}).to_csv(tmp_path / "comparison.csv", index=False)
    with pytest.raises(UserError, match="--dynamodb_table some: .*All files are saved in"):
        detox_ppo.upload_comparison("some", tmp_path)
