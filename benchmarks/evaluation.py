"""Summaries a second in the evaluation, sampled and greedy, beside transformers' generate in batches of the same size.

    python benchmarks/evaluation.py              # true shapes, some 13 minutes on 2 cores
    python benchmarks/evaluation.py --short      # narrow models, in this process: does it start?

FLAN-T5-base's shapes with random weights (see step_time.py) and a new LoRA, prompts of DialogSum's lengths. Both sides
summarize the same prompts in turns (A B A B), in batches of rows of similar length, up to --max_new_tokens. Random
weights practically never end, so every summary takes them all; of a model whose summaries end, ended rows leave our
batches and stay in generate's. The whole evaluation is detox_ppo.evaluate_policy in both decodings: it has the KL to
the reference and the classifier's scores besides.

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
HELD_OUT = 2005  # of DialogSum, by the notebooks' filter and split
BATCH = 24  # evaluate_policy takes more than the PPO batch only of narrow models


def load_generate(models, config):
    """transformers' model with a new LoRA as PEFT makes it; returns a function from prompts to token ids."""
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
        how = {"do_sample": True, "top_k": 0} if decoding == "sampled" else {"do_sample": False}
        with torch.inference_mode():
            return model.generate(**batch, max_new_tokens=config.eval_max_new_tokens, **how)[:, 1:]

    return write


def load_ours(policy, config):
    """The same by detox_ppo.generate."""
    import torch

    import detox_ppo

    caps = (config.eval_max_new_tokens, config.eval_max_new_tokens)

    @torch.no_grad()
    def write(prompts, decoding):
        sampled = [detox_ppo.random_stream(0, detox_ppo.EVALUATION, row) for row in range(len(prompts))]
        return detox_ppo.generate(policy, prompts, sampled if decoding == "sampled" else None, caps).tokens

    return write


def measure(options, models, scratch):
    """Seconds for all prompts, of both sides in both decodings by round; of the whole evaluation once."""
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
        write(batches[0][:2], "greedy")  # to warm up
    written = {}
    for _ in range(options.rounds):
        for side, write in sides.items():
            for decoding in DECODINGS:
                synchronize()
                started = time.perf_counter()
                tokens = [write(batch, decoding) for batch in batches]
                synchronize()
                seconds[side][decoding].append(time.perf_counter() - started)
                written[side, decoding] = [line for batch in tokens for line in plain(tokenizer, batch)]
    pairs = list(zip(written["ours", "greedy"], written["transformers", "greedy"], strict=True))
    started = time.perf_counter()
    for decoding in DECODINGS:
        detox_ppo.evaluate_policy(policy, tokenizer, classifier, rows, config, decoding, decoding == "greedy")
    return seconds, time.perf_counter() - started, sum(ours == theirs for ours, theirs in pairs), len(pairs)


def plain(tokenizer, tokens):
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="DIR", help="repositories that tests/hub.py made (default: made now)")
    parser.add_argument("--output_dir", default="checkpoints/evaluation", help="for models that are made now")
    parser.add_argument("--prompts", type=int, help="to summarize (default 48)")
    parser.add_argument("--max_new_tokens", type=int, help="a summary's (default 60)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--short", action="store_true", help="for CI: narrow models, a few short summaries")
    options = parser.parse_args()
    options.prompts = options.prompts or (4 if options.short else 48)
    options.max_new_tokens = options.max_new_tokens or (8 if options.short else 60)
    options.seed, options.mini_batch_size, options.dialogues, options.prompt_tokens = 0, 4, None, None
    options.response_lengths = [25, 70]  # of PPO's steps, of which there are none
    return options


@step_time.refusals()
def main():
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="evaluation_") as scratch:
        _, models = step_time.prepare(options, Path(scratch))
        import torch

        if not options.short:
            torch.set_num_threads(options.threads)
        seconds, whole, equal, count = measure(options, models, Path(scratch))
    print("\n| summaries a second | ours | transformers | ratio |\n|---|---|---|---|")
    last = {"dtype": options.dtype, "short": options.short, "prompts": count, "equal_greedy": equal}
    for decoding in DECODINGS:
        speeds = {side: [count / took[decoding][i] for i in range(options.rounds)] for side, took in seconds.items()}
        ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]
        cells = [f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})" for values in speeds.values()]
        print(f"| {decoding} | {' | '.join(cells)} | {' and '.join(f'{ratio:.2f}' for ratio in ratios)} |")
        last[decoding] = speeds | {"ratio": ratios}
    last["hours_of_held_out"] = whole / count * HELD_OUT / 3600
    print(f"{equal} of {count} greedy summaries are those of transformers")
    print(f"whole evaluation: {whole / count:.2f} s a prompt, {last['hours_of_held_out']:.2f} h for {HELD_OUT:,}")
    print(json.dumps(last))


if __name__ == "__main__":
    main()
