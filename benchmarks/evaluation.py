"""Summaries per second in the evaluation, sampled and greedy, compared with transformers' generate.

    python benchmarks/evaluation.py              # true shapes, about 13 minutes on 2 cores
    python benchmarks/evaluation.py --short      # smoke test: narrow models, in this process

The model has FLAN-T5-base's shapes with random weights (see step_time.py) and a new LoRA; the prompts have DialogSum's
lengths. Both sides take turns (A B A B) and summarize the same prompts in the same batches of similar length, up to
--max_new_tokens. Random weights almost never end a summary, so all have full length. With a model that ends its
summaries, our batches drop finished rows; generate's keep them. The entire evaluation is timed too: it is
detox_ppo.evaluate_policy in both decodings, with the KL to the reference and the classifier's scores.

The last line of the output is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import step_time

DECODINGS = ("sampled", "greedy")
HELD_OUT = 2005  # rows of DialogSum, with the notebooks' filter and split
BATCH = 24  # rows per batch of both sides; evaluate_policy chooses its own number: detox_ppo.decoding_rows


def load_generate(models, config):
    """Load transformers' model with a new LoRA from PEFT; return a function from prompts to token ids."""
    import peft
    import torch
    import transformers

    dtype = getattr(torch, config.dtype)
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(models["base"], dtype=dtype).eval().to(config.device)
    lora = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "target_modules": ["q", "v"]}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **lora)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["base"])

    def write(prompts, decoding):
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(config.device)
        sampling = {"do_sample": True, "top_k": 0} if decoding == "sampled" else {"do_sample": False}
        with torch.inference_mode():
            return model.generate(**batch, max_new_tokens=config.eval_max_new_tokens, **sampling)[:, 1:]

    return write


def load_ours(policy, config):
    """The same with detox_ppo.generate."""
    import torch

    import detox_ppo

    limits = (config.eval_max_new_tokens, config.eval_max_new_tokens)

    @torch.no_grad()
    def write(prompts, decoding):
        generators = None
        if decoding == "sampled":
            generators = [detox_ppo.random_stream(0, detox_ppo.EVALUATION, row) for row in range(len(prompts))]
        return detox_ppo.generate(policy, prompts, generators, limits).tokens

    return write


def measure(options, models, scratch):
    """Time both sides.

    Returns:
        seconds for all prompts as {side: {decoding: [one per round]}}, seconds of one entire evaluation, the number of
        greedy summaries that are equal on both sides, and the number of prompts.
    """
    import torch

    import detox_ppo

    options.batch_size, options.steps = options.prompts, 0
    dataset, _ = step_time.make_plan(options, models, scratch)
    arguments = step_time.our_arguments(options, models, dataset, scratch / "run", options.dtype)
    arguments += ["--eval_max_new_tokens", str(options.max_new_tokens), "--batch_size", str(BATCH)]
    config = detox_ppo.parse_config(arguments)
    config.device, dtype = detox_ppo.resolve_device(config)
    policy, tokenizer = detox_ppo.load_policy(config, config.device, dtype)
    classifier = detox_ppo.ToxicityClassifier(config, config.device)
    rows = detox_ppo.load_dialogues(str(dataset), config).select(range(options.prompts))
    rows = detox_ppo.build_dataset(None, tokenizer, config, rows)["test"]
    prompts = sorted(rows["input_ids"], key=len)
    batches = [prompts[first : first + config.batch_size] for first in range(0, len(prompts), config.batch_size)]
    sides = {"ours": load_ours(policy, config), "transformers": load_generate(models, config)}
    seconds = {side: {decoding: [] for decoding in DECODINGS} for side in sides}
    synchronize = torch.cuda.synchronize if "cuda" in str(config.device) else lambda: None
    for write in sides.values():
        write(batches[0][:2], "greedy")  # warm-up
    texts = {}
    for _ in range(options.rounds):
        for side, write in sides.items():
            for decoding in DECODINGS:
                synchronize()
                started = time.perf_counter()
                tokens = [write(batch, decoding) for batch in batches]
                synchronize()
                seconds[side][decoding].append(time.perf_counter() - started)
                texts[side, decoding] = [text for batch in tokens for text in decode(tokenizer, batch)]
    pairs = list(zip(texts["ours", "greedy"], texts["transformers", "greedy"], strict=True))
    started = time.perf_counter()
    for decoding in DECODINGS:
        detox_ppo.evaluate_policy(policy, tokenizer, classifier, rows, config, decoding, decoding == "greedy")
    return seconds, time.perf_counter() - started, sum(ours == theirs for ours, theirs in pairs), len(pairs)


def decode(tokenizer, tokens):
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="DIR", help="directory written by tests/hub.py (default: create models)")
    parser.add_argument("--output_dir", default="checkpoints/evaluation", help="for models that are created")
    parser.add_argument("--prompts", type=int, help="number of prompts (default 48)")
    parser.add_argument("--max_new_tokens", type=int, help="per summary (default 60)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--short", action="store_true", help="smoke test for CI: narrow models, a few short summaries")
    options = parser.parse_args()
    options.prompts = options.prompts or (4 if options.short else 48)
    options.max_new_tokens = options.max_new_tokens or (8 if options.short else 60)
    options.seed, options.mini_batch_size, options.dialogues, options.prompt_tokens = 0, 4, None, None
    options.response_lengths = [25, 70]  # unused: there are no PPO steps
    return options


@step_time.user_errors()
def main():
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="evaluation_") as scratch:
        _, models = step_time.prepare(options, Path(scratch))
        import torch

        if not options.short:
            torch.set_num_threads(options.threads)
        seconds, evaluation_seconds, equal, count = measure(options, models, Path(scratch))
    print("\n| summaries a second | ours | transformers | ratio |\n|---|---|---|---|")
    last = {"dtype": options.dtype, "short": options.short, "prompts": count, "equal_greedy": equal}
    for decoding in DECODINGS:
        speeds = {side: [count / took for took in timings[decoding]] for side, timings in seconds.items()}
        ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]
        cells = [f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})" for values in speeds.values()]
        ratio_cell = " and ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {decoding} | {' | '.join(cells)} | {ratio_cell} |")
        last[decoding] = speeds | {"ratio": ratios}
    hours = last["hours_of_held_out"] = evaluation_seconds / count * HELD_OUT / 3600
    print(f"{equal} of {count} greedy summaries are equal to transformers'")
    print(f"entire evaluation: {evaluation_seconds / count:.2f} s per prompt, {hours:.2f} h for {HELD_OUT:,} prompts")
    print(json.dumps(last))


if __name__ == "__main__":
    main()
