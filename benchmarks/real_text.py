"""What a recipe does to a real summarizer of real dialogues: toxicity, content and length before and after.

    python benchmarks/real_text.py --dialogsum DIR --rude FILE --model_name DIR --reward_model DIR --judge_model DIR \\
        [--recipes NAME ...] [--seeds 0 1 2] [--rows 200 | -1]

DialogSum's train.jsonl lies in DIR; FILE is a jsonl of rude dialogues without summaries, of which the last 400 are
held out. The model is an encoder-decoder that summarizes and has not seen the 2,005 rows that a run holds out; the
reward model has the labels nothate and hate, the judge a label toxic. Three stages:

    start      a new LoRA, which leaves the model as it is
    recipes    PPO by detox_ppo.py, or by the classic trainer (TRL 0.8.0), once a seed
    judgement  every adapter summarizes held-out DialogSum and held-out rude dialogues, sampled and greedily, with the
               same random numbers as the start; reward model and judge score the summaries

All of it stays in output_dir, where an interrupted benchmark resumes.
"""

import argparse
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
# Real summaries of the models tried here end after some 35 tokens.
COMMON = "--output_min_length 60 --output_max_length 100 --eval_samples 1 --save_steps 50 --device cpu"
# What --short puts in the place of any of them.
SHORT = "--max_ppo_steps 2 --batch_size 4 --mini_batch_size 2 --output_min_length 4 "
SHORT += "--output_max_length 8 --eval_max_new_tokens 8"
# Options of detox_ppo.py by name: the notebooks', which are its defaults; "ptx-0" is the recipe without human
# summaries, and the others say what differs. Of "rude" prompts half are rude dialogues. What has "classic" is trained
# by TRL 0.8.0's loop instead, as published (the reward by its position in a sorted list) or fixed (by its label).
BASIC = "--score_text response --max_ppo_steps 60 --learning_rate 1e-3 --lr_scheduler_type linear --init_kl_coef 0.05 "
BASIC += "--adaptive_kl false --max_grad_norm 1 --lam 1 --vf_coef 0.003 --cliprange_value 10"
RECIPES = {"notebooks": {"options": ""}}
for coefficient in ("0", "0.05", "0.1", "0.2", "0.5"):
    for prompts in ("", "rude-"):
        for frozen in ("", "frozen-"):
            options = f"{BASIC} --ptx_coef {coefficient} --freeze_encoder {'true' if frozen else 'false'}"
            RECIPES[f"{prompts}{frozen}ptx-{coefficient}"] = {"options": options} | (
                {"prompts": "mixed"} if prompts else {}
            )
RECIPES["rude-frozen-ptx-0.1-kl-0.02"] = {
    "options": f"{BASIC} --ptx_coef 0.1 --freeze_encoder true --init_kl_coef 0.02",
    "prompts": "mixed",
}
RECIPES["rude-frozen-ptx-0.1-steps-180"] = {
    "options": f"{BASIC} --ptx_coef 0.1 --freeze_encoder true --max_ppo_steps 180",
    "prompts": "mixed",
}
RECIPES["steps-300"] = {"options": f"{BASIC} --max_ppo_steps 300"}  # checkpoints/flan-t5-base.yaml
RECIPES["classic"] = {"options": BASIC, "classic": "classic"}
RECIPES["fixed"] = {"options": BASIC, "classic": "mended"}


def read_lines(path):
    return pd.read_json(path, lines=True, dtype=False)


def write_lines(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_json(path, orient="records", lines=True, force_ascii=False)


def make_data(options):
    """Write what the stages read: the prompts of PPO's two collections, and held-out rows."""
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
    # Half of the prompts are rude, without summaries.
    mixed = pd.concat([rude[["dialogue"]], trained[columns].sample(min(len(rude), len(trained)), random_state=0)])
    write_lines(mixed.fillna(""), directory / "mixed" / "train.jsonl")
    for name in ("dialogsum", "mixed"):
        write_lines(held_out[:1][columns], directory / name / "test.jsonl")
    print(f"trained on {len(trained):,}, rude {len(rude):,}; held out {len(held_out):,} and {len(rude_held_out):,}")


def child(function, plan, directory, options):
    """Run a function of this file on a plan in a process of its own, its output in the directory's log."""
    directory.mkdir(parents=True, exist_ok=True)
    asked = directory / f"{function}.json"
    asked.write_text(json.dumps(plan))
    if options.short:
        return globals()[function](plan)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", function, str(asked)]
    return learning_curve.run_child(command, directory, f"{function} in {directory}")


def detox(options, arguments, directory, label):
    """A run of detox_ppo.py that goes on where it stopped."""
    directory.mkdir(parents=True, exist_ok=True)
    arguments = [*arguments, "--device", "cpu", "--output_dir", str(directory), "--resume"]
    if options.short:
        import detox_ppo

        return detox_ppo.run(detox_ppo.parse_config(arguments))
    return learning_curve.run_child([sys.executable, "detox_ppo.py", *arguments], directory, label)


def make_adapter(options, base):
    """The LoRA that every recipe starts from: a new one."""
    import detox_ppo

    directory = options.output_dir / "adapter"
    if not (directory / "adapter_config.json").exists():
        models = ["--model_name", str(base), "--device", "cpu"]
        config = detox_ppo.parse_config(models)
        policy, _ = detox_ppo.load_policy(config, *detox_ppo.resolve_device(config))
        detox_ppo.save_adapter(policy, directory)
    return directory


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
        before, references = start[key], [[text] if text else [] for text in table["summary"]]
        dialogues = list(table["dialogue"])
        quality = [detox_ppo.summary_quality(told, references, dialogues) for told in (before, table)]
        block = {
            name: detox_ppo.paired_statistics(before[name], table[name], seed=0)
            for name in ("summary_toxicity", "judge_toxicity")
        }
        block["rougeL"] = [told.get("rougeL") for told in quality]
        block["retrieval_at_1"] = [told.get("retrieval_at_1") for told in quality]
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
    columns += ["R@1, sampled", "R@1, greedy", "ROUGE-L, sampled", "ROUGE-L, greedy", "tokens, sampled"]
    columns += ["tokens, greedy", "KL, sampled"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for result in results:
        blocks = [result["measured"][f"{name} {decoding}"] for decoding in DECODINGS]
        sampled = blocks[0]
        cells = [result["recipe"], str(result["seed"]), "{:.2f} → {:.2f}".format(*sampled["reward"])]
        cells += [change(block[key]) for key in ("summary_toxicity", "judge_toxicity") for block in blocks]
        for key in ("retrieval_at_1", "rougeL"):
            cells += ["" if None in block[key] else "{:.3f} → {:.3f}".format(*block[key]) for block in blocks]
        cells += ["{:.1f} → {:.1f}".format(*block["length"]) for block in blocks] + [f"{sampled['kl']:.2f}"]
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
    parser.add_argument("--dialogsum", type=Path, required=True, help="directory with train.jsonl")
    parser.add_argument("--rude", type=Path, required=True, help="jsonl of rude dialogues")
    parser.add_argument("--model_name", required=True, help="the summarizer: hub id or directory")
    parser.add_argument("--reward_model", required=True, help="hub id or directory")
    parser.add_argument("--judge_model", required=True, help="hub id or directory")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "checkpoints" / "real-text")
    parser.add_argument("--classic_python", metavar="PATH", help="interpreter with TRL 0.8.0 (default: made by pip)")
    parser.add_argument("--rude_held_out", type=int, default=RUDE_HELD_OUT)
    parser.add_argument(
        "--recipes", nargs="+", default=["notebooks", "ptx-0", "ptx-0.1"], choices=list(RECIPES), metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=200, help="of each held-out set to judge by; -1: all")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time")
    parser.add_argument("--short", action="store_true", help="for CI: two steps, in this process")
    options = parser.parse_args(arguments)
    if options.short:
        options.rows = 4
    for name in ("output_dir", "dialogsum", "rude", "model_name", "reward_model", "judge_model"):
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
    base, start = options.model_name, make_adapter(options, options.model_name)
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
