r"""Record what TRL 0.8.0 itself computes, as the fixture of test_ppo_math.py.

TRL 0.8.0 does not run with a current transformers, so it needs a separate environment:

    pip install torch==2.13.0 trl==0.8.0 transformers==4.47.0 peft==0.14.0 accelerate==1.2.0 \
        datasets==3.2.0 "numpy<2" "pandas<2.3" "pyarrow==17.*" rich tyro
    python tests/trl_reference.py

It writes trl_reference.json and the checkpoint trl_reference_t5/ next to this file. Every output in the JSON
was computed by a function or method of TRL; none of its formulas is repeated here.
"""

import json
import os
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import logprobs_from_logits, masked_mean, masked_var, masked_whiten
from trl.trainer.utils import AdaptiveKLController, FixedKLController

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "trl_reference_t5"
VOCAB = 24
PAD, EOS, UNK = 0, 1, 2
START = PAD  # T5 starts its decoder with the padding token
CAP = 4  # max_new_tokens in the generation case
SAMPLING_SEED = 35  # one of the three sampled responses ends early, two reach max_new_tokens


def plain(x):
    """Tensors as nested lists; nine significant digits give a float32 back exactly."""
    if isinstance(x, torch.Tensor):
        return plain(x.detach().tolist())
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.9g}")
    return x


def seeded(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def prefix_mask(lengths, width, first=0):
    return torch.tensor([[int(first <= t < n) for t in range(width)] for n in lengths])


def write_checkpoint():
    """A random T5 whose output head is not tied to its embeddings.

    transformers 5 ties the two in every T5 built in memory, whatever the config, and keeps them separate only
    when it loads a checkpoint that has its own lm_head.weight. So only a checkpoint gives the same model in
    both versions.
    """
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=START,
    )
    model = transformers.T5ForConditionalGeneration(config)
    randn = seeded(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "layer_norm" in name:
                weight.copy_(1 + 0.1 * randn(*weight.shape))
            else:
                weight.copy_(0.4 * randn(*weight.shape))
    model.save_pretrained(CHECKPOINT, safe_serialization=True)
    (CHECKPOINT / "model.safetensors").chmod(0o644)


def make_trainer():
    words = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(str(CHECKPOINT))
    randn = seeded(2)
    with torch.no_grad():
        model.v_head.summary.weight.copy_(0.3 * randn(1, 16))
        model.v_head.summary.bias.copy_(0.3 * randn(1))
    # explicitly the CPU: otherwise accelerate moves the model to any available GPU
    config = PPOConfig(batch_size=3, mini_batch_size=3, accelerator_kwargs={"cpu": True})
    return PPOTrainer(config, model, None, tokenizer)


def masked_statistics():
    cases = []
    for seed, lengths, width in ((10, (6, 2, 4), 6), (11, (1, 5), 7)):
        values, mask = 2 + 3 * seeded(seed)(len(lengths), width), prefix_mask(lengths, width)
        cases.append(
            {
                "values": values,
                "mask": mask,
                "mean": masked_mean(values, mask),
                "var": masked_var(values, mask),
                "whitened": masked_whiten(values, mask),
                "whitened_keeping_mean": masked_whiten(values, mask, shift_mean=False),
            }
        )
    return cases


def rewards(trainer):
    trainer.kl_ctl = FixedKLController(0.2)
    cases = []
    # the second case has masks as in TRL's own forward pass, empty at the first position
    for seed, lengths, width, first in ((20, (7, 3, 5, 1), 7, 0), (21, (6, 2, 4), 6, 1)):
        randn = seeded(seed)
        scores = 2 * randn(len(lengths))
        logprobs = -2 + randn(len(lengths), width)
        ref_logprobs = logprobs + 0.5 * randn(len(lengths), width)
        mask = prefix_mask(lengths, width, first)
        total, non_score, kl = trainer.compute_rewards(scores, logprobs, ref_logprobs, mask)
        cases.append(
            {
                "kl_coef": 0.2,
                "scores": scores,
                "logprobs": logprobs,
                "ref_logprobs": ref_logprobs,
                "mask": mask,
                "rewards": total,
                "non_score_rewards": non_score,
                "kl": kl,
            }
        )
    return cases


def advantages(trainer):
    cases = []
    for seed, gamma, lam in ((30, 1.0, 0.95), (31, 0.97, 0.9)):
        trainer.config.gamma, trainer.config.lam = gamma, lam
        randn = seeded(seed)
        lengths, width = (7, 3, 5, 1), 7
        values, reward, mask = randn(4, width), randn(4, width), prefix_mask(lengths, width)
        _, whitened, returns = trainer.compute_advantages(values, reward, mask)
        cases.append(
            {
                "gamma": gamma,
                "lam": lam,
                "values": values,
                "rewards": reward,
                "mask": mask,
                "advantages": whitened,
                "returns": returns,
            }
        )
    return cases


def losses(trainer):
    cases = []
    # mean and spread of the change of the log-probabilities
    for name, seed, mean, spread in (
        ("near", 40, 0.0, 0.05),
        ("clipped", 41, 0.0, 0.6),
        ("skipped", 42, 3, 0.3),
    ):
        randn = seeded(seed)
        lengths, width = (6, 3, 5), 6
        shape = (len(lengths), width)
        old_logprobs = -2 + randn(*shape)
        logprobs = old_logprobs + mean + spread * randn(*shape)
        old_values, moved = randn(*shape), spread * randn(*shape)
        inputs = {
            "old_logprobs": old_logprobs,
            "values": old_values,
            "logits": randn(*shape, 8),
            "vpreds": old_values + moved,
            "logprobs": logprobs,
            "mask": prefix_mask(lengths, width),
            "advantages": randn(*shape),
            "returns": old_values + 0.7 * randn(*shape),
        }
        policy, _, stats = trainer.loss(**inputs)
        cases.append(
            {
                "name": name,
                "cliprange": trainer.config.cliprange,
                "cliprange_value": trainer.config.cliprange_value,
                "ratio_threshold": trainer.config.ratio_threshold,
                "inputs": inputs,
                "policy_loss": policy,
                "value_loss": stats["loss/value"],
                "clipfrac": stats["policy/clipfrac"],
                "value_clipfrac": stats["val/clipfrac"],
                "approxkl": stats["policy/approxkl"],
                "entropy": stats["policy/entropy"],
                "ratio": masked_mean(stats["policy/ratio"], inputs["mask"]),
            }
        )
    return cases


def kl_controllers():
    kls = [0.5, 2.0, 5.0, 5.9, 6.0, 6.1, 7.0, 9.0, 20.0, -3.0]
    cases = []
    for horizon in (10000, 100):
        adaptive, fixed = AdaptiveKLController(0.2, 6, horizon), FixedKLController(0.2)
        path, fixed_path = [], []
        for kl in kls:
            adaptive.update(kl, 16)
            fixed.update(kl, 16)
            path.append(float(adaptive.value))
            fixed_path.append(float(fixed.value))
        cases.append(
            {
                "init": 0.2,
                "target": 6,
                "horizon": horizon,
                "batch_size": 16,
                "kls": kls,
                "adaptive": path,
                "fixed": fixed_path,
            }
        )
    return cases


def token_logprobs():
    logits = 3 * seeded(50)(2, 5, 9)
    tokens = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(51))
    return {"logits": logits, "tokens": tokens, "logprobs": logprobs_from_logits(logits, tokens)}


def forward(trainer, queries, responses):
    """TRL's own pass over responses: the source of step()'s log-probabilities, values and masks."""
    queries, responses = [torch.tensor(q) for q in queries], [torch.tensor(r) for r in responses]
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, logits, values, masks = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, return_logits=True
        )
    return {"logprobs": logprobs, "values": values, "masks": masks, "logits": logits}


def first_token_masked(trainer):
    queries = [[5, 9, 14, 3, EOS], [7, 7, EOS], [20, 11, 4, EOS]]
    # with the start token in front, as generate() returns them and step() receives them
    responses = [[START, 8, 15, 3, 22, EOS], [START, 13, EOS], [START, 6, 19, 10, EOS]]
    head = trainer.model.v_head.summary
    return {
        "queries": queries,
        "responses": responses,
        "value_head": {"weight": head.weight[0], "bias": head.bias[0]},
        **forward(trainer, queries, responses),
    }


def empty_response(trainer):
    """The model generates EOS first. TRL's mask is then empty, but its compute_rewards needs a last token."""
    queries, responses = [[5, 9, EOS], [7, 7, EOS]], [[START, EOS], [START, EOS]]
    out = forward(trainer, queries, responses)
    trainer.kl_ctl = FixedKLController(0.2)
    try:
        trainer.compute_rewards(torch.ones(2), out["logprobs"], out["logprobs"], out["masks"])
        error = None
    except IndexError as caught:
        error = type(caught).__name__
    return {"queries": queries, "responses": responses, "error": error, **out}


def length_cap(trainer):
    """The output of generate() at max_new_tokens, and what TRL computes for it after [-max_new_tokens:].

    That slice removes the prompt from a decoder-only response. An encoder-decoder response has no prompt: the
    slice does not change a short response and removes the start token from one of maximum length.
    """
    queries = [[5, 9, 14, 3, EOS], [7, 7, EOS], [20, 11, 4, EOS]]
    sampling = {"max_new_tokens": CAP, "do_sample": True, "top_k": 0, "top_p": 1.0}
    transformers.set_seed(SAMPLING_SEED)
    trainer.model.eval()
    with torch.no_grad():
        batched = trainer.generate([torch.tensor(q) for q in queries], batch_size=3, **sampling)
        single = [trainer.generate(torch.tensor(q), **sampling).squeeze(0) for q in queries]
    returned = plain(batched)
    sliced = plain([response[-CAP:] for response in batched])
    return {
        "max_new_tokens": CAP,
        "queries": queries,
        "returned_one_by_one": single,
        "returned": returned,
        "sliced": sliced,
        "on_returned": forward(trainer, queries, returned),
        "on_sliced": forward(trainer, queries, sliced),
    }


def main():
    if trl.__version__ != "0.8.0":
        raise SystemExit(f"these are to be the values of TRL 0.8.0, not of {trl.__version__}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    write_checkpoint()
    trainer = make_trainer()
    reference = {
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
        "masked_statistics": masked_statistics(),
        "rewards": rewards(trainer),
        "advantages": advantages(trainer),
        "losses": losses(trainer),
        "kl_controllers": kl_controllers(),
        "token_logprobs": token_logprobs(),
        "first_token_masked": first_token_masked(trainer),
        "empty_response": empty_response(trainer),
        "length_cap": length_cap(trainer),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(plain(value))}" for key, value in reference.items()]
    (HERE / "trl_reference.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
