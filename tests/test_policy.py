"""The policy: parameter counts, two adapters on one base, what is trained and what is refused."""

import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    T5Config,
    T5ForConditionalGeneration,
)

import detox_ppo
from detox_ppo import (
    FrozenLinear,
    Policy,
    Responses,
    UserError,
    load_policy,
    parse_config,
    print_parameters,
    score_responses,
)

pytestmark = pytest.mark.usefixtures("quick")


ADAPTERS = ("default", "reference")


def some_responses(small, prompts=3, seed=0):
    """Made-up responses of different lengths to short prompts; what they say does not matter here."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = small.policy.base.config.vocab_size
    texts = ["\nSummarize the following conversation.\n\n#Person1#: " + "Hello. " * (i + 1) for i in range(prompts)]
    lengths = torch.arange(prompts) + 3
    tokens = torch.randint(3, vocabulary, (prompts, int(lengths.max())), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length:] = small.policy.base.config.pad_token_id
    return Responses(
        small.tokenizer(texts).input_ids, tokens, lengths, torch.zeros(prompts, dtype=torch.bool), support=None
    )


def logprobs(small, seed=0):
    with torch.no_grad():
        return score_responses(small.policy, some_responses(small, seed=seed))[0]


def adapter_tensors(policy, name):
    return {key: value.clone() for key, value in policy.named_parameters() if f".{name}." in key}


def train(small, steps=2, learning_rate=1e-2):
    """A few steps of Adam on everything that is trainable, with a loss that reaches all of it."""
    trainable = [parameter for parameter in small.policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=learning_rate)
    for seed in range(steps):
        optimizer.zero_grad()
        scored, values = score_responses(small.policy, some_responses(small, seed=seed))
        (scored.sum() + values.sum()).backward()
        optimizer.step()


def copy_of(source, target):
    shutil.copytree(source, target)
    return target


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Parameter counts


@pytest.fixture
def flan_t5_base(monkeypatch):
    """load_policy's own policy at FLAN-T5-base's shapes, without weights: 1 GB that no count needs."""
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
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        # transformers ties the head of every T5 built in memory, whatever its configuration says.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(32128, 768))
    tokenizer = SimpleNamespace(
        pad_token="<pad>", pad_token_id=0, eos_token="</s>", eos_token_id=1, all_special_ids=[]
    )
    tokenizer.get_vocab = lambda: {"word": 32099}
    for name, loaded in (("AutoConfig", config), ("AutoTokenizer", tokenizer)):
        monkeypatch.setattr(getattr(detox_ppo, name), "from_pretrained", lambda *_, loaded=loaded, **__: loaded)
    monkeypatch.setattr(detox_ppo, "load_model", lambda *_: model)
    with torch.device("meta"):  # where copying the adapter's weights needs no data
        return load_policy(parse_config([]), torch.device("meta"), torch.float32)[0]


def test_counts_at_flan_t5_base(flan_t5_base, capsys):
    assert flan_t5_base.count_parameters("default") == (3_538_944, 251_116_800)
    print_parameters(flan_t5_base)
    printed = capsys.readouterr().out
    assert "policy: trainable 3,538,944 of 251,116,800 = 1.41%" in printed
    assert "policy with value head: trainable 3,539,713 of 251,117,569 = 1.41%" in printed
    assert "reference: trainable 0 of 251,117,569 = 0.00%" in printed
    assert "Dropout(p=0.1" in printed and "Linear(in_features=768, out_features=1, bias=True)" in printed
    # printing the reference's count leaves the policy trainable
    assert flan_t5_base.count_parameters("default")[0] == 3_538_944


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


def test_frozen_layers_compute_what_linear_does():
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 32)
    frozen = FrozenLinear(48, 32)
    frozen.load_state_dict(plain.state_dict())
    frozen.requires_grad_(False)
    for shape in ((5, 48), (2, 3, 48)):
        x = torch.randn(shape)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(value) for layer, value in zip((plain, frozen), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0])
        weights = torch.randn_like(outputs[0])
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


def test_fast_layers_are_the_frozen_ones(small):
    layers = {name: layer for name, layer in small.policy.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert any(isinstance(layer, FrozenLinear) for layer in layers.values())
    for name, layer in layers.items():
        # The reference's LoRA is frozen too, but has to round as the policy's does: KL starts at 0 exactly.
        assert isinstance(layer, FrozenLinear) == ("lora_" not in name and name != "value_head.summary")


def test_new_lora_is_as_the_options_say(load_small):
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
        load_policy(small_config(adapter_name="", lora_target_modules="nowhere"), torch.device("cpu"), torch.float32)


def test_policy_and_reference_both_start_as_the_loaded_adapter(small, tiny):
    saved = load_file(tiny / "adapter" / "adapter_model.safetensors")
    for name in ADAPTERS:
        loaded = peft.get_peft_model_state_dict(small.policy.model, adapter_name=name)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    # the adapter is no identity, so the next comparison can fail
    with torch.no_grad(), small.policy.model.disable_adapter():
        bare = score_responses(small.policy, some_responses(small))[0]
    assert (logprobs(small) - bare).abs().max() > 1e-3
    with small.policy.adapter("reference"):
        reference = logprobs(small)
    kl = (logprobs(small) - reference).sum()
    assert kl.item() == 0


def test_both_adapters_share_one_base(small):
    def base_addresses():
        return {n: p.data_ptr() for n, p in small.policy.base.named_parameters() if "lora_" not in n}

    addresses = base_addresses()
    assert len(set(addresses.values())) == len(addresses) > 10
    with small.policy.adapter("reference"):
        assert base_addresses() == addresses
    per_adapter = [sum(p.numel() for p in adapter_tensors(small.policy, name).values()) for name in ADAPTERS]
    base = sum(p.numel() for n, p in small.policy.base.named_parameters() if "lora_" not in n)
    head = sum(p.numel() for p in small.policy.value_head.parameters())
    assert sum(p.numel() for p in small.policy.parameters()) == base + sum(per_adapter) + head
    assert per_adapter[0] == per_adapter[1]


def test_training_moves_the_policy_and_nothing_else(load_small):
    small = load_small()
    before = {name: parameter.clone() for name, parameter in small.policy.named_parameters()}
    with small.policy.adapter("reference"):
        reference_before = logprobs(small)
    train(small)
    for name, parameter in small.policy.named_parameters():
        trained = ".default." in name or name.startswith("value_head.")
        assert torch.equal(parameter, before[name]) != trained, name
        assert parameter.requires_grad == trained, name
        assert trained or parameter.grad is None, name
    with small.policy.adapter("reference"):
        assert torch.equal(logprobs(small), reference_before)
    assert not torch.equal(logprobs(small), reference_before)


def test_the_other_adapter_is_left_frozen_and_given_back_even_after_an_error(load_small):
    small = load_small()
    trainable = {name for name, parameter in small.policy.named_parameters() if parameter.requires_grad}
    with pytest.raises(ZeroDivisionError), small.policy.adapter("reference"):
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
    train(small, steps=1, learning_rate=1e-2)  # a new LoRA gives its A a gradient only once its B is not zero
    before = adapter_tensors(policy, "default")
    train(small, steps=1, learning_rate=1e-5)
    after = adapter_tensors(policy, "default")
    for name in before:
        change = (after[name].double() - before[name].double()).abs()
        # Adam's first step is learning_rate for every weight with a gradient; bfloat16 would round it away.
        assert change.max() < 2e-5, name
        assert (change > 0.5e-5).double().mean() > 0.9, name


def test_value_head_reads_bfloat16_and_answers_float32(load_small):
    small = load_small(torch.bfloat16)
    scored, values = score_responses(small.policy, some_responses(small))
    assert scored.dtype == values.dtype == torch.float32


def test_dropout_is_off_everywhere(load_small, tiny, tmp_path):
    adapter = copy_of(tiny / "adapter", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", lora_dropout=0.5)
    base = copy_of(tiny / "base", tmp_path / "base")
    edit_json(base / "config.json", dropout_rate=0.5)
    small = load_small(adapter_name=adapter, model_name=base)

    def assert_off():
        assert [name for name, module in small.policy.named_modules() if module.training] == []
        responses = some_responses(small)
        first, again = (score_responses(small.policy, responses) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])

    assert_off()
    with small.policy.adapter("reference"):
        assert_off()
    assert_off()
    train(small, steps=1)
    assert_off()
    # the dropout is there, so the comparisons above can fail
    small.policy.train()
    assert not torch.equal(logprobs(small), logprobs(small))


# Saving


def test_saved_adapter_loads_with_peft(load_small, tiny, tmp_path):
    small = load_small()
    train(small)
    with small.policy.adapter("reference"):
        detox_ppo.save_adapter(small.policy, tmp_path / "adapter")
    head = load_file(tmp_path / "adapter" / "value_head.safetensors")
    assert head.keys() == {"v_head.summary.weight", "v_head.summary.bias"}
    assert torch.equal(head["v_head.summary.weight"], small.policy.value_head.summary.weight)
    assert torch.equal(head["v_head.summary.bias"], small.policy.value_head.summary.bias)
    assert not [path for path in (tmp_path / "adapter").iterdir() if path.is_dir()]  # "reference" stays here

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
    assert torch.equal(logprobs(again), logprobs(small))


# Loading what others made


def as_pickle(adapter, tensors):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")


def test_pickled_adapter_gives_the_same_policy(load_small, small, tiny, tmp_path):
    adapter = copy_of(tiny / "adapter", tmp_path / "adapter")
    as_pickle(adapter, load_file(adapter / "adapter_model.safetensors"))
    assert torch.equal(logprobs(load_small(adapter_name=adapter)), logprobs(small))


def test_policy_reads_dimensions_from_the_model(small):
    assert isinstance(small.policy, Policy)
    assert small.policy.value_head.summary.in_features == small.policy.base.config.d_model


# Activations computed twice


def gradients(small):
    """Gradients of a made-up loss, and the bytes that were kept for them."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    small.policy.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, values = score_responses(small.policy, some_responses(small, prompts=12))
    # What the model itself holds is no activation.
    for parameter in small.policy.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    (logprobs.sum() + values.sum()).backward()
    found = {name: p.grad.clone() for name, p in small.policy.named_parameters() if p.requires_grad}
    return found, sum(kept.values())


def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory(load_small):
    expected, plain = gradients(load_small())
    small = load_small(gradient_checkpointing=True)
    found, kept = gradients(small)
    assert kept < 0.3 * plain
    assert not any(module.training for module in small.policy.modules())  # which would turn dropout on
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(gradient, found[name]), name


def test_gradient_checkpointing_leaves_sampling_and_tuning_as_they_are(small_config, tmp_path):
    options = {"sft_steps": 2, "max_ppo_steps": 1, "eval_samples": 2, "lora_dropout": 0.5, "adapter_name": ""}
    for name, checkpointing in (("plain", False), ("again", True)):
        config = small_config(gradient_checkpointing=checkpointing, output_dir=tmp_path / name, **options)
        detox_ppo.run(config)
    for name in ("sft_adapter", "adapter"):
        plain, again = (load_file(tmp_path / run / name / "adapter_model.safetensors") for run in ("plain", "again"))
        assert all(torch.equal(plain[key], again[key]) for key in plain)
