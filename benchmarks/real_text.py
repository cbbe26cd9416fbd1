"""What the recipe does to real dialogues: PPO on a T5 with FLAN-T5's words, trained from scratch on DialogSum.

    python benchmarks/real_text.py --dialogsum DIR --rude FILE --reward_model DIR --judge_model DIR \\
        [--tokenizer google/flan-t5-base] [--recipes NAME ...] [--seeds 0 1 2] [--rows 200 | -1]

DialogSum's train, dev and test.jsonl lie in DIR; FILE is a jsonl of rude dialogues without summaries, of which the
last 400 are held out; the reward model has the labels nothate and hate, the judge a label toxic. Four stages follow
one another:

    base       a T5 of 13 million parameters, from scratch, on all of DialogSum but the 2,005 rows that a run holds out
    adapter    a LoRA that detox_ppo.py tunes on it (--sft_steps): what is to be detoxified
    recipes    PPO by detox_ppo.py, or by the classic trainer (TRL 0.8.0), once a seed
    judgement  every adapter summarizes held-out DialogSum and held-out rude dialogues, sampled and greedily, with the
               same random numbers as the starting adapter; reward model and judge score the summaries

All of it stays in output_dir, where a benchmark that was interrupted goes on. On two cores the base takes 100 minutes;
on one of them the adapter takes 13, a recipe of 100 steps 10 to 15, and a judgement of 200 rows of each set 4.
"""

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import learning_curve
import numpy as np
import pandas as pd
import step_time  # puts the repository on sys.path

ROOT = step_time.ROOT
# FLAN-T5's vocabulary takes 8 of the 13 million parameters.
SHAPE = {"d_model": 256, "d_ff": 512, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
RUDE_HELD_OUT = 400
DECODINGS = ("sampled", "greedy")
SETS = {"held_out": "DialogSum", "rude": "rude dialogues"}
# Real summaries of this base end after some 35 tokens.
COMMON = "--output_min_length 60 --output_max_length 100 --eval_samples 1 --save_steps 50 --device cpu"
# What --short puts in the place of any of them.
SHORT = "--max_ppo_steps 2 --batch_size 4 --mini_batch_size 2 --sft_batch_size 4 --output_min_length 4 "
SHORT += "--output_max_length 8 --eval_max_new_tokens 8"
# Options of detox_ppo.py by name: the notebooks', which are its defaults; what the small world needed ("center"); and
# what differs from the center, since of an option that is given twice the last counts. Of "mixed" prompts half are
# rude dialogues. What has "classic" is trained by TRL 0.8.0's loop instead, as published (the reward by its position
# in a sorted list) or mended (by its label).
CENTER = "--score_text response --max_ppo_steps 100 --learning_rate 3e-4 --lr_scheduler_type linear "
CENTER += "--init_kl_coef 0.05 --adaptive_kl false --max_grad_norm 1 --lam 1 --vf_coef 0.003 --cliprange_value 10"
BEST = f"{CENTER} --learning_rate 1e-3"
RECIPES = {
    "notebooks": {"options": ""},
    "center": {"options": CENTER},
    "lr-1e-4": {"options": f"{CENTER} --learning_rate 1e-4"},
    "lr-1e-3": {"options": BEST},
    "lr-1e-3-constant": {"options": f"{BEST} --lr_scheduler_type constant"},
    "lr-1e-3-steps-300": {"options": f"{BEST} --max_ppo_steps 300"},
    "kl-0.2": {"options": f"{CENTER} --init_kl_coef 0.2"},
    "kl-0.01": {"options": f"{CENTER} --init_kl_coef 0.01"},
    "query_response": {"options": f"{CENTER} --score_text query_response"},
    "mixed": {"options": CENTER, "prompts": "mixed"},
    "mixed-lr-1e-3": {"options": BEST, "prompts": "mixed"},
    "mixed-lr-1e-3-kl-0.02": {"options": f"{BEST} --init_kl_coef 0.02", "prompts": "mixed"},
    "mixed-lr-1e-3-kl-0.01": {"options": f"{BEST} --init_kl_coef 0.01", "prompts": "mixed"},
    "mixed-lr-3e-3-kl-0.01": {"options": f"{CENTER} --init_kl_coef 0.01 --learning_rate 3e-3", "prompts": "mixed"},
    "classic": {"options": BEST, "classic": "classic"},
    "mended": {"options": BEST, "classic": "mended"},
}


def read_lines(path):
    return pd.read_json(path, lines=True, dtype=False)


def write_lines(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_json(path, orient="records", lines=True, force_ascii=False)


def make_data(options):
    """Write what the stages read: rows of the base, of the adapter, of PPO's two collections, and held-out ones."""
    import detox_ppo

    config, directory = detox_ppo.DetoxConfig(eval_samples=1), options.output_dir / "data"
    train, *others = (read_lines(options.dialogsum / f"{name}.jsonl") for name in ("train", "dev", "test"))
    others[1] = pd.concat(
        others[1][["dialogue", name]].rename(columns={name: "summary"})
        for name in others[1].columns
        if name.startswith("summary")
    )
    tokenizer = detox_ppo.AutoTokenizer.from_pretrained(options.tokenizer)
    splits = detox_ppo.build_dataset(detox_ppo.load_dialogues(str(options.dialogsum), config), tokenizer, config)
    trained, held_out = splits["train"].to_pandas(), splits["test"].to_pandas()
    base = pd.concat([train, *others])
    base = base[~base["dialogue"].isin(held_out["dialogue"])]
    rude = read_lines(options.rude)
    rude, rude_held_out = rude[: -options.rude_held_out], rude[-options.rude_held_out :]
    columns = ["dialogue", "summary"]
    write_lines(base[columns], directory / "base.jsonl")
    write_lines(pd.concat([trained, held_out])[columns], directory / "adapter.jsonl")
    write_lines(held_out[columns], directory / "held_out.jsonl")
    write_lines(rude_held_out[["dialogue"]], directory / "rude.jsonl")
    write_lines(rude[["dialogue"]], directory / "rude_train.jsonl")
    write_lines(trained[["dialogue"]], directory / "dialogsum" / "train.jsonl")
    # Half of the prompts are rude.
    mixed = pd.concat([rude, trained.sample(min(len(rude), len(trained)), random_state=0)])
    write_lines(mixed[["dialogue"]], directory / "mixed" / "train.jsonl")
    for name in ("dialogsum", "mixed"):
        write_lines(held_out[:1][["dialogue"]], directory / name / "test.jsonl")
    print(f"base {len(base):,} pairs, adapter {len(trained):,}, rude {len(rude):,}", end="; ")
    print(f"held out {len(held_out):,} and {len(rude_held_out):,}", flush=True)


def child(function, plan, directory, options):
    """Run a function of this file on a plan in a process of its own, its output in the directory's log."""
    directory.mkdir(parents=True, exist_ok=True)
    asked = directory / f"{function}.json"
    asked.write_text(json.dumps(plan))
    if options.short:
        return globals()[function](plan)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", function, str(asked)]
    return learning_curve.run_child(command, directory, f"{function} in {directory}")


def encoded(tokenizer, dialogues, texts):
    """Rows of the notebooks' prompts with summaries, or without dialogues of texts that are to be repeated."""
    import detox_ppo

    prompts = texts if dialogues is None else [detox_ppo.build_prompt(text) for text in dialogues]
    columns = {}
    for name, of, longest in (("input_ids", prompts, 384), ("labels", texts, 96)):
        columns[name] = detox_ppo.token_ids(tokenizer, of, truncation=True, max_length=longest)
    # A token of the summary costs some four of the prompt, since the vocabulary is so large.
    pairs = zip(columns["input_ids"], columns["labels"], strict=True)
    return datasets.Dataset.from_dict(columns | {"length": [len(prompt) + 4 * len(text) for prompt, text in pairs]})


def fit(model, tokenizer, rows, directory, plan, **how):
    """Train by transformers' own trainer, which goes on from its newest checkpoint; what is done is only loaded."""
    import transformers

    arguments = transformers.Seq2SeqTrainingArguments(
        directory,
        per_device_train_batch_size=plan["batch_size"],
        learning_rate=1e-3,
        warmup_steps=plan["warmup_steps"],
        weight_decay=0.01,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
        logging_steps=20,
        save_steps=100,
        save_total_limit=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **how,
    )
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=8)
    trainer = transformers.Seq2SeqTrainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train(resume_from_checkpoint=any(directory.glob("checkpoint-*")))


def train_base(plan):
    """Train the base from scratch: first to repeat random tokens, then on summaries and on utterances to repeat.

    On summaries alone a model this small says the same of every dialogue after two epochs, since it has to find out
    from 12,000 of them how to look anything up. In random tokens there is nothing else to learn.
    """
    import torch
    import transformers

    directory, shape = Path(plan["directory"]), plan["shape"]
    torch.set_num_threads(plan["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(plan["tokenizer"])
    table, rude = read_lines(plan["rows"]), read_lines(plan["rude"])
    summaries = encoded(tokenizer, list(table["dialogue"]), list(table["summary"]))
    texts = [line for text in [*dict.fromkeys(table["dialogue"]), *rude["dialogue"]] for line in text.split("\n")]
    utterances = encoded(tokenizer, None, [text for text in texts if text.strip()])
    torch.manual_seed(0)
    config = transformers.T5Config(
        **shape,
        vocab_size=32128,
        d_kv=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        scale_decoder_outputs=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    torch.nn.init.normal_(model.shared.weight, std=shape["d_model"] ** -0.5)  # tied to the head meanwhile
    known, drawn = sorted({token for ids in summaries["input_ids"] for token in ids}), np.random.default_rng(0)
    lengths = drawn.integers(4, 17, plan["repeating_steps"] * plan["batch_size"])
    tokens = [[*drawn.choice(known, length).tolist(), tokenizer.eos_token_id] for length in lengths]
    rows = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens, "length": lengths.tolist()})
    fit(model, tokenizer, rows, directory / "repeating", plan, num_train_epochs=1)
    count = min(len(summaries), len(utterances)) // 2
    mixed = datasets.concatenate_datasets([summaries, utterances.shuffle(seed=0).select(range(count))])
    fit(model, tokenizer, mixed, directory / "summarizing", plan, num_train_epochs=plan["epochs"])
    # As FLAN-T5's: a head of its own.
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False, "dropout_rate": 0.1}))
    (directory / "base.json").write_text(json.dumps(plan))


def make_base(options):
    """The base, in a child with all the threads that are to be had, unless it is there."""
    directory, data = options.output_dir / "base", options.output_dir / "data"
    plan = {"directory": str(directory), "rows": str(data / "base.jsonl"), "rude": str(data / "rude_train.jsonl")}
    plan |= {"tokenizer": str(options.tokenizer), "epochs": options.epochs, "threads": options.threads}
    plan |= {"shape": options.shape, "batch_size": options.batch_size, "repeating_steps": options.repeating_steps}
    plan |= {"warmup_steps": min(200, options.repeating_steps // 2)}
    done = directory / "base.json"
    if not done.exists():
        child("train_base", plan, directory, options)
    return directory


def detox(options, arguments, directory, label):
    """A run of detox_ppo.py that goes on where it stopped."""
    directory.mkdir(parents=True, exist_ok=True)
    arguments = [*arguments, "--device", "cpu", "--output_dir", str(directory), "--resume"]
    if options.short:
        import detox_ppo

        return detox_ppo.run(detox_ppo.parse_config(arguments))
    return learning_curve.run_child([sys.executable, "detox_ppo.py", *arguments], directory, label)


def make_adapter(options, base):
    """The LoRA that every recipe starts from."""
    directory = options.output_dir / "adapter"
    if not (directory / "results.json").exists():
        rows = ["--dataset_name", str(options.output_dir / "data" / "adapter.jsonl")]
        text = f"{SHORT if options.short else ''} --sft_steps {options.sft_steps} --max_ppo_steps 0"
        steps = f"{text} --eval_samples {options.choosing}".split()
        models = ["--model_name", str(base), "--reward_model_name", str(options.reward_model)]
        detox(options, [*models, *rows, *steps], directory, "tuning the adapter")
    return directory / "adapter"


def recipe_arguments(options, name, base, adapter, seed):
    recipe, rows = RECIPES[name], options.output_dir / "data"
    text = f"{recipe['options']} {SHORT if options.short else ''}"
    models = [
        "--model_name",
        str(base),
        "--adapter_name",
        str(adapter),
        "--reward_model_name",
        str(options.reward_model),
    ]
    rows = ["--dataset_name", str(rows / recipe.get("prompts", "dialogsum"))]
    return [*models, *rows, *COMMON.split(), *text.split(), "--seed", str(seed)]


def train(options, name, base, adapter, seed):
    """Train a recipe with a seed, unless that was done before; returns the directory with its adapter."""
    directory = options.output_dir / name / f"seed-{seed}"
    arguments = recipe_arguments(options, name, base, adapter, seed)
    if (directory / "done.json").exists():
        done = json.loads((directory / "done.json").read_text())
        if done["asked"] != arguments:
            step_time.stop(f"{directory} was made with other options, {done['asked']}: delete it")
        return directory
    if pick := RECIPES[name].get("classic"):
        import detox_ppo

        config = detox_ppo.parse_config(arguments)
        tokenizer = detox_ppo.AutoTokenizer.from_pretrained(base)
        rows = detox_ppo.load_dialogues(config.dataset_name, config)
        held_out = detox_ppo.load_dialogues(config.dataset_name, config, split="test")
        prompts = detox_ppo.build_dataset(rows, tokenizer, config, held_out)["train"]
        directory.mkdir(parents=True, exist_ok=True)
        learning_curve.train_classic(options.classic_python, pick, config, prompts, [], directory, name)
    else:
        detox(options, arguments, directory, f"{name}, seed {seed}")
    (directory / "done.json").write_text(json.dumps({"asked": arguments}))
    return directory


def judge(plan):
    """Let an adapter summarize the held-out dialogues; a file of what was found for each set and decoding."""
    import peft

    import detox_ppo

    config = detox_ppo.parse_config(plan["arguments"])
    device, dtype = detox_ppo.resolve_device(config)
    policy, tokenizer = detox_ppo.load_policy(config, device, dtype)  # the reference is the starting adapter
    classifier = detox_ppo.HateClassifier(config, device)
    peft.set_peft_model_state_dict(policy.model, peft.load_peft_weights(plan["adapter"], device="cpu"))
    for name, path in plan["sets"].items():
        rows = detox_ppo.load_dialogues(path, config)
        rows = rows.select(range(min(plan["rows"], len(rows)) if plan["rows"] > 0 else len(rows)))
        rows = detox_ppo.build_dataset(None, tokenizer, config, rows)["test"]
        tables = detox_ppo.evaluate_both(policy, tokenizer, classifier, rows, config, name)
        for decoding, table in tables.items():
            table.insert(0, "dialogue", list(rows["dialogue"]))
            table.insert(1, "summary", list(rows["summary"]))
            write_lines(table, Path(plan["directory"]) / f"{name}-{decoding}.jsonl")
        if plan["human"] and any(rows["summary"]):  # measure_human would take minutes to score the dialogues as well
            told = list(rows["summary"])
            human = pd.DataFrame({"response": told, "summary_toxicity": classifier.toxicity(classifier.logits(told))})
            detox_ppo.add_judge({"human": human}, config, device)
            write_lines(human, Path(plan["directory"]) / f"{name}-human.jsonl")


def judged(options, directory, adapter, base, start):
    """The tables of an adapter, by set and decoding, judged now unless they lie there."""
    where = directory / f"judged-{options.rows}"
    names = list(itertools.product(SETS, DECODINGS))
    files = {(name, decoding): where / f"{name}-{decoding}.jsonl" for name, decoding in names}
    if not files[names[-1]].exists():
        arguments = ["--model_name", str(base), "--adapter_name", str(start), "--reward_model_name"]
        arguments += [str(options.reward_model), "--judge_model_name", str(options.judge_model), "--device", "cpu"]
        arguments += SHORT.split() if options.short else []
        plan = {"arguments": arguments, "adapter": str(adapter), "directory": str(where), "rows": options.rows}
        plan["human"] = adapter == start  # once is enough
        plan |= {"sets": {name: str(options.output_dir / "data" / f"{name}.jsonl") for name in SETS}}
        child("judge", plan, where, options)
    return {key: read_lines(path) for key, path in files.items()}


def measured(start, after):
    """What a judged adapter changed, by set and decoding: paired statistics of both classifiers, and the quality."""
    import detox_ppo

    found = {}
    for key, table in after.items():
        before, summaries = start[key], list(table["summary"])
        quality = [detox_ppo.summary_quality(told, summaries) for told in (before, table)]
        block = {
            name: detox_ppo.paired_statistics(before[name], table[name], seed=0)
            for name in ("summary_toxicity", "judge_toxicity")
        }
        toxic = [(told["summary_toxicity"] > detox_ppo.TOXIC).astype(float) for told in (before, table)]
        block["toxic"] = detox_ppo.paired_statistics(*toxic, seed=0)
        block["rougeL"] = [told.get("rougeL") for told in quality]
        block["length"] = [float(told["length"].mean()) for told in (before, table)]
        block["reward"] = [float(told["reward"].mean()) for told in (before, table)]
        block["kl"] = quality[1].get("kl")
        block["worse"] = detox_ppo.degradation(*quality)
        found[" ".join(key)] = block
    return found


def change(statistics, scale=1, digits=4):
    """Means before and after with the interval of the change, as a cell of the table."""
    paired = statistics["paired_difference"]
    means = [scale * statistics[when]["mean"] for when in ("before", "after")]
    interval = [scale * paired[end] for end in ("ci_low", "ci_high")]
    return f"{means[0]:.{digits}f} → {means[1]:.{digits}f} [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"


def table_of(results, name):
    """A Markdown table for a held-out set: a line a recipe and seed."""
    columns = ["recipe", "seed", "score with dialogue", "sampled", "greedy", "judge, sampled", "judge, greedy"]
    columns += ["toxic, sampled, %", "toxic, greedy, %", "ROUGE-L, sampled", "ROUGE-L, greedy", "tokens, greedy"]
    columns += ["KL, sampled"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for result in results:
        blocks = [result["measured"][f"{name} {decoding}"] for decoding in DECODINGS]
        sampled, greedy = blocks
        cells = [result["recipe"], str(result["seed"]), "{:.2f} → {:.2f}".format(*sampled["reward"])]
        cells += [change(block[key]) for key in ("summary_toxicity", "judge_toxicity") for block in blocks]
        cells += [change(block["toxic"], 100, 1) for block in blocks]
        cells += ["" if None in block["rougeL"] else "{:.4f} → {:.4f}".format(*block["rougeL"]) for block in blocks]
        cells += ["{:.1f} → {:.1f}".format(*greedy["length"]), f"{sampled['kl']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def samples_of(start, after, count=3):
    """Greedy summaries of rude dialogues before and after: those whose toxicity fell most, and rose most."""
    difference = after["summary_toxicity"] - start["summary_toxicity"]
    chosen = [*difference.nsmallest(count).index, *difference.nlargest(count).index]
    return "\n".join(
        f"    {difference[i]:+.3f}\n      before: {start['response'][i]}\n      after:  {after['response'][i]}"
        for i in chosen
    )


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogsum", type=Path, required=True, help="directory of train, dev and test.jsonl")
    parser.add_argument("--rude", type=Path, required=True, help="jsonl of rude dialogues")
    parser.add_argument("--tokenizer", default="google/flan-t5-base", help="hub id or directory")
    parser.add_argument("--reward_model", required=True, help="hub id or directory")
    parser.add_argument("--judge_model", required=True, help="hub id or directory")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "checkpoints" / "real-text")
    parser.add_argument("--epochs", type=float, default=2, help="of the base's training")
    parser.add_argument("--repeating_steps", type=int, default=3000, help="of the base before its first summary")
    parser.add_argument("--batch_size", type=int, default=32, help="of the base's training")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the base's training; the rest has one")
    parser.add_argument("--sft_steps", type=int, default=300, help="of the adapter's tuning")
    parser.add_argument("--classic_python", metavar="PATH", help="interpreter with TRL 0.8.0 (default: made by pip)")
    parser.add_argument("--rude_held_out", type=int, default=RUDE_HELD_OUT)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=200, help="of each held-out set to judge by; -1: all")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time")
    parser.add_argument("--short", action="store_true", help="for CI: a smaller base, two steps, in this process")
    options = parser.parse_args(arguments)
    options.shape, options.choosing = SHAPE, 100
    if options.short:
        options.shape = SHAPE | {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 1}
        options.epochs, options.repeating_steps, options.batch_size = 0.02, 2, 16
        options.sft_steps, options.rows, options.choosing = 2, 4, 4
    for name in ("output_dir", "dialogsum", "rude", "tokenizer", "reward_model", "judge_model"):
        if name == "output_dir" or Path(getattr(options, name)).exists():  # what is not there is a hub's
            setattr(options, name, Path(getattr(options, name)).absolute())
    return options


@step_time.refusals()
def main():
    if sys.argv[1:2] == ["--child"]:
        return globals()[sys.argv[2]](json.loads(Path(sys.argv[3]).read_text()))
    options = parse_options(sys.argv[1:])
    os.chdir(ROOT)
    make_data(options)
    if any("classic" in RECIPES[name] for name in options.recipes) and not options.classic_python:
        options.classic_python = step_time.make_classic_environment(options.output_dir / "classic-environment")
    base = make_base(options)
    start = make_adapter(options, base)
    before = judged(options, options.output_dir / "start", start, base, start)

    def run(which):
        name, seed = which
        directory = train(options, name, base, start, seed)
        after = judged(options, directory, directory / "adapter", base, start)
        print(f"{name}, seed {seed}: greedy summaries of rude dialogues")
        print(samples_of(before["rude", "greedy"], after["rude", "greedy"]), flush=True)
        return {"recipe": name, "seed": seed, "measured": measured(before, after)}

    with ThreadPoolExecutor(options.jobs) as executor:
        results = list(executor.map(run, itertools.product(options.recipes, options.seeds)))
    for name, title in SETS.items():
        print(f"\n{title}, {len(before[name, 'greedy'])} rows\n\n{table_of(results, name)}")
    human = read_lines(options.output_dir / "start" / f"judged-{options.rows}" / "held_out-human.jsonl")
    means = [f"{human[f'{name}_toxicity'].mean():.4f}" for name in ("summary", "judge")]
    print(f"\nHuman summaries of DialogSum's: toxicity {means[0]}, by the judge {means[1]}")
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=1))
    print(json.dumps({"recipes": len(results)}))


if __name__ == "__main__":
    main()
