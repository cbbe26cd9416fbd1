"""Time the same PPO step in detox_ppo.py and in the classic trainer (TRL 0.8.0), side by side on this machine.

    python benchmarks/step_time.py                              # true shapes; creates the classic environment first
    python benchmarks/step_time.py --classic_python ENV/bin/python --models DIR
    python benchmarks/step_time.py --device cuda --dtypes bfloat16 --batch_size 256 --mini_batch_size 64    # on a GPU
    python benchmarks/step_time.py --recipe                     # the recommended options instead of the notebooks'
    python benchmarks/step_time.py --short                      # smoke test: narrow models, one step

FLAN-T5-base and RoBERTa-base have random weights; batch 16, minibatches of 4, LoRA r=32 on q and v, prompts of
DialogSum's lengths, responses of 25 to 70 tokens. Prompts and max_new_tokens are drawn once and used by both sides.
With random weights almost every response has max_new_tokens tokens; the number of sampled tokens is printed. For each
dtype the two sides take turns (A B A B), each in its own process. A process's first step is a warm-up and is not
counted. The classic trainer is used as in the published notebooks: see classic_trainer.py.

With --recipe ours uses RECIPE_OPTIONS of checkpoints/flan-t5-base.yaml: a frozen encoder, scores of the summary
without its dialogue, its similarity to the dialogue, and the loss on human summaries, as long as DialogSum's.
The classic trainer also scores only the summary; it has no equivalent of the other options.

Both sides use the same number of threads. "Share of peak" is the step's arithmetic divided by its seconds and by the
speed of a large square torch.mm, which is measured in each round. Only necessary arithmetic counts (see step_flop),
computed from shapes and real tokens: padding and a repeated encoder pass add nothing. A second row counts separate
encoder passes for sampling and for the log-probabilities on both sides. With --recipe the two sides need different
arithmetic, and no share is printed.

The last line of the output is one JSON object: ratio_DTYPE (their seconds per step / ours, from the medians),
memory_ratio_DTYPE (our peak resident memory / theirs), peak_share_DTYPE (ours), null where nothing was measured,
and all measurements under "details".
"""

import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TINY = ROOT / "checkpoints" / "tiny"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

DTYPES = ("float32", "bfloat16")
PHASES = ("sample", "logprobs", "reference", "rollout", "score", "optimize", "step")  # rollout: the first three
LORA_R = 32
# What all FLAN-T5 sizes have in common, a narrow size for --short, and RoBERTa-base.
T5 = {"vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32}
NARROW = {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "hidden_size": 768}
ROBERTA |= {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLASSIC_PINS = ("trl==0.8.0", "transformers==4.47.0", "peft==0.14.0", "accelerate==1.2.0", "datasets==3.2.0")
CLASSIC_PINS += ("numpy<2", "pandas<2.3", "pyarrow==17.*", "rich", "tyro")
SUMMARY_WORDS = 19  # mean length of DialogSum's human summaries
RECIPE_OPTIONS = ("freeze_encoder", "ptx_coef", "content_coef", "score_text")  # those that change a step's arithmetic
# Minimum, deciles and maximum of DialogSum's prompt lengths in tokens (dialogues of 200 to 1000 characters); mean 168.
PROMPT_TOKENS = (60, 91, 116, 134, 149, 162, 179, 197, 218, 242, 330)


def stop(message):
    """Exit with a one-line error message and the exit code of detox_ppo.py."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """Print a user error as one line, like detox_ppo.py; any other error keeps its stack trace."""
    try:
        yield
    except Exception as error:
        import detox_ppo

        message = detox_ppo.explain(error)
        if message is None:
            raise
        stop(message)


# ---------------------------------------------------------------------------------------------------------------
# The plan: prompts and max_new_tokens of every step
# ---------------------------------------------------------------------------------------------------------------


def assemble_dialogues(count, tokenizer, seed, prompt_tokens=None):
    """Dialogues assembled from the bundled ones, with DialogSum's lengths in tokens or all of one length."""
    import numpy as np

    import detox_ppo

    with (TINY / "dialogues" / "train.csv").open(encoding="utf-8", newline="") as file:
        words = itertools.cycle([word for row in csv.DictReader(file) for word in row["dialogue"].split(" ")])
    # Evenly spaced quantiles in random order: the mean of a few dozen draws would be off by several tokens.
    quantiles = np.random.default_rng(seed).permutation((np.arange(count) + 0.5) / count)
    dialogues = []
    lengths = [prompt_tokens] if prompt_tokens else PROMPT_TOKENS
    for length in np.interp(quantiles, np.linspace(0, 1, len(lengths)), lengths):
        chosen = [next(words)]
        # A word has at least one token, so adding half of the missing number of words never exceeds the length.
        while (missing := int(length) - len(tokenizer(detox_ppo.build_prompt(" ".join(chosen))).input_ids)) > 0:
            chosen += itertools.islice(words, max(1, missing // 2))
        dialogues.append(" ".join(chosen))
    return dialogues


def read_dialogues(path, count, seed):
    """Draw dialogues from a csv or jsonl file, or a directory with one, filtered by length like in a run."""
    import numpy as np

    import detox_ppo

    lower, upper = detox_ppo.DetoxConfig.input_min_text_length, detox_ppo.DetoxConfig.input_max_text_length
    texts = dict.fromkeys(detox_ppo.load_dialogues(path)["dialogue"])
    dialogues = [text for text in texts if lower < len(text) <= upper]
    if len(dialogues) < count:
        limits = f"{lower + 1} to {upper} characters"
        stop(f"--dialogues {path}: {count} different dialogues of {limits} are needed, but it has {len(dialogues)}")
    return [dialogues[i] for i in np.random.default_rng(seed).permutation(len(dialogues))[:count]]


def our_arguments(options, models, dataset, output_dir, dtype):
    """The command line of detox_ppo.py for the planned steps, with the least evaluation that it allows."""
    values = {
        "model_name": models["base"],
        "reward_model_name": models["classifier"],
        "dataset_name": dataset,
        "output_dir": output_dir,
        "input_min_text_length": 0,
        "input_max_text_length": 1_000_000,
        "test_size": 0.5 / (options.batch_size * (options.steps + 1) + 1),  # rounded up: one row
        "lora_r": LORA_R,
        "lora_alpha": LORA_R,
        "batch_size": options.batch_size,
        "mini_batch_size": options.mini_batch_size,
        "max_ppo_steps": options.steps + 1,
        "output_min_length": options.response_lengths[0],
        "output_max_length": options.response_lengths[1],
        "eval_samples": 1,
        "eval_max_new_tokens": 1,
        "seed": options.seed,
        "device": options.device,
        "dtype": dtype,
    }
    if getattr(options, "recipe", False):  # other benchmarks do not have this option
        values |= recipe()
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def recipe():
    """The values of RECIPE_OPTIONS in the recommended recipe."""
    import yaml

    values = yaml.safe_load((ROOT / "checkpoints" / "flan-t5-base.yaml").read_text())
    return {name: values[name] for name in RECIPE_OPTIONS}


def make_plan(options, models, scratch):
    """Draw prompts and max_new_tokens; write the dataset from which detox_ppo.py draws the same ones.

    Its batches and max_new_tokens depend only on the seed, the step and the row, so they are known before it runs. The
    child process checks them.
    """
    import datasets
    from transformers import AutoTokenizer

    import detox_ppo

    datasets.disable_progress_bars()
    with detox_ppo.as_user_error(models["base"], "models"):
        tokenizer = AutoTokenizer.from_pretrained(models["base"], trust_remote_code=False)
    steps = options.steps + 1  # one warm-up step
    count = steps * options.batch_size + 1  # one held-out row
    if options.dialogues:
        dialogues = read_dialogues(options.dialogues, count, options.seed)
    else:
        dialogues = assemble_dialogues(count, tokenizer, options.seed, options.prompt_tokens)
    dataset = scratch / "dialogues.jsonl"
    summaries = [" ".join(dialogue.split(" ")[:SUMMARY_WORDS]) for dialogue in dialogues]
    rows = [json.dumps({"dialogue": d, "summary": s}) for d, s in zip(dialogues, summaries, strict=True)]
    dataset.write_text("\n".join(rows) + "\n", encoding="utf-8")

    config = detox_ppo.parse_config(our_arguments(options, models, dataset, scratch / "run", "float32"))
    with contextlib.redirect_stdout(io.StringIO()):  # hide the row counts
        train = detox_ppo.build_dataset(detox_ppo.load_dialogues(str(dataset)), tokenizer, config)["train"]
    plan = []
    for step in range(1, steps + 1):
        rows = detox_ppo.rows_of_step(len(train), options.batch_size, options.seed, detox_ppo.SHUFFLE, step)
        batch = train.select(rows)
        streams = [detox_ppo.random_stream(options.seed, detox_ppo.ROLLOUT, step, row) for row in batch["row"]]
        limits = [int(stream.integers(*options.response_lengths, endpoint=True)) for stream in streams]
        plan.append({"prompts": list(batch["input_ids"]), "caps": limits})
    return dataset, plan


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------


def matrices(shape):
    """Parameters of one attention projection, one feed-forward layer and one adapter, and the attention width."""
    d, inner = shape["d_model"], shape["num_heads"] * shape["d_kv"]
    feed_forward = d * shape["d_ff"] * (3 if shape["feed_forward_proj"].startswith("gated") else 2)
    return d * inner, feed_forward, LORA_R * (d + inner), inner


def encoder_flop(shape, prompt):
    """Floating-point operations of one forward pass of a T5's encoder: frozen matrices, LoRA, attention.

    A product with p weights costs 2 p per token. Attention's two products cost 2 * 2 * inner per pair of tokens of
    which one attends to the other. Embeddings, norms and softmaxes are not counted.
    """
    projection, feed_forward, lora, inner = matrices(shape)
    layers = shape["num_layers"]
    frozen = 2 * layers * (4 * projection + feed_forward) * prompt
    return frozen, 2 * layers * 2 * lora * prompt, 4 * inner * layers * prompt**2


def decoder_flop(shape, prompt, response):
    """Like encoder_flop, for decoder and head; keys and values of the cross-attention come from the prompt."""
    projection, feed_forward, lora, inner = matrices(shape)
    layers = shape["num_decoder_layers"]
    frozen = 2 * layers * ((6 * projection + feed_forward) * response + 2 * projection * prompt)
    frozen += 2 * shape["d_model"] * shape["vocab_size"] * response
    # LoRA on q and v of the self-attention and q of the cross-attention: response; v of the cross-attention: prompt.
    adapted = 2 * layers * (3 * lora * response + lora * prompt)
    return frozen, adapted, 4 * inner * layers * (response * (response + 1) / 2 + response * prompt)


def classifier_flop(shape, tokens):
    """Floating-point operations of RoBERTa for one text."""
    d = shape["hidden_size"]
    weights = shape["num_hidden_layers"] * (4 * d * d + 2 * d * shape["intermediate_size"])
    return 2 * weights * tokens + 4 * d * shape["num_hidden_layers"] * tokens**2


def step_flop(shapes, prompts, responses, classified, encoder_passes=3):
    """Floating-point operations that a PPO step needs for these lengths in tokens, without padding.

    The decoder runs four times (sampling, log-probabilities, reference, update). Three encoder passes are enough,
    because sampling and log-probabilities use the same weights; a fourth one counts only with encoder_passes=4. A
    backward pass and the classifier follow. Only the LoRA is trained: frozen matrices need only the gradient of their
    input, which costs one forward pass; LoRA matrices and attention's products cost two.
    """
    total = sum(classifier_flop(shapes["classifier"], tokens) for tokens in classified)
    for prompt, response in zip(prompts, responses, strict=True):
        encoder, decoder = encoder_flop(shapes["base"], prompt), decoder_flop(shapes["base"], prompt, response)
        total += encoder_passes * sum(encoder) + 4 * sum(decoder)
        for frozen, adapted, attention in (encoder, decoder):
            total += frozen + 2 * (adapted + attention)
    return total


# ---------------------------------------------------------------------------------------------------------------
# Child processes
# ---------------------------------------------------------------------------------------------------------------


def peak_memory(device):
    """Peak memory in bytes: allocated on the GPU, or resident in this process.

    getrusage would include the parent's memory before exec.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: measuring peak memory needs Linux")


def run_without_report(config):
    """detox_ppo.run without the verdict and the plots, which would take seconds."""
    import detox_ppo

    def write_results(config, results, *_):
        Path(config.output_dir, "results.json").write_text(json.dumps(results))

    with mock.patch.multiple(detox_ppo, build_results=lambda *_: {"warnings": {}}, write_report=write_results):
        return detox_ppo.run(config)


@user_errors()
def ours(plan):
    """Run detox_ppo.py on the plan; its metrics.jsonl has the seconds."""
    import torch
    import transformers

    import detox_ppo

    transformers.logging.set_verbosity_error()
    config = detox_ppo.parse_config(plan["arguments"])
    step_of = {tuple(prompt): i for i, step in enumerate(plan["steps"]) for prompt in step["prompts"]}
    measured = [{"responses": {}, "classified": []} for _ in plan["steps"]]
    current = {"step": None}  # None during evaluation
    sample = detox_ppo.generate
    classify = transformers.RobertaForSequenceClassification.forward

    # Record the sampled prompts, the lengths of their responses, and the lengths of the classified texts. The cost is
    # negligible compared with a step.
    def recording_sample(policy, *args, **kwargs):
        if policy.base.get_output_embeddings().weight is policy.base.get_input_embeddings().weight:
            raise RuntimeError(f"{config.model_name}: lm_head is tied to the embeddings")
        responses = sample(policy, *args, **kwargs)
        planned_steps = {step_of.get(tuple(prompt)) for prompt in responses.prompts}
        if len(planned_steps) > 1:
            raise RuntimeError("the batches differ from the plan: detox_ppo.py now draws its rows differently")
        current["step"] = planned_steps.pop()
        if current["step"] is not None:
            lengths = dict(zip(map(tuple, responses.prompts), responses.lengths.tolist(), strict=True))
            measured[current["step"]]["responses"] |= lengths
        return responses

    @functools.wraps(classify)  # transformers inspects the signature
    def recording_classify(self, *args, **kwargs):
        if current["step"] is not None:
            measured[current["step"]]["classified"] += kwargs["attention_mask"].sum(dim=1).tolist()
        return classify(self, *args, **kwargs)

    with (
        mock.patch.object(detox_ppo, "generate", recording_sample),
        mock.patch.object(detox_ppo, "TOXIC", 1.0),  # the random classifier must not exclude human summaries
        mock.patch.object(transformers.RobertaForSequenceClassification, "forward", recording_classify),
    ):
        environment = run_without_report(config)["environment"]

    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    steps = []
    for planned, recorded, line in zip(plan["steps"], measured, lines, strict=True):
        # In the order of the plan; a KeyError if a prompt was not sampled in its step.
        lengths = [recorded["responses"].pop(tuple(prompt)) for prompt in planned["prompts"]]
        if any(length > limit for length, limit in zip(lengths, planned["caps"], strict=True)):
            raise RuntimeError(
                "a response exceeds its planned max_new_tokens: detox_ppo.py now draws max_new_tokens differently"
            )
        metrics = json.loads(line)
        seconds = {phase: metrics.get(f"time/{phase}") for phase in PHASES}
        seconds["score"] = metrics.get("time/reward")
        steps.append({"seconds": seconds, "responses": lengths, "classified": recorded["classified"]})
    return {
        "steps": steps,
        "peak_memory": peak_memory(config.device),
        "threads": torch.get_num_threads(),
        "versions": {name: environment[name] for name in ("torch", "transformers", "peft", "numpy")},
    }


def matrix_peak(plan):
    """Floating-point operations per second of the fastest of several square products (a larger size on a GPU)."""
    import torch

    size = 2048 if plan["device"] == "cpu" else 8192
    synchronize = torch.cuda.synchronize if plan["device"] != "cpu" else lambda: None
    a, b = (torch.randn(size, size).to(plan["device"], getattr(torch, plan["dtype"])) for _ in range(2))
    out = torch.mm(a, b)
    synchronize()
    times = []
    # Five times and half a second at least: other processes or a low clock rate can slow down single ones.
    while len(times) < 5 or sum(times) < 0.5:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize()
        times.append(time.perf_counter() - started)
    return {"peak": 2 * size**3 / min(times)}


def run_child(command, plan, scratch, options, label):
    """Run a child process on a plan and return its result; if it fails, print its error and exit."""
    plan_file, result_file = scratch / "plan.json", scratch / "result.json"
    plan_file.write_text(json.dumps(plan))
    result_file.unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment.pop("PYTHONPATH", None)
    started = time.perf_counter()
    child = subprocess.run(
        [*command, str(plan_file), str(result_file)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    if child.returncode or not result_file.exists():
        stop(f"{label}: {failure(child.returncode, child.stderr)}")
    result = json.loads(result_file.read_text())
    steps = result.get("steps", [])[1:]
    seconds = ", ".join(f"{step['seconds']['step']:.2f}" for step in steps)
    if steps:
        summary = f"{seconds} s per step"
    elif "peak" in result:
        summary = f"{result['peak'] / 1e9:.0f} GFLOP/s"
    else:
        summary = "done"
    print(f"{label}: {summary} ({time.perf_counter() - started:.0f} s in total)", flush=True)
    return result


def failure(code, output):
    """Why a child process failed: its user error, or else the exit code, after printing the end of its output."""
    lines = output.splitlines()
    if code == 2 and lines:
        return lines[-1]
    print("\n".join(lines[-30:]), file=sys.stderr)
    return f"failed with exit code {code}; the end of its output is above"


# ---------------------------------------------------------------------------------------------------------------
# Environment and models
# ---------------------------------------------------------------------------------------------------------------


def make_classic_environment(directory):
    """Create a virtual environment with TRL 0.8.0 and this environment's torch; returns its interpreter."""
    from importlib.metadata import version

    python, done = directory / "bin" / "python", directory / "complete"
    if not done.exists():
        print(f"creating the classic trainer's environment in {directory}", flush=True)
        venv.create(directory, clear=True, symlinks=True, with_pip=True)
        # pip's configuration selects the build (CPU or CUDA); the versions are compared at the end.
        torch = f"torch=={version('torch').split('+')[0]}"
        install = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", torch, *CLASSIC_PINS], capture_output=True, text=True
        )
        if install.returncode:
            errors = [line for line in install.stderr.splitlines() if line.startswith("ERROR")]
            reason = errors[-1] if errors else "it gave no reason"
            hint = "create it elsewhere and pass --classic_python"
            stop(f"pip can't install the classic trainer's environment: {reason}; {hint}")
        done.touch()
    return str(python)


def write_base(directory, shape, tokenizer):
    """Write a T5 of this shape with random weights, an untied head, and another model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * shape["d_model"] ** -0.5)
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config | {"scale_decoder_outputs": False}))
    AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(directory)


def write_narrow_models(directory):
    """The models for --short: full vocabularies, one narrow layer, and the tokenizers of the toy example."""
    import hub
    import torch
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    write_base(directory / hub.BASE, T5 | NARROW, TINY / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {"id2label": {0: "nothate", 1: "hate"}, "label2id": {"nothate": 0, "hate": 1}}
    model = RobertaForSequenceClassification(RobertaConfig(**ROBERTA | sizes, **labels))
    model.save_pretrained(directory / hub.CLASSIFIER)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "classifier", trust_remote_code=False)
    tokenizer.save_pretrained(directory / hub.CLASSIFIER)


def find_models(options, parent):
    """Directories of base and classifier: from --models, or created (narrow with --short, else full size)."""
    import hub

    directory = Path(options.models or parent / "models").resolve()
    if options.short and not options.models:
        write_narrow_models(directory)
    elif not options.models:
        hub.full_size_repositories(directory, TINY / "dialogues", seed=0)
    models = {"base": directory / hub.BASE, "classifier": directory / hub.CLASSIFIER}
    for path in models.values():
        if not (path / "config.json").is_file():
            stop(f"--models {options.models}: no model in {path}; python tests/hub.py --full_size DIR creates them")
    return {name: str(path) for name, path in models.items()}


def prepare(options, scratch, threads="threads"):
    """Create a benchmark's output_dir, find its models and print the hardware; returns both."""
    directory = Path(options.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    models = find_models(options, scratch if options.short else directory)
    print(f"{processor()}, {options.threads} {threads}, {options.dtype}")
    return directory, models


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------


def summarize(runs, shapes, plan, recipe):
    """Median and range of a side's figures over the timed steps of all its processes."""
    timed = [(run, step, planned) for run in runs for step, planned in zip(run["steps"][1:], plan[1:], strict=True)]
    figures = {}
    for phase in PHASES:
        values = [step["seconds"][phase] for _, step, _ in timed]
        figures[phase] = values if None not in values else []
    seconds = figures["step"]
    tokens = [sum(step["responses"]) for _, step, _ in timed]
    flops, more_flops = [], []
    for _, step, planned in timed:
        lengths = [len(prompt) for prompt in planned["prompts"]], step["responses"], step["classified"]
        flops.append(step_flop(shapes, *lengths))
        more_flops.append(step_flop(shapes, *lengths, encoder_passes=4))
    figures["tokens_per_second"] = [n / s for n, s in zip(tokens, seconds, strict=True)]
    shares = {} if recipe else {"peak_share": flops, "peak_share_four_encoder_passes": more_flops}
    for key, counted in shares.items():
        figures[key] = [flop / s / run["peak"] for flop, s, (run, _, _) in zip(counted, seconds, timed, strict=True)]
    figures["peak_memory"] = [run["peak_memory"] for run in runs]
    summary = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
        if values
    }
    steps = [step for _, step, _ in timed]
    counts = {"responses": sum(tokens), "classified": sum(sum(step["classified"]) for step in steps)}
    limits = [limit for _, _, planned in timed for limit in planned["caps"]]
    lengths = [length for step in steps for length in step["responses"]]
    counts["shorter_than_cap"] = sum(length < limit for length, limit in zip(lengths, limits, strict=True))
    return summary | {"tflop_a_step": None if recipe else statistics.mean(flops) / 1e12, "tokens": counts}


def print_table(dtype, sides, peaks):
    """Print phases and figures of both sides, median and range."""
    names = list(sides)
    speeds = " and ".join(f"{peak / 1e9:.0f}" for peak in peaks)
    print(f"\n{dtype}: peak of torch.mm {speeds} GFLOP/s")
    print(f"{'median (range)':<28}" + "".join(f"{name:>28}" for name in names) + f"{'classic / ours':>18}")
    rows = [(f"{phase}, s", phase, 1, 3) for phase in PHASES]
    rows += [("response tokens per second", "tokens_per_second", 1, 2), ("share of peak, %", "peak_share", 100, 1)]
    rows += [("same, 4 encoder passes, %", "peak_share_four_encoder_passes", 100, 1)]
    rows += [("peak memory, MiB", "peak_memory", 2**-20, 0)]
    for title, key, scale, digits in rows:
        if not any(key in side for side in sides.values()):
            continue
        line = f"{title:<28}"
        for name in names:
            cell = "-"
            if key in sides[name]:
                low, middle, high = (scale * sides[name][key][part] for part in ("min", "median", "max"))
                cell = f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
            line += f"{cell:>28}"
        ours, classic = (sides.get(name, {}).get(key, {}).get("median") for name in ("ours", "classic"))
        if ours and classic:
            line += f"{classic / ours:>18.3f}" if ours > 1e-3 else f"{'-':>18}"
        print(line)
    for name in names:
        tokens = sides[name]["tokens"]
        flop = sides[name]["tflop_a_step"]
        arithmetic = "" if flop is None else f"; {flop:.4g} TFLOP per step"
        print(
            f"{name}: {tokens['responses']} response tokens sampled, {tokens['shorter_than_cap']} responses shorter "
            f"than max_new_tokens, {tokens['classified']} tokens classified{arithmetic}"
        )


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process, after one warm-up step")
    parser.add_argument("--rounds", type=int, default=2, help="processes per side and dtype")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--classic_python", metavar="PATH", help="interpreter with TRL 0.8.0 (default: pip installs it)"
    )
    parser.add_argument("--models", metavar="DIR", help="directory written by tests/hub.py (default: create models)")
    parser.add_argument(
        "--dialogues",
        metavar="PATH",
        help="csv or jsonl with dialogues, such as DialogSum's; needs --models with a matching tokenizer, because "
        "another one changes the lengths (default: assembled from the bundled dialogues)",
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; a GPU's phases overlap, only step times are exact"
    )
    parser.add_argument("--batch_size", type=int, help="prompts per step (default 16)")
    parser.add_argument("--mini_batch_size", type=int, help="responses per update; must divide the batch (default 4)")
    parser.add_argument("--prompt_tokens", type=int, help="length of all prompts (default: DialogSum's distribution)")
    parser.add_argument(
        "--response_lengths", nargs=2, type=int, metavar=("MIN", "MAX"), help="range of max_new_tokens (default 25 70)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="for prompts, max_new_tokens and batches")
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="cache for the environment and the models (default: in the system's temporary directory)",
    )
    parser.add_argument("--recipe", action="store_true", help="use RECIPE_OPTIONS as in checkpoints/flan-t5-base.yaml")
    parser.add_argument(
        "--short",
        action="store_true",
        help="smoke test: narrow models, batch 4, one step, one round; only ours without --classic_python",
    )
    options = parser.parse_args()
    options.batch_size = options.batch_size or (4 if options.short else 16)
    options.mini_batch_size = options.mini_batch_size or (2 if options.short else 4)
    if options.short:
        options.steps = options.rounds = 1
    options.response_lengths = options.response_lengths or ([8, 12] if options.short else [25, 70])
    if min(options.steps, options.rounds, options.threads) < 1:
        parser.error("--steps, --rounds and --threads must be at least 1")
    if options.prompt_tokens and options.dialogues:
        parser.error("--prompt_tokens and --dialogues exclude each other")
    if not 5 <= options.response_lengths[0] < options.response_lengths[1]:
        parser.error("--response_lengths: MIN must be at least 5 (the notebooks' min_length) and below MAX")
    # A fixed order without duplicates, whatever the order of the arguments.
    options.dtypes = [dtype for dtype in DTYPES if dtype in options.dtypes]
    return options


@user_errors()
def main():
    options = parse_options()
    cache = Path(options.scratch or Path(tempfile.gettempdir()) / "detox_ppo_step_time").resolve()
    classic_python = options.classic_python
    if not classic_python and not options.short:
        classic_python = make_classic_environment(cache / "classic")
    results, versions, source_code = {}, {}, (ROOT / "detox_ppo.py").read_bytes()
    with tempfile.TemporaryDirectory(prefix="step_time_") as scratch:
        scratch = Path(scratch)
        models = find_models(options, scratch if options.short else cache)
        shapes = {name: json.loads((Path(path) / "config.json").read_text()) for name, path in models.items()}
        dataset, steps = make_plan(options, models, scratch)
        lengths = [len(prompt) for step in steps[1:] for prompt in step["prompts"]]
        limits = [limit for step in steps[1:] for limit in step["caps"]]
        print(f"{processor()}, {options.threads} threads; {platform.platform()}, Python {platform.python_version()}")
        source = options.dialogues or "assembled from the bundled dialogues, DialogSum's lengths"
        print(f"prompts: {source}; mean {statistics.mean(lengths):.0f}, {min(lengths)} to {max(lengths)} tokens")
        print(f"max_new_tokens: mean {statistics.mean(limits):.1f}, {min(limits)} to {max(limits)}")
        print(
            f"batch {options.batch_size}, minibatches of {options.mini_batch_size}, LoRA r={LORA_R}, {options.device}"
        )
        if not classic_python:
            print("no classic environment (--classic_python): only ours is measured, the ratios are null")

        child = [sys.executable, str(Path(__file__).resolve()), "--child"]
        for dtype in options.dtypes:
            runs, peaks = {"ours": [], "classic": []}, []
            plan = {"dtype": dtype, "device": options.device, "steps": steps, "lora_r": LORA_R, **models}
            plan |= {"batch_size": options.batch_size, "mini_batch_size": options.mini_batch_size}
            plan["score_text"] = recipe()["score_text"] if options.recipe else "query_response"
            plan["arguments"] = our_arguments(options, models, dataset, scratch / "run", dtype)
            for number in range(1, options.rounds + 1):
                label = f"{dtype} round {number}/{options.rounds}"
                peak = run_child([*child, "matrix_peak"], plan, scratch, options, f"{label} torch.mm")["peak"]
                peaks.append(peak)
                commands = {"ours": [*child, "ours"]}
                if classic_python:
                    commands["classic"] = [classic_python, str(HERE / "classic_trainer.py")]
                for name, command in commands.items():
                    run = run_child(command, plan, scratch, options, f"{label} {name}")
                    runs[name].append(run | {"peak": peak})
                    versions[name] = run["versions"]
            sides = {name: summarize(done, shapes, steps, options.recipe) for name, done in runs.items() if done}
            results[dtype] = {"peak_gflops": [peak / 1e9 for peak in peaks], **sides}
            print_table(dtype, sides, peaks)

    if (ROOT / "detox_ppo.py").read_bytes() != source_code:
        stop("detox_ppo.py changed during the measurement: the figures above mix versions of it")
    print()
    for name, packages in versions.items():
        print(f"{name}: {', '.join(f'{package} {version}' for package, version in packages.items())}")
    if len({packages["torch"] for packages in versions.values()}) > 1:
        print("warning: the two sides use different builds of torch")

    last = {"short": options.short, "recipe": options.recipe, "threads": options.threads, "processor": processor()}
    for dtype in DTYPES:
        sides = results.get(dtype, {})
        measured = [name for name in versions if name in sides]
        seconds = {name: sides[name]["step"]["median"] for name in measured}
        memory = {name: sides[name]["peak_memory"]["median"] for name in measured}
        compared = len(seconds) == 2
        last[f"seconds_{dtype}"] = seconds
        last[f"ratio_{dtype}"] = seconds["classic"] / seconds["ours"] if compared else None
        last[f"memory_ratio_{dtype}"] = memory["ours"] / memory["classic"] if compared else None
        share = sides.get("ours", {}).get("peak_share")
        last[f"peak_share_{dtype}"] = share["median"] if share else None
    print(json.dumps(last | {"versions": versions, "details": results}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child = {"ours": ours, "matrix_peak": matrix_peak}[sys.argv[2]]
        result = child(json.loads(Path(sys.argv[3]).read_text()))
        Path(sys.argv[4]).write_text(json.dumps(result))
    else:
        main()
