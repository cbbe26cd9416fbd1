"""What a recipe changes in a real summarizer of real dialogues: toxicity, content and length before and after.

    python benchmarks/real_text.py --dialogsum DIR --rude FILE --model_name DIR --reward_model DIR --judge_model DIR \\
        [--recipes NAME ...] [--seeds 0 1 2] [--rows 200 | -1]

--dialogsum is the directory with DialogSum's train.jsonl. --rude is a jsonl of rude dialogues without summaries; the
last 400 are held out. The model is an encoder-decoder that summarizes and was not trained on the 2,005 rows that a run
holds out. The reward model needs the labels nothate and hate, the judge a label toxic. Three stages:

    start       a new LoRA, which does not change the model
    recipes     PPO with detox_ppo.py or with the classic trainer (TRL 0.8.0), once per seed
    evaluation  each adapter summarizes held-out DialogSum and held-out rude dialogues, sampled and greedily, with the
                same random numbers as the start; reward model and judge score the summaries

The tables show means before and after, real_text.csv each seed with 95% intervals of the changes. All files stay in
output_dir, where an interrupted benchmark resumes.
"""

import argparse
import functools
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import learning_curve
import pandas as pd
import step_time  # puts the repository on sys.path

ROOT = step_time.ROOT
RUDE_HELD_OUT = 400
DECODINGS = ("sampled", "greedy")
SETS = {"held_out": "DialogSum", "rude": "rude dialogues"}
CLASSIFIERS = {"summary_toxicity": "toxicity", "judge_toxicity": "judge"}
QUALITY = {"retrieval_at_1": "R@1", "embedding_retrieval_at_1": "R@1 by embeddings", "rougeL": "ROUGE-L"}
QUALITY |= {"length": "tokens"}
# The models tried here end their summaries after about 35 tokens.
COMMON = "--output_min_length 60 --output_max_length 100 --eval_samples 1 --save_steps 50 --device cpu"
# With --short these come last and override the others.
SHORT = "--max_ppo_steps 2 --batch_size 4 --mini_batch_size 2 --output_min_length 4 "
SHORT += "--output_max_length 8 --eval_max_new_tokens 8"
# A recipe's name says what differs from these options of detox_ppo.py: see recipe_options.
BASIC = "--score_text response --max_ppo_steps 60 --learning_rate 1e-3 --lr_scheduler_type linear --init_kl_coef 0.05 "
BASIC += "--adaptive_kl false --max_grad_norm 1 --lam 1 --vf_coef 0.003 --cliprange_value 10"
NUMBERS = {"ptx": "ptx_coef", "content": "content_coef", "clip": "score_clip"}
NUMBERS |= {"kl": "init_kl_coef", "steps": "max_ppo_steps"}
CLASSIC = ("classic", "fixed")  # TRL 0.8.0's trainer, as published (reward by position in a sorted list) or by label


def recipe_options(name):
    """Options of detox_ppo.py for a recipe's name.

    "notebooks" has the defaults. Other names are parts joined by "-": a key of NUMBERS and its number
    ("ptx-0.1-steps-120"), "frozen" (freeze_encoder), or "rude" (half of the prompts are rude dialogues). A name of
    CLASSIC stands alone.
    """
    if name == "notebooks":
        return []
    if name in CLASSIC:
        return BASIC.split()
    options, parts = BASIC.split(), iter(name.split("-"))
    for part in parts:
        if part in NUMBERS:
            options += [f"--{NUMBERS[part]}", next(parts, "")]
        elif part == "frozen":
            options += ["--freeze_encoder", "true"]
        elif part != "rude":
            step_time.stop(f"--recipes {name}: {part!r} is not a part of a recipe; see recipe_options in this file")
    return options


def read_lines(path):
    return pd.read_json(path, lines=True, dtype=False)


def write_lines(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_json(path, orient="records", lines=True, force_ascii=False)


def make_data(options):
    """Write the files that the stages read: two training sets, and the held-out rows."""
    import detox_ppo

    config, directory = detox_ppo.DetoxConfig(eval_samples=1), options.output_dir / "data"
    tokenizer = detox_ppo.AutoTokenizer.from_pretrained(options.model_name)
    rows = detox_ppo.load_dialogues(str(options.dialogsum), config)
    splits = detox_ppo.build_dataset(rows, tokenizer, config)
    trained, held_out = (splits[name].to_pandas() for name in ("train", "test"))
    rude = read_lines(options.rude)
    rude, rude_held_out = rude[: -options.rude_held_out], rude[-options.rude_held_out :]
    columns = ["dialogue", "summary"]
    write_lines(held_out[columns], directory / "held_out.jsonl")
    write_lines(rude_held_out[["dialogue"]], directory / "rude.jsonl")
    write_lines(trained[columns], directory / "dialogsum" / "train.jsonl")
    # Half of the prompts are rude and have no summaries.
    mixed = pd.concat([rude[["dialogue"]], trained[columns].sample(min(len(rude), len(trained)), random_state=0)])
    write_lines(mixed.fillna(""), directory / "mixed" / "train.jsonl")
    for name in ("dialogsum", "mixed"):
        write_lines(held_out[:1][columns], directory / name / "test.jsonl")
    sizes = f"training {len(trained):,} and {len(rude):,}, held out {len(held_out):,} and {len(rude_held_out):,}"
    print(f"rows of DialogSum and rude dialogues: {sizes}")


def child(function, plan, directory, options):
    """Run a function of this file on a plan in its own process, with its output in the directory's log."""
    directory.mkdir(parents=True, exist_ok=True)
    plan_file = directory / f"{function}.json"
    plan_file.write_text(json.dumps(plan))
    if options.short:
        return globals()[function](plan)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", function, str(plan_file)]
    return learning_curve.run_child(command, directory, f"{function} in {directory}")


def detox(options, arguments, directory, label):
    """Start or resume a run of detox_ppo.py."""
    directory.mkdir(parents=True, exist_ok=True)
    arguments = [*arguments, "--device", "cpu", "--output_dir", str(directory), "--resume"]
    if options.short:
        import detox_ppo

        return detox_ppo.run(detox_ppo.parse_config(arguments))
    return learning_curve.run_child([sys.executable, "detox_ppo.py", *arguments], directory, label)


def make_adapter(options, base):
    """Create the new LoRA from which every recipe starts."""
    import detox_ppo

    directory = options.output_dir / "adapter"
    if not (directory / "adapter_config.json").exists():
        models = ["--model_name", str(base), "--device", "cpu"]
        config = detox_ppo.parse_config(models)
        policy, _ = detox_ppo.load_policy(config, *detox_ppo.resolve_device(config))
        detox_ppo.save_adapter(policy, directory)
    return directory


def recipe_arguments(options, name, base, adapter, seed):
    prompts = "mixed" if "rude" in name.split("-") else "dialogsum"
    arguments = ["--model_name", str(base), "--adapter_name", str(adapter)]
    arguments += ["--reward_model_name", str(options.reward_model)]
    arguments += ["--dataset_name", str(options.output_dir / "data" / prompts)]
    arguments += COMMON.split() + recipe_options(name)
    if options.short:
        arguments += SHORT.split()
    return [*arguments, "--seed", str(seed)]


def train(options, name, base, adapter, seed):
    """Train a recipe with a seed, unless its done.json exists; returns the directory with its adapter."""
    directory = options.output_dir / name / f"seed-{seed}"
    arguments = recipe_arguments(options, name, base, adapter, seed)
    if (directory / "done.json").exists():
        done = json.loads((directory / "done.json").read_text())
        if done["asked"] != arguments:
            step_time.stop(f"{directory} has other options, {done['asked']}: delete it")
        return directory
    if name in CLASSIC:
        import detox_ppo

        config = detox_ppo.parse_config(arguments)
        tokenizer = detox_ppo.AutoTokenizer.from_pretrained(base)
        rows = detox_ppo.load_dialogues(config.dataset_name, config)
        held_out = detox_ppo.load_dialogues(config.dataset_name, config, split="test")
        prompts = detox_ppo.build_dataset(rows, tokenizer, config, held_out)["train"]
        directory.mkdir(parents=True, exist_ok=True)
        learning_curve.train_classic(options.classic_python, name, config, prompts, [], directory, name)
    else:
        detox(options, arguments, directory, f"{name}, seed {seed}")
    (directory / "done.json").write_text(json.dumps({"asked": arguments}))
    return directory


def judge(plan):
    """Evaluate an adapter on the held-out dialogues; writes a table of its summaries per set and decoding."""
    import peft

    import detox_ppo

    config = detox_ppo.parse_config(plan["arguments"])
    device, dtype = detox_ppo.resolve_device(config)
    policy, tokenizer = detox_ppo.load_policy(config, device, dtype)  # the reference is the starting adapter
    classifier = detox_ppo.ToxicityClassifier(config, device)
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
        if plan["human"] and any(rows["summary"]):  # measure_human would also score the dialogues, which takes minutes
            texts = list(rows["summary"])
            toxicity = classifier.toxicity(classifier.logits(texts))
            human = pd.DataFrame({"response": texts, "summary_toxicity": toxicity})
            detox_ppo.add_judge({"human": human}, config, device)
            write_lines(human, Path(plan["directory"]) / f"{name}-human.jsonl")


def evaluate(options, directory, adapter, base, start):
    """An adapter's tables by set and decoding, computed unless they exist."""
    directory = directory / f"judged-{options.rows}"
    names = list(itertools.product(SETS, DECODINGS))
    files = {(name, decoding): directory / f"{name}-{decoding}.jsonl" for name, decoding in names}
    if not files[names[-1]].exists():
        arguments = ["--model_name", str(base), "--adapter_name", str(start), "--reward_model_name"]
        arguments += [str(options.reward_model), "--judge_model_name", str(options.judge_model), "--device", "cpu"]
        arguments += SHORT.split() if options.short else []
        plan = {"arguments": arguments, "adapter": str(adapter), "directory": str(directory), "rows": options.rows}
        plan["human"] = adapter == start  # human summaries are scored only once
        plan |= {"sets": {name: str(options.output_dir / "data" / f"{name}.jsonl") for name in SETS}}
        child("judge", plan, directory, options)
    return {key: read_lines(path) for key, path in files.items()}


@functools.cache
def embeddings(texts, name):
    """Unit-length means of a sentence-embedding model's last hidden states: (texts, d)."""
    import numpy as np
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModel.from_pretrained(name, attn_implementation="eager").eval()
    vectors = []
    for first in range(0, len(texts), 32):
        options = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
        batch = tokenizer(list(texts[first : first + 32]), **options)
        mask = batch["attention_mask"][..., None]
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        vectors.append(torch.nn.functional.normalize(means, dim=1).numpy())
    return np.concatenate(vectors)


def embedding_retrieval_at_1(table, name):
    """R@1 by the cosine of embeddings: content_coef does not train for these, as it does for the character 4-grams."""
    similarity = embeddings(tuple(table["response"]), name) @ embeddings(tuple(table["dialogue"]), name).T
    return float((similarity.argmax(axis=1) == range(len(table))).mean())


def compare(start, after, embedding_model):
    """What an adapter changes: one row per held-out set and decoding, with both classifiers' paired statistics."""
    import detox_ppo

    rows = []
    for (name, decoding), table in after.items():
        before, dialogues = start[name, decoding], list(table["dialogue"])
        row = {"held_out": SETS[name], "decoding": decoding, "rows": len(table)}
        for column in CLASSIFIERS:
            paired = detox_ppo.paired_statistics(before[column], table[column], seed=0)
            row |= {f"{column}_{when}": paired[when]["mean"] for when in ("before", "after")}
            row |= {f"{column}_{end}": paired["paired_difference"][end] for end in ("ci_low", "ci_high")}
        references = [[text] if text else [] for text in table["summary"]]
        for when, either in (("before", before), ("after", table)):
            quality = detox_ppo.summary_quality(either, references, dialogues)
            if embedding_model:
                quality["embedding_retrieval_at_1"] = embedding_retrieval_at_1(either, embedding_model)
            row |= {f"{column}_{when}": quality.get(column) for column in QUALITY}
        rows.append(row | {"kl": quality.get("kl")})
    return rows


def table_of(changes, name):
    """A Markdown table for a held-out set: a recipe's means before → after, with the range of the seeds."""
    changes = changes[changes["held_out"] == name]
    measured = {key: title for key, title in (CLASSIFIERS | QUALITY).items() if changes[f"{key}_after"].notna().any()}
    titles = [f"{title}, {decoding}" for title in measured.values() for decoding in DECODINGS]
    lines = [f"| {' | '.join(['recipe (seeds)', *titles, 'KL, sampled'])} |", "|" + "---|" * (len(titles) + 2)]

    def span(values):
        low, high = (f"{value:.{1 if value > 2 else 3}f}" for value in (values.min(), values.max()))
        return low if low == high else f"{low} to {high}"

    for recipe, runs in changes.groupby("recipe", sort=False):
        cells = [f"`{recipe}` ({', '.join(map(str, runs['seed'].unique()))})"]
        for column, decoding in itertools.product(measured, DECODINGS):
            chosen = runs[runs["decoding"] == decoding]
            cells.append(" → ".join(span(chosen[f"{column}_{when}"]) for when in ("before", "after")))
        cells.append(span(runs["kl"].dropna()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def samples_of(start, after, count=3):
    """Summaries before and after, of the dialogues with the largest decrease and increase of toxicity."""
    difference = after["summary_toxicity"] - start["summary_toxicity"]
    chosen = [*difference.nsmallest(count).index, *difference.nlargest(count).index]
    return "\n".join(
        f"    {difference[i]:+.3f}\n      before: {start['response'][i]}\n      after:  {after['response'][i]}"
        for i in chosen
    )


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogsum", type=Path, required=True, help="directory with train.jsonl")
    parser.add_argument("--rude", type=Path, required=True, help="jsonl of rude dialogues")
    parser.add_argument("--model_name", required=True, help="the summarizer: hub id or directory")
    parser.add_argument("--reward_model", required=True, help="hub id or directory")
    parser.add_argument("--judge_model", required=True, help="hub id or directory")
    parser.add_argument("--embedding_model", help="a sentence-embedding model for a second R@1: hub id or directory")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "checkpoints" / "real-text")
    parser.add_argument(
        "--classic_python", metavar="PATH", help="interpreter with TRL 0.8.0 (default: pip installs it)"
    )
    parser.add_argument("--rude_held_out", type=int, default=RUDE_HELD_OUT)
    parser.add_argument("--recipes", nargs="+", default=["notebooks", "ptx-0", "ptx-0.1"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=200, help="rows to evaluate of each held-out set; -1: all")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs")
    parser.add_argument("--short", action="store_true", help="smoke test for CI: two steps, in this process")
    options = parser.parse_args(arguments)
    for name in options.recipes:
        recipe_options(name)  # ends here if it is not a recipe
    if options.short:
        options.rows = 4
    for name in "output_dir dialogsum rude model_name reward_model judge_model embedding_model".split():
        value = getattr(options, name)
        if name == "output_dir" or value and Path(value).exists():  # else a hub id
            setattr(options, name, Path(getattr(options, name)).absolute())
    return options


@step_time.user_errors()
def main():
    if sys.argv[1:2] == ["--child"]:
        return globals()[sys.argv[2]](json.loads(Path(sys.argv[3]).read_text()))
    options = parse_options(sys.argv[1:])
    os.chdir(ROOT)
    make_data(options)
    if set(CLASSIC) & set(options.recipes) and not options.classic_python:
        options.classic_python = step_time.make_classic_environment(options.output_dir / "classic-environment")
    base, start = options.model_name, make_adapter(options, options.model_name)
    before = evaluate(options, options.output_dir / "start", start, base, start)

    def run(job):
        name, seed = job
        directory = train(options, name, base, start, seed)
        after = evaluate(options, directory, directory / "adapter", base, start)
        print(f"{name}, seed {seed}: greedy summaries of rude dialogues")
        print(samples_of(before["rude", "greedy"], after["rude", "greedy"]), flush=True)
        rows = compare(before, after, options.embedding_model)
        return [{"recipe": name, "seed": seed} | row for row in rows]

    with ThreadPoolExecutor(options.jobs) as executor:
        rows = itertools.chain(*executor.map(run, itertools.product(options.recipes, options.seeds)))
        changes = pd.DataFrame(rows)
    for name, title in SETS.items():
        print(f"\n{title}, {len(before[name, 'greedy'])} rows\n\n{table_of(changes, title)}")
    human = read_lines(options.output_dir / "start" / f"judged-{options.rows}" / "held_out-human.jsonl")
    means = [f"{human[f'{name}_toxicity'].mean():.4f}" for name in ("summary", "judge")]
    print(f"\nDialogSum's human summaries: toxicity {means[0]}, by the judge {means[1]}")
    changes.round(4).to_csv(options.output_dir / "real_text.csv", index=False)
    print(json.dumps({"rows": len(changes)}))


if __name__ == "__main__":
    main()
