"""The classic side of learning_curve.py: TRL 0.8.0's PPOTrainer trains the toy example with the notebooks' loop.

learning_curve.py starts it in the classic environment:

    python classic_learning.py plan.json result.json

Same as in the notebooks:
- step() leaves the model in train mode, so sampling uses dropout.
- The reference is the model with its adapter disabled.
- response[-max_new_tokens:] cuts off the start token of a response of full length.
- min_length is 5.
- The classifier reads special tokens as text.
- With "pick": "position" the reward is the pipeline's first result; the pipeline sorts its results by score. With
  "pick": "label" the reward is the logit of the reward label.

Different, but never a disadvantage for the classic side:
- All responses are sampled in one batch, up to the largest max_new_tokens, and then cut to their own. A row's tokens
  and dropout masks are drawn from left to right and independently of other rows. The distribution is therefore the
  same as when sampling one by one; the random numbers differ, and it is many times faster.
- TRL passes an iterator to gradient clipping. It is exhausted after the first minibatch, so later ones are not
  clipped. A list replaces it, so max_grad_norm applies on both sides.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
import trl
from classic_trainer import load_classifier, load_tokenizer
from transformers import AutoModelForSeq2SeqLM
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer

# PPOConfig's names where they differ from the options of detox_ppo.py
RENAMED = {"adaptive_kl": "adap_kl_ctrl", "target_kl": "target", "kl_horizon": "horizon"}
SHARED = ("seed", "learning_rate", "batch_size", "mini_batch_size", "ppo_epochs", "init_kl_coef", "gamma", "lam")
SHARED += ("cliprange", "cliprange_value", "vf_coef", "ratio_threshold", "max_grad_norm", "score_clip", *RENAMED)


def load_trainer(plan, tokenizer):
    """The trainer with the starting adapter. A PEFT model needs no ref_model: TRL disables the adapter instead."""
    options = plan["config"]
    transformers.set_seed(options["seed"])  # for the value head; PPOTrainer sets it again
    base = AutoModelForSeq2SeqLM.from_pretrained(options["model_name"], torch_dtype=torch.float32)
    is_tied = base.lm_head.weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    if is_tied and base.config.model_type == "t5":  # a BART's head is tied
        raise RuntimeError(f"{options['model_name']}: its lm_head is tied to its embeddings")
    model = peft.PeftModel.from_pretrained(base, options["adapter_name"], is_trainable=True)
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model, is_trainable=True)
    config = PPOConfig(accelerator_kwargs={"cpu": True}, **{RENAMED.get(name, name): options[name] for name in SHARED})
    trainer = PPOTrainer(config=config, model=model, ref_model=None, tokenizer=tokenizer)
    trainer.model_params = list(trainer.model_params)
    return trainer


def sample(trainer, prompts, limits):
    """Responses, each up to its limit (max_new_tokens), with the start token in front."""
    responses = trainer.generate(
        prompts,
        batch_size=len(prompts),
        max_new_tokens=max(limits),
        min_length=5,
        top_k=0.0,
        top_p=1.0,
        do_sample=True,
    )
    return [response[: limit + 1] for response, limit in zip(responses, limits)]  # noqa: B905


@torch.no_grad()
def true_scores(classifier, texts, label):
    """The reward label's logits for texts without special tokens, whatever reward the trainer used."""
    texts = [text.strip() for text in texts]
    encoded = classifier.tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    return classifier.model(**encoded).logits[:, classifier.model.config.label2id[label]]


def sample_without_dropout(trainer, prompts, limits):
    """Responses of the same policy for evaluation only; the random state of the training does not change."""
    with torch.random.fork_rng():
        trainer.model.eval()
        responses = sample(trainer, prompts, limits)
        trainer.model.train()
    return responses


def ppo_step(trainer, tokenizer, classifier, plan, step):
    """One step of the notebooks' loop; returns the figures that learning_curve.py plots and averages."""
    prompts = [torch.tensor(plan["prompts"][row]) for row in step["rows"]]
    label, limits, without_dropout = plan["config"]["reward_label"], step["caps"], None
    if trainer.model.pretrained_model.get_base_model().training:  # not before the first step
        without_dropout = sample_without_dropout(trainer, prompts, limits)
    started = time.perf_counter()
    sampled = sample(trainer, prompts, limits)
    responses = [response[-limit:] for response, limit in zip(sampled, limits)]  # noqa: B905
    texts = [tokenizer.decode(response) for response in responses]
    results = classifier(
        texts, top_k=None, function_to_apply="none", batch_size=len(texts), truncation=True, max_length=512
    )
    if plan["pick"] == "position":
        rewards = [result[0]["score"] for result in results]
    else:
        rewards = [item["score"] for result in results for item in result if item["label"] == label]
    stats = trainer.step(prompts, responses, [torch.tensor(reward) for reward in rewards])
    seconds = time.perf_counter() - started

    def mean_score(batch):
        texts = tokenizer.batch_decode(batch, skip_special_tokens=True)
        return true_scores(classifier, texts, label).mean().item()

    return {
        "score": mean_score(sampled),
        "score_without_dropout": mean_score(without_dropout or sampled),
        "paid": sum(rewards) / len(rewards),  # the mean reward
        "kl": float(stats["objective/kl"]),
        "length": sum(len(response) - 1 for response in sampled) / len(sampled),
        "seconds": seconds,
    }


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    if trl.__version__ != "0.8.0":
        raise RuntimeError(f"the classic trainer needs TRL 0.8.0, but this environment has {trl.__version__}")
    if plan["config"]["score_text"] != "response":
        raise RuntimeError("the classic loop scores only the response: set --score_text response")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tokenizer = load_tokenizer(plan["config"]["model_name"])
    trainer = load_trainer(plan, tokenizer)
    classifier = load_classifier(plan["config"]["reward_model_name"], "cpu")
    curve = []
    for number, step in enumerate(plan["steps"], start=1):
        curve.append(ppo_step(trainer, tokenizer, classifier, plan, step))
        print(json.dumps(curve[-1]), flush=True)
        if str(number) in plan["save"]:
            # By default PEFT asks the hub whether the vocabulary was resized.
            trainer.model.pretrained_model.save_pretrained(plan["save"][str(number)], save_embedding_layers=False)
    trainer.model.pretrained_model.save_pretrained(plan["adapter"], save_embedding_layers=False)
    versions = {package.__name__: package.__version__ for package in (torch, transformers, trl, peft)}
    Path(sys.argv[2]).write_text(json.dumps({"curve": curve, "versions": versions}))


if __name__ == "__main__":
    main()
