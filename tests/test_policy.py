"""The policy: parameter counts, two adapters on one base, trainable weights, dtypes, padding and saving."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import detox_ppo
from detox_ppo import (
    FrozenLinear,
    Policy,
    Responses,
    UserError,
    load_policy,
    new_adapter,
    ppo_step,
    print_parameters,
    sft_step,
)

ADAPTERS = ("default", "reference")
CPU = torch.device("cpu")


def some_responses(small, prompts=3, seed=0):
    """Random responses of different lengths to short prompts."""
    generator = torch.Generator().manual_seed(seed)
    texts = ["\nSummarize the following conversation.\n\n#Person1#: " + "Hello. " * (i + 1) for i in range(prompts)]
    lengths = torch.arange(prompts) + 3
    size = (prompts, int(lengths.max()))
    tokens = torch.randint(3, small.policy.base.config.vocab_size, size, generator=generator)
    responses = Responses(small.tokenizer(texts).input_ids, tokens, lengths)
    responses.tokens[~responses.mask] = small.policy.base.config.pad_token_id
    return responses


def scores(small, seed=0):
    """Log-probabilities and values, (2, B, T)."""
    return torch.stack(small.policy.logprobs_and_values(some_responses(small, seed=seed)))


def adapter_tensors(policy, name):
    return {key: value.clone() for key, value in policy.named_parameters() if f".{name}." in key}


def gradients(policy, loss):
    """The gradients of a loss by parameter name."""
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def train(small, steps=2, learning_rate=1e-2):
    """A few steps of Adam on all trainable parameters, with a loss that depends on all of them."""
    optimizer = torch.optim.Adam(small.policy.trainable_parameters(), lr=learning_rate)
    for seed in range(steps):
        optimizer.zero_grad()
        scored, values = small.policy(some_responses(small, seed=seed))
        (scored.sum() + values.sum()).backward()
        optimizer.step()


def ppo(small, classifier, splits):
    """A PPO step on four rows; its metrics without timings."""
    batch, optimizer = splits["train"].select(range(4)), torch.optim.Adam(small.policy.trainable_parameters(), lr=1e-3)
    metrics = ppo_step(small.policy, small.tokenizer, classifier, optimizer, batch, 1, 0.2, small.config)
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def run_sft(small, splits):
    """An SFT step on four rows; its loss."""
    batch, optimizer = (
        splits["train"].select(range(4)),
        torch.optim.AdamW(small.policy.trainable_parameters(), weight_decay=0),
    )
    return sft_step(small.policy, small.tokenizer, optimizer, batch, 1, small.config)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def copy_of(source, target):
    shutil.copytree(source, target)
    return target


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Parameter counts


def test_counts_at_flan_t5_base(small_config, capsys):
    """On the meta device: counting needs no weights."""
    config = T5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        num_layers=12,
        num_decoder_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        base = T5ForConditionalGeneration(config)
        # transformers ties the head of every T5 built in memory, whatever the configuration.
        base.lm_head.weight = torch.nn.Parameter(torch.empty(32128, 768))
        base.requires_grad_(False)
        model = new_adapter(base, small_config(adapter_name=""))
        model.add_adapter("reference", model.peft_config["default"])
        policy = Policy(model)
    for _ in range(2):  # counting the reference must leave the policy trainable
        capsys.readouterr()
        print_parameters(policy)
        printed = capsys.readouterr().out
        assert "policy: trainable 3,538,944 of 251,116,800 = 1.41%" in printed
        assert "policy with value head: trainable 3,539,713 of 251,117,569 = 1.41%" in printed
        assert "reference: trainable 0 of 251,117,569 = 0.00%" in printed
        assert "Dropout(p=0.1" in printed and "Linear(in_features=768, out_features=1, bias=True)" in printed
    policy.freeze_encoder()  # what is left: q and v of the decoder's self- and cross-attention
    print_parameters(policy)
    printed = capsys.readouterr().out
    assert "policy: trainable 2,359,296 of 251,116,800 = 0.94%" in printed
    assert "policy with value head: trainable 2,360,065 of 251,117,569 = 0.94%" in printed
    assert sum(parameter.numel() for parameter in policy.trainable_parameters()) == 2_359_296 + 769


# Two adapters on one base


def test_new_lora_starts_as_the_identity(load_small, tiny):
    small = load_small(adapter_name="", lora_r=4)
    ids = torch.tensor([small.tokenizer("Hello there.").input_ids])
    labels = torch.tensor([[7, 8, 9, 1]])
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = base(input_ids=ids, labels=labels).logits
        logits = small.policy.model(input_ids=ids, labels=labels).logits
        with small.policy.model.disable_adapter():
            assert torch.equal(small.policy.model(input_ids=ids, labels=labels).logits, logits)
    # The faster layers compute the same function as transformers' own, up to rounding.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, bias", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_frozen_layers_match_linear(dtype, bias):
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 32, bias=bias, dtype=dtype)
    frozen = FrozenLinear(48, 32, bias=bias, dtype=dtype)
    frozen.load_state_dict(plain.state_dict())
    frozen.requires_grad_(False)
    for shape in ((5, 48), (2, 3, 48), (64, 1, 48), (65, 48)):  # up to 64 rows bfloat16 has a separate code path
        x = torch.randn(shape, dtype=dtype)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(value) for layer, value in zip((plain, frozen), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0])
        weights = torch.randn_like(outputs[0])
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


def test_fast_layers_are_the_large_frozen_ones():
    with torch.device("meta"):
        layers = {"q": torch.nn.Linear(768, 768), "small": torch.nn.Linear(64, 64)}
        # The reference's LoRA is frozen too, but must round like the policy's, so that KL starts at exactly 0.
        layers |= {"lora_A_reference": torch.nn.Linear(768, 768), "norm": torch.nn.LayerNorm(768)}
    detox_ppo.use_fast_layers(torch.nn.ModuleDict(layers))
    assert [name for name, layer in layers.items() if isinstance(layer, FrozenLinear)] == ["q"]


def test_new_lora_has_the_given_options(load_small):
    small = load_small(adapter_name="", lora_r=3, lora_alpha=12, lora_dropout=0.25, lora_target_modules="k")
    lora = small.policy.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, set(lora.target_modules)) == (3, 12, 0.25, {"k"})
    assert (lora.bias, lora.task_type) == ("none", peft.TaskType.SEQ_2_SEQ_LM)
    adapted = adapter_tensors(small.policy, "default")
    assert adapted and all(".k.lora_" in name for name in adapted)
    assert {tensor.shape[0] for name, tensor in adapted.items() if "lora_A" in name} == {3}


def test_new_lora_is_a_function_of_the_seed(load_small):
    first, again, other = (
        adapter_tensors(load_small(adapter_name="", seed=seed).policy, "default") for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_unknown_target_modules_of_a_new_lora(small_config):
    with pytest.raises(UserError, match="lora_target_modules.*nowhere"):
        load_policy(small_config(adapter_name="", lora_target_modules="nowhere"), CPU, torch.float32)


def test_policy_and_reference_both_start_as_the_loaded_adapter(small, tiny):
    saved = load_file(tiny / "adapter" / "adapter_model.safetensors")
    for name in ADAPTERS:
        loaded = peft.get_peft_model_state_dict(small.policy.model, adapter_name=name)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    # the adapter changes the base model, so the next comparison can fail
    with small.policy.model.disable_adapter():
        bare = scores(small)
    assert (scores(small) - bare).abs().max() > 1e-3
    with small.policy.as_adapter("reference"):
        reference = scores(small)
    assert torch.equal(scores(small), reference)


def test_both_adapters_share_one_base(small):
    def base_addresses():
        return {n: p.data_ptr() for n, p in small.policy.base.named_parameters() if "lora_" not in n}

    addresses = base_addresses()
    assert len(set(addresses.values())) == len(addresses) > 10
    with small.policy.as_adapter("reference"):
        assert base_addresses() == addresses
    per_adapter = [sum(p.numel() for p in adapter_tensors(small.policy, name).values()) for name in ADAPTERS]
    base = sum(p.numel() for n, p in small.policy.base.named_parameters() if "lora_" not in n)
    head = sum(p.numel() for p in small.policy.value_head.parameters())
    assert sum(p.numel() for p in small.policy.parameters()) == base + sum(per_adapter) + head
    assert per_adapter[0] == per_adapter[1]


def test_training_changes_only_the_policy(load_small):
    small = load_small()
    before = {name: parameter.clone() for name, parameter in small.policy.named_parameters()}
    with small.policy.as_adapter("reference"):
        reference_before = scores(small)[0]
    train(small)
    for name, parameter in small.policy.named_parameters():
        trained = ".default." in name or name.startswith("value_head.")
        assert torch.equal(parameter, before[name]) != trained, name
        assert parameter.requires_grad == trained, name
        assert trained or parameter.grad is None, name
    with small.policy.as_adapter("reference"):
        assert torch.equal(scores(small)[0], reference_before)
    assert not torch.equal(scores(small)[0], reference_before)


def test_as_adapter_freezes_and_restores_even_after_an_error(load_small):
    small = load_small()
    trainable = {name for name, parameter in small.policy.named_parameters() if parameter.requires_grad}
    with pytest.raises(ZeroDivisionError), small.policy.as_adapter("reference"):
        assert small.policy.model.active_adapter == "reference"
        lora = {n for n, p in small.policy.named_parameters() if p.requires_grad and "lora_" in n}
        assert lora == set()
        raise ZeroDivisionError
    assert small.policy.model.active_adapter == "default"
    assert {name for name, parameter in small.policy.named_parameters() if parameter.requires_grad} == trainable
    assert trainable == {
        *adapter_tensors(small.policy, "default"),
        "value_head.summary.weight",
        "value_head.summary.bias",
    }


# Types and dropout


@pytest.mark.parametrize("adapter_name", [None, ""], ids=["loaded adapter", "new LoRA"])
def test_small_steps_change_float32_weights_on_a_bfloat16_base(load_small, adapter_name):
    small = load_small(torch.bfloat16, **({} if adapter_name is None else {"adapter_name": adapter_name}))
    policy = small.policy
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
        elif "lora_" not in name:
            assert parameter.dtype == torch.bfloat16, name
    train(small, steps=1, learning_rate=1e-2)  # in a new LoRA, A has no gradient until B is nonzero
    before = adapter_tensors(policy, "default")
    train(small, steps=1, learning_rate=1e-5)
    after = adapter_tensors(policy, "default")
    for name in before:
        change = (after[name].double() - before[name].double()).abs()
        # Adam's first step is learning_rate for every weight with a gradient; bfloat16 would round it away.
        assert change.max() < 2e-5, name
        assert (change > 0.5e-5).double().mean() > 0.9, name


def test_scores_are_float32_and_exact_on_a_bfloat16_base(load_small):
    small, seen = load_small(torch.bfloat16), []
    head = small.policy.base.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.double()))
    responses = some_responses(small)
    logprobs, values = small.policy(responses)
    assert logprobs.dtype == values.dtype == torch.float32 and head.weight.dtype == torch.bfloat16
    (logits,), tokens = seen, responses.tokens[responses.mask]
    expected = logits.log_softmax(dim=-1)[torch.arange(len(tokens)), tokens]
    torch.testing.assert_close(logprobs[responses.mask].double(), expected, rtol=1e-6, atol=2e-6)


@pytest.fixture
def dropping(load_small, tiny, tmp_path):
    """Loads the small policy with high dropout in base and adapter."""
    adapter = copy_of(tiny / "adapter", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", lora_dropout=0.5)
    base = copy_of(tiny / "base", tmp_path / "base")
    edit_json(base / "config.json", dropout_rate=0.5)
    options = {"adapter_name": adapter, "model_name": base, "sft_steps": 2}
    return lambda **overrides: load_small(**options | overrides)


def test_train_mode_only_enables_the_dropout_of_the_lora(dropping):
    small = dropping()
    expected = scores(small)
    assert torch.equal(scores(small), expected)
    with small.policy.learning(dropout=False):
        assert small.policy.base.training and torch.equal(scores(small), expected)
    assert torch.equal(scores(small), expected)
    with small.policy.learning(dropout=True):
        assert not torch.equal(scores(small), expected) and not torch.equal(scores(small), scores(small))
    assert torch.equal(scores(small), expected)
    assert not any(module.training for module in small.policy.modules())


def test_sft_uses_dropout_and_ppo_does_not(dropping, tiny, classifier, splits):
    small, without = dropping(), dropping(adapter_name=tiny / "adapter")
    dropouts = [each.policy.model.peft_config["default"].lora_dropout for each in (small, without)]
    assert dropouts == [0.5, 0]
    metrics = ppo(small, classifier, splits)
    assert metrics == ppo(without, classifier, splits)
    assert metrics["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert same(adapter_tensors(small.policy, "default"), adapter_tensors(without.policy, "default"))
    assert run_sft(small, splits) != run_sft(without, splits)


# Padding


def test_padding_changes_neither_scores_nor_gradients(small):
    """Padding tokens have no effect at all; the padded width only changes the rounding."""
    generator = torch.Generator().manual_seed(0)
    responses = some_responses(small)
    responses.prompts = [prompt * (1 + 2 * row) for row, prompt in enumerate(responses.prompts)]
    weights = torch.randn(2, *responses.tokens.shape, generator=generator)

    def scores_and_gradients(responses, rows=slice(None)):
        scored = torch.stack(small.policy(responses))
        width = weights.shape[2]
        loss = (scored[..., :width] * weights[:, rows, : scored.shape[2]]).sum()
        return scored.detach(), gradients(small.policy, loss)

    scored, expected = scores_and_gradients(responses)
    assert (scored[:, responses.mask] != 0).all() and (scored[:, ~responses.mask] == 0).all()
    assert all(gradient.any() for gradient in expected.values())
    responses.tokens[~responses.mask] = 7
    again, exact = scores_and_gradients(responses)
    assert torch.equal(again, scored) and same(exact, expected)

    tokens = torch.nn.functional.pad(responses.tokens, (0, 20), value=7)
    wider = Responses(responses.prompts, tokens, responses.lengths)
    again, wide = scores_and_gradients(wider)
    torch.testing.assert_close(again[..., : scored.shape[2]], scored, rtol=0, atol=5e-5)
    assert not again[..., scored.shape[2] :].any()
    alone = []
    for row in range(3):
        again, one = scores_and_gradients(responses.select([row]), [row])
        alone.append(one)
        torch.testing.assert_close(again[:, 0], scored[:, row, : again.shape[2]], rtol=0, atol=5e-5)
    for name, gradient in expected.items():
        close = {"rtol": 1e-3, "atol": 1e-4 * gradient.abs().max().item()}
        torch.testing.assert_close(wide[name], gradient, **close)
        torch.testing.assert_close(sum(one[name] for one in alone), gradient, **close)


def test_scoring_restores_the_model(small, monkeypatch):
    """Afterwards the head computes logits at every position again, also after an error."""
    ids = torch.tensor([small.tokenizer("Hello there.").input_ids])

    def logits():
        with torch.no_grad():
            return small.policy.model(input_ids=ids, decoder_input_ids=ids).logits

    expected = logits()
    scores(small)
    assert torch.equal(logits(), expected)

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(small.policy, "decode", fail)
    with pytest.raises(ZeroDivisionError):
        scores(small)
    assert torch.equal(logits(), expected)


# Saving


def test_saved_adapter_loads_with_peft(load_small, tiny, tmp_path):
    small = load_small()
    train(small)
    with small.policy.as_adapter("reference"):
        detox_ppo.save_adapter(small.policy, tmp_path / "adapter")
        detox_ppo.save_adapter(small.policy, tmp_path / "start", "reference")
    start, given = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "start", tiny / "adapter"))
    assert same(start, given) and not (tmp_path / "start" / "value_head.safetensors").exists()
    head = load_file(tmp_path / "adapter" / "value_head.safetensors")
    assert head.keys() == {"v_head.summary.weight", "v_head.summary.bias"}
    assert torch.equal(head["v_head.summary.weight"], small.policy.value_head.summary.weight)
    assert torch.equal(head["v_head.summary.bias"], small.policy.value_head.summary.bias)
    assert not [path for path in (tmp_path / "adapter").iterdir() if path.is_dir()]  # the reference is not saved

    base = AutoModelForSeq2SeqLM.from_pretrained(tiny / "base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([small.tokenizer("Hello there.").input_ids])
    labels = torch.tensor([[7, 8, 9, 1]])
    with torch.no_grad():
        expected = small.policy.model(input_ids=ids, labels=labels).logits
        logits = loaded(input_ids=ids, labels=labels).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    # and as the starting adapter of another run
    again = load_small(adapter_name=tmp_path / "adapter")
    assert torch.equal(scores(again)[0], scores(small)[0])


def test_the_saved_adapter_is_the_one_evaluated(small_config, tiny, tmp_path, monkeypatch, quick):
    """The evaluation reads the file, not the weights in memory: here the file is the starting adapter."""
    save = detox_ppo.save_adapter

    def save_the_start(policy, directory, *name):
        save(policy, directory, *name)
        shutil.copy(tiny / "adapter" / "adapter_model.safetensors", directory)

    monkeypatch.setattr(detox_ppo, "save_adapter", save_the_start)
    options = {"max_ppo_steps": 1, "learning_rate": 0.05, "eval_samples": 6}  # more than one batch
    results = detox_ppo.run(small_config(output_dir=tmp_path / "run", **options))
    assert results["quality"]["after"] == results["quality"]["before"]
    assert results["toxicity"]["after"] == results["toxicity"]["before"]


# Loading other formats


def as_pickle(adapter, tensors):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")


def test_pickled_adapter_gives_the_same_policy(load_small, small, tiny, tmp_path):
    adapter = copy_of(tiny / "adapter", tmp_path / "adapter")
    as_pickle(adapter, load_file(adapter / "adapter_model.safetensors"))
    assert torch.equal(scores(load_small(adapter_name=adapter)), scores(small))


# Gradient checkpointing


def saved_for_gradients(small):
    """Gradients of a simple loss, and the bytes of the saved activations."""
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # seeds the dropout
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        logprobs, values = small.policy(some_responses(small, prompts=12))
    # The model's own parameters are not activations.
    for parameter in small.policy.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return gradients(small.policy, logprobs.sum() + values.sum()), sum(saved.values())


def test_gradient_checkpointing_gives_the_same_gradients_with_less_memory(dropping):
    plain, checkpointed = dropping(), dropping(gradient_checkpointing=True)
    for dropout in (False, True):
        with plain.policy.learning(dropout), checkpointed.policy.learning(dropout):
            (expected, plain_bytes), (actual, checkpointed_bytes) = map(saved_for_gradients, (plain, checkpointed))
        assert checkpointed_bytes < 0.4 * plain_bytes
        assert same(expected, actual) and all(gradient.any() for gradient in expected.values())


def test_gradient_checkpointing_does_not_change_sft_and_ppo(dropping, classifier, splits):
    plain, checkpointed = dropping(), dropping(gradient_checkpointing=True)
    assert run_sft(plain, splits) == run_sft(checkpointed, splits)
    assert ppo(plain, classifier, splits) == ppo(checkpointed, classifier, splits)
    assert same(plain.policy.adapters(), checkpointed.policy.adapters())


# Threads


@pytest.mark.parametrize("given, parameters, threads", [(None, None, 1), ("2", None, 2), (None, 2e7, 2)])
def test_a_small_model_uses_one_thread_by_default(small_config, monkeypatch, given, parameters, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if parameters:
        monkeypatch.setattr(T5ForConditionalGeneration, "num_parameters", lambda *_, **__: parameters)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        detox_ppo.load_everything(small_config(), CPU, torch.float32)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
