"""The classic side of step_time.py: TRL 0.8.0's PPOTrainer, used as in the published notebooks.

step_time.py starts it in the classic environment, which it creates or which --classic_python names:

    python classic_trainer.py plan.json result.json

Its computations are unchanged. The timed phases are generate (one prompt at a time), the classifier's pipeline, and
inside step() the two forward passes without gradients, of the policy and of the reference. The rest of step() is the
optimization. Two differences from the notebooks make it faster or smaller, never slower: the classifier is loaded
once instead of three times, and its inputs are truncated to 512 tokens, where the notebooks would fail.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import accelerate
import datasets
import numpy
import peft
import torch
import transformers
import trl
from step_time import peak_memory  # step_time needs only the standard library at import
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model


def load_tokenizer(directory):
    """Load tokenizer.json itself: tokenizer_config.json may name classes that transformers 4 does not have."""
    config = json.loads((Path(directory) / "tokenizer_config.json").read_text())
    tokens = {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(directory) / "tokenizer.json"),
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **tokens,
    )


def load_trainer(plan, tokenizer):
    dtype = getattr(torch, plan["dtype"])
    base = AutoModelForSeq2SeqLM.from_pretrained(plan["base"], torch_dtype=dtype)
    # The embeddings are 10% of the model: with a tied head the two sides would not have the same shapes.
    if base.lm_head.weight.data_ptr() == base.get_input_embeddings().weight.data_ptr():
        raise RuntimeError(f"{plan['base']}: lm_head is tied to the embeddings")
    lora = peft.LoraConfig(
        r=plan["lora_r"],
        lora_alpha=plan["lora_r"],
        lora_dropout=0.05,
        target_modules=["q", "v"],
        bias="none",
        task_type=peft.TaskType.SEQ_2_SEQ_LM,
    )
    model = peft.get_peft_model(base, lora)
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model, torch_dtype=dtype, is_trainable=True)
    config = PPOConfig(
        batch_size=plan["batch_size"],
        mini_batch_size=plan["mini_batch_size"],
        ppo_epochs=1,
        learning_rate=1.41e-5,
        accelerator_kwargs={"cpu": plan["device"] == "cpu"},
    )
    return PPOTrainer(config=config, model=model, ref_model=create_reference_model(model), tokenizer=tokenizer)


def load_classifier(directory, device):
    # The notebooks keep the classifier in float32, whatever the base's dtype.
    model = AutoModelForSequenceClassification.from_pretrained(directory, torch_dtype=torch.float32)
    return transformers.pipeline(
        "text-classification", model=model, tokenizer=load_tokenizer(directory), framework="pt", device=device
    )


def time_forward_passes(trainer):
    """Return a list that collects the seconds of each forward pass without gradients in step()."""
    seconds, forward = [], trainer.batched_forward_pass

    def timed(*args, **kwargs):
        started = time.perf_counter()
        result = forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            seconds.append(time.perf_counter() - started)
        return result

    trainer.batched_forward_pass = timed
    return seconds


def count_classified(model):
    """Return a list that collects the length in tokens, without padding, of each text the classifier reads."""
    lengths = []

    def record(module, args, kwargs):
        lengths.extend(kwargs["attention_mask"].sum(dim=1).tolist())

    model.register_forward_pre_hook(record, with_kwargs=True)
    return lengths


def ppo_step(trainer, tokenizer, classifier, step, forward_seconds, classified, score_text):
    """One step of the notebooks' loop; returns seconds by phase and lengths in tokens."""
    prompts = [torch.tensor(prompt, device=trainer.accelerator.device) for prompt in step["prompts"]]
    queries = [tokenizer.decode(prompt) for prompt in prompts]
    forward_seconds.clear()
    classified.clear()
    clock = [time.perf_counter()]

    responses, lengths = [], []
    for prompt, limit in zip(prompts, step["caps"]):  # noqa: B905
        response = trainer.generate(prompt, max_new_tokens=limit, min_length=5, top_k=0.0, top_p=1.0, do_sample=True)
        lengths.append(response.shape[1] - 1)  # without the start token
        responses.append(response.squeeze()[-limit:])
    clock.append(time.perf_counter())

    texts = [tokenizer.decode(response) for response in responses]
    if score_text == "query_response":
        texts = [query + text for query, text in zip(queries, texts)]  # noqa: B905
    scored = classifier(
        texts, top_k=None, function_to_apply="none", batch_size=len(texts), truncation=True, max_length=512
    )
    scores = [torch.tensor(item["score"]) for result in scored for item in result if item["label"] == "nothate"]
    clock.append(time.perf_counter())

    trainer.step(prompts, responses, scores)
    clock.append(time.perf_counter())

    if len(forward_seconds) != 2:
        raise RuntimeError(f"step() ran {len(forward_seconds)} forward passes without gradients, not 2")
    logprobs, reference = forward_seconds
    seconds = {
        "sample": clock[1] - clock[0],
        "logprobs": logprobs,
        "reference": reference,
        "rollout": clock[1] - clock[0] + logprobs + reference,
        "score": clock[2] - clock[1],
        "optimize": clock[3] - clock[2] - logprobs - reference,
        "step": clock[3] - clock[0],
    }
    return {"seconds": seconds, "responses": lengths, "classified": list(classified)}


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    if trl.__version__ != "0.8.0":
        raise RuntimeError(f"the classic trainer needs TRL 0.8.0, but this environment has {trl.__version__}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tokenizer = load_tokenizer(plan["base"])
    trainer = load_trainer(plan, tokenizer)
    classifier = load_classifier(plan["classifier"], plan["device"])
    forward_seconds, classified = time_forward_passes(trainer), count_classified(classifier.model)
    arguments = (forward_seconds, classified, plan["score_text"])
    steps = [ppo_step(trainer, tokenizer, classifier, step, *arguments) for step in plan["steps"]]
    packages = (torch, transformers, trl, peft, accelerate, datasets, numpy)
    result = {
        "steps": steps,
        "peak_memory": peak_memory(plan["device"]),
        "threads": torch.get_num_threads(),
        "versions": {package.__name__: package.__version__ for package in packages},
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
