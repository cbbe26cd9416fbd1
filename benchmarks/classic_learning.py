"""The classic side of learning_curve.py: TRL 0.8.0's PPOTrainer trains the small world in the notebooks' loop.

It runs in the classic environment of learning_curve.py, which starts it:

    python classic_learning.py plan.json result.json

Kept as in the notebooks: the model is left in train mode by step(), so that dropout is on while it samples; the
reference is the model with its adapter switched off; response[-cap:] cuts the start token off a response that fills
its cap; min_length is 5; special tokens go to the classifier as text; with "pick": "position" the reward is the first
of the pipeline's results, which are sorted by score, with "pick": "label" it is the logit of the reward label.

Different, and never to the classic side's harm:
- Responses are sampled in one batch, up to the longest cap, and each is cut at its own. A row's tokens and dropout
  masks are drawn independently of the other rows and from left to right, so the distribution is that of sampling one
  by one; the random numbers are not, and it is many times faster.
- TRL hands an iterator to gradient clipping, which is used up after the first minibatch: from the second on nothing
  is clipped. A list takes its place, so that max_grad_norm holds on both sides.
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
    """The trainer on the starting adapter. It would ignore a reference model: it switches the adapter off instead."""
    options = plan["config"]
    transformers.set_seed(options["seed"])  # for the value head; PPOTrainer does it once more
    base = AutoModelForSeq2SeqLM.from_pretrained(options["model_name"], torch_dtype=torch.float32)
    if base.lm_head.weight.data_ptr() == base.get_input_embeddings().weight.data_ptr():
        raise RuntimeError(f"{options['model_name']}: its lm_head is tied to its embeddings")
    model = peft.PeftModel.from_pretrained(base, options["adapter_name"], is_trainable=True)
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model, is_trainable=True)
    config = PPOConfig(accelerator_kwargs={"cpu": True}, **{RENAMED.get(name, name): options[name] for name in SHARED})
    trainer = PPOTrainer(config=config, model=model, ref_model=None, tokenizer=tokenizer)
    trainer.model_params = list(trainer.model_params)
    return trainer


def sample(trainer, prompts, caps):
    """Responses as trainer.generate(prompt, max_new_tokens=cap) gives them one by one; start token in front."""
    responses = trainer.generate(
        prompts, batch_size=len(prompts), max_new_tokens=max(caps), min_length=5, top_k=0.0, top_p=1.0, do_sample=True
    )
    return [response[: cap + 1] for response, cap in zip(responses, caps)]  # noqa: B905


@torch.no_grad()
def true_scores(classifier, texts, label):
    """The reward label's logit of plain texts, whatever the trainer was paid."""
    texts = [text.strip() for text in texts]
    encoded = classifier.tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    return classifier.model(**encoded).logits[:, classifier.model.config.label2id[label]]


def sample_without_dropout(trainer, prompts, caps):
    """Other responses of the same policy, to be looked at only: the training's random numbers stay as they were."""
    with torch.random.fork_rng():
        trainer.model.eval()
        responses = sample(trainer, prompts, caps)
        trainer.model.train()
    return responses


def ppo_step(trainer, tokenizer, classifier, plan, step):
    """One step of the notebooks' loop; returns what is drawn and averaged by learning_curve.py."""
    prompts = [torch.tensor(plan["prompts"][row]) for row in step["rows"]]
    label, clean = plan["config"]["reward_label"], None
    if trainer.model.pretrained_model.get_base_model().training:  # not before the first step
        clean = sample_without_dropout(trainer, prompts, step["caps"])
    started = time.perf_counter()
    whole = sample(trainer, prompts, step["caps"])
    responses = [response[-cap:] for response, cap in zip(whole, step["caps"])]  # noqa: B905
    texts = [tokenizer.decode(response) for response in responses]
    results = classifier(
        texts, top_k=None, function_to_apply="none", batch_size=len(texts), truncation=True, max_length=512
    )
    if plan["pick"] == "position":
        paid = [result[0]["score"] for result in results]
    else:
        paid = [item["score"] for result in results for item in result if item["label"] == label]
    stats = trainer.step(prompts, responses, [torch.tensor(score) for score in paid])
    seconds = time.perf_counter() - started

    score, score_without_dropout = (
        true_scores(classifier, tokenizer.batch_decode(some, skip_special_tokens=True), label).mean().item()
        for some in (whole, clean or whole)
    )
    return {
        "score": score,
        "score_without_dropout": score_without_dropout,
        "paid": sum(paid) / len(paid),
        "kl": float(stats["objective/kl"]),
        "length": sum(len(response) - 1 for response in whole) / len(whole),
        "seconds": seconds,
    }


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    if trl.__version__ != "0.8.0":
        raise RuntimeError(f"the classic trainer is TRL 0.8.0's; this environment has {trl.__version__}")
    if plan["config"]["score_text"] != "response":
        raise RuntimeError("the classic loop here scores the response alone (--score_text response)")
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
            # Unless told not to, PEFT asks the hub whether the vocabulary was resized.
            trainer.model.pretrained_model.save_pretrained(plan["save"][str(number)], save_embedding_layers=False)
    trainer.model.pretrained_model.save_pretrained(plan["adapter"], save_embedding_layers=False)
    versions = {package.__name__: package.__version__ for package in (torch, transformers, trl, peft)}
    Path(sys.argv[2]).write_text(json.dumps({"curve": curve, "versions": versions}))


if __name__ == "__main__":
    main()
