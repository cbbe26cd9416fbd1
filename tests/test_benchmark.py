"""Short runs of the real benchmark commands; their formulas are checked against values computed by hand."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import forks
import hub
import kill_points
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

import detox_ppo

ROOT = Path(__file__).resolve().parent.parent
# Benchmarks that start processes; the others run in this process. For a run of a single process, scaling.py runs it
# itself, so that must not be forked again.
COMMANDS = {
    "step_time": "benchmarks/step_time.py --short --threads 1 --dtypes float32",
    "memory": "benchmarks/memory.py --short --threads 1",
    "scaling": "benchmarks/scaling.py --short --processes 2 1 --output_dir {output_dir}",
    "seeds": "checkpoints/tiny/seeds.py --seeds 3 --output_dir {output_dir} --dataset_name {dialogues} "
    "--max_ppo_steps 2 --eval_samples 8",
}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    for directory in ("benchmarks", "checkpoints/tiny"):
        monkeypatch.syspath_prepend(str(ROOT / directory))


def as_command(script, args):
    """Setup call of a forked process (see forks.py): run a script whose imports are already loaded."""
    subprocess.run = run_forked
    kill_points.fast()
    os.chdir(ROOT)
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))
    sys.stdout.reconfigure(line_buffering=True)
    runpy.run_path(script, run_name="__main__")
    sys.exit()


def run_forked(command, start=subprocess.run, **options):
    """subprocess.run that runs our scripts in forks; without a file for stdout all output is returned as stderr."""
    launched, processes = command[1:], [{}]
    if "--num_processes" in command:  # accelerate's launcher, as in test_processes.py
        at = command.index("--num_processes")
        launched, processes = command[at + 2 :], forks.ranks(int(command[at + 1]))
    elif not command[1].endswith(".py"):
        return start(command, **options)
    with tempfile.TemporaryFile("w+") as output:
        started = []
        for rank in processes:
            started.append(os.fork())
            if not started[-1]:
                for stream in (1, 2):
                    os.dup2((options.get("stdout") or output).fileno(), stream)
                os.environ |= (options.get("env") or {}) | rank
                os._exit(forks.exit_code(lambda: as_command(launched[0], launched[1:])))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
        output.seek(0)
        return subprocess.CompletedProcess(command, max(codes, key=abs), "", output.read())


@pytest.fixture(scope="module")
def started(forked, tmp_path_factory):
    """Starts all commands at once; started(name) waits for one and returns its output and directory."""
    runs, directories = {}, {name: tmp_path_factory.mktemp(name) for name in COMMANDS}
    dialogues = kill_points.make_dialogues(tmp_path_factory.mktemp("dialogues"), 120)
    for name, directory in directories.items():
        script, *args = COMMANDS[name].format(output_dir=directory, dialogues=dialogues).split()
        runs[name] = forked.start([], directory, [["test_benchmark:as_command", {"script": script, "args": args}]])

    def wait(name):
        assert runs[name].wait() == 0, runs[name].output[-2000:]
        return runs[name].output, directories[name]

    return wait


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a benchmark's main in this process and returns its stdout."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        module.main()
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)  # some benchmarks set it, and a second thread would slow down later tests


# Benchmarks in this process, while the others run


def test_growth_is_measured_fitted_and_plotted(started, tmp_path, monkeypatch, call):
    import growth

    # One point per curve; the fit is tested below.
    monkeypatch.setattr(growth, "BATCHES", (8,))
    monkeypatch.setattr(growth, "PROMPTS", (200,))
    last = json.loads(call(growth, "--short", "--threads", 1, "--output_dir", tmp_path).splitlines()[-1])
    assert last == json.loads((tmp_path / "growth.json").read_text())
    assert [point["batch_size"] for point in last["batch_size"]] == [8]
    assert [point["prompt_tokens"] for point in last["prompt_tokens"]] == pytest.approx([200], abs=3)
    for point in last["batch_size"] + last["prompt_tokens"]:
        assert min(point["seconds"], point["memory"], point["tflop"], point["positions"]) > 0
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"growth.png", "growth.json"}


def test_growth_fit_by_hand():
    import growth

    sizes = [(1, 10), (4, 10), (2, 70), (9, 30)]
    points = [{"tflop": tflop, "positions": n, "seconds": 3 * tflop + 0.02 * n} for tflop, n in sizes]
    fitted = growth.fit(points)
    assert fitted == {"seconds_per_tflop": pytest.approx(3), "seconds_per_position": pytest.approx(0.02)}
    assert [point["expected"] for point in points] == pytest.approx([point["seconds"] for point in points])


def test_evaluation_is_timed_against_generate(started, tmp_path, call):
    import evaluation

    last = json.loads(call(evaluation, "--short", "--threads", 1, "--output_dir", tmp_path).splitlines()[-1])
    assert last["equal_greedy"] == last["prompts"] == 4  # same summaries, so same work
    for decoding in ("sampled", "greedy"):
        rounds = list(zip(*(last[decoding][side] for side in ("ours", "transformers", "ratio")), strict=True))
        assert len(rounds) == 2
        for ours, theirs, ratio in rounds:
            assert theirs > 0 and ours == pytest.approx(ratio * theirs)


def test_learning_curve_evaluates_its_runs(started, quick, tmp_path, monkeypatch, call):
    import learning_curve

    monkeypatch.chdir(ROOT)  # where it goes
    last = json.loads(call(learning_curve, "--short", "--output_dir", tmp_path).splitlines()[-1])
    start, ours = (last["sides"][side] for side in ("start", "ours"))
    # The start is its own reference; two steps move the policy a little, and the base model is far away.
    assert start["kl_start"]["mean"] == 0 < abs(ours["kl_start"]["mean"]) < 1 < ours["kl_base"]["mean"]
    assert start["slot_accuracy"]["mean"] > 0.9
    curves = json.loads((tmp_path / "learning_curve.json").read_text())["runs"]
    assert [(run["side"], len(run["curve"])) for run in curves] == [("start", 0), ("ours", 2)]
    # The held-out evaluation of the last checkpoint equals that of the saved adapter; likewise for the start.
    for run, step in zip(curves, (0, 2), strict=True):
        (point,) = run["held_out"]
        assert point["step"] == step
        for name, key in {"summary_toxicity": "summary_toxicity", "rougeL": "rougeL", "kl": "kl_start"}.items():
            assert point[name] == pytest.approx(run["evaluation"][key], abs=1e-6)
    assert curves[0]["evaluation"]["reward"] != curves[1]["evaluation"]["reward"]
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_real_text_trains_and_evaluates(started, quick, tmp_path, tiny, monkeypatch, call):
    """Some rows of the toy example replace DialogSum."""
    import real_text

    rows = pd.read_csv(tiny / "dialogues" / "train.csv")[:140]
    parts = {"train": rows[:110], "rude": rows[120:]}
    for name, part in parts.items():
        real_text.write_lines(part, tmp_path / f"{name}.jsonl")
    arguments = ["--dialogsum", tmp_path, "--rude", tmp_path / "rude.jsonl", "--model_name", tiny / "base"]
    arguments += ["--reward_model", tiny / "classifier", "--judge_model", tiny / "judge", "--rude_held_out", 4]
    monkeypatch.chdir(ROOT)  # where it goes
    recipe = "rude-frozen-ptx-0.1-content-10"
    arguments += ["--short", "--recipes", "notebooks", recipe, "--output_dir", tmp_path / "out"]
    arguments += ["--embedding_model", tiny / "classifier"]
    printed = call(real_text, *arguments)
    data = tmp_path / "out" / "data"
    mixed, held_out = (real_text.read_lines(data / name) for name in ("mixed/train.jsonl", "held_out.jsonl"))
    assert (len(mixed), len(held_out)) == (2 * 16, 22) and (mixed["summary"] == "").sum() == 16
    assert not set(mixed["dialogue"]) & set(held_out["dialogue"])
    changes = pd.read_csv(tmp_path / "out" / "real_text.csv").set_index(["recipe", "held_out", "decoding"])
    steps = (tmp_path / "out" / recipe / "seed-0" / "metrics.jsonl").read_text()
    assert "ppo/loss/ptx" in steps and "ppo/mean_content" in steps
    assert changes.loc[recipe, "DialogSum", "sampled"]["kl"] != 0  # the trained adapter differs from the reference
    with pytest.raises(SystemExit):
        real_text.recipe_options("classic-ptx-0.1")
    assert len(changes) == 2 * 2 * 2 and (changes["rows"] == 4).all()
    for name in ("summary_toxicity", "judge_toxicity"):
        change = changes[f"{name}_after"] - changes[f"{name}_before"]
        assert change.between(changes[f"{name}_ci_low"] - 1e-3, changes[f"{name}_ci_high"] + 1e-3).all()
    assert changes.filter(like="embedding").notna().all(axis=None)
    table = [line for line in printed.splitlines() if line.startswith("| `notebooks` (0) |")]
    assert len(table) == 2 and all(line.count("→") >= 5 for line in table)
    # A second start repeats no run and prints the same table.
    monkeypatch.setattr(real_text, "detox", None)
    monkeypatch.setattr(real_text, "child", None)
    again, printed = call(real_text, *arguments).splitlines(), printed.splitlines()
    results = [[line for line in lines if line.startswith("| ")] for lines in (again, printed)]
    assert results[0] == results[1] and len(results[0]) == 2 * (1 + 2)


def test_learning_curves_are_summarized_and_plotted(tmp_path):
    """Made-up runs: ours gains 1 per step, the classic trainer 0.5; the start is only evaluated."""
    import learning_curve

    def made_up(side, seed, slope):
        scores = [slope * step for step in range(1, 13)] if slope else []
        curve = [{"score": s, "score_without_dropout": s, "kl": 0.1, "seconds": 2.0} for s in scores]
        at = [
            {"step": n, "summary_toxicity": 0.5 / (n + 1), "rougeL": 0.9, "kl": n / 10}
            for n in ([5, 12] if slope else [0])
        ]
        evaluation = {"summary_toxicity": 0.1 + 0.1 * seed if slope else 0.4}
        return {"side": side, "batch_size": 32, "curve": curve, "held_out": at, "evaluation": evaluation}

    sides = {"start": 0, "ours": 1.0, "classic": 0.5}
    runs = [made_up(side, seed, slope) for side, slope in sides.items() for seed in (0, 1)]
    start, ours, classic = runs[:2], runs[2:4], runs[4:]
    summary = learning_curve.summarize(ours, start)
    assert summary["summary_toxicity"] == pytest.approx({"mean": 0.15, "min": 0.1, "max": 0.2})
    assert summary["change_percent"] == pytest.approx({"mean": -62.5, "min": -75, "max": -50})
    assert summary["seconds_a_step"]["mean"] == 2
    # The mean of 1, 2, ... n reaches 3 at n = 5; with half the slope at 11, where the window of ten has moved.
    assert (summary["samples_to_3"]["mean"], summary["seconds_to_3"]["mean"]) == (5 * 32, 5 * 2)
    assert learning_curve.summarize(classic, start)["samples_to_3"]["mean"] == 11 * 32
    assert "samples_to_3" not in learning_curve.summarize(start, start)
    assert learning_curve.evaluated_steps(50) == [5, 10, 20, 30, 45, 50] and learning_curve.evaluated_steps(3) == [3]
    learning_curve.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# User errors


def test_user_errors_are_one_line(tmp_path, monkeypatch, call, capsys):
    """In the benchmark's own options, in the options of a run, and in the run itself."""
    import growth
    import learning_curve
    import step_time

    monkeypatch.chdir(tmp_path)
    Path("dialogues.csv").write_text("text,summary\na,b\n")
    step_time.write_narrow_models(Path("models"))
    labels = {"id2label": {0: "fine", 1: "hate"}, "label2id": {"fine": 0, "hate": 1}}
    config = Path("models", hub.CLASSIFIER, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | labels))
    for module, args, words in (
        (step_time, "--models nowhere", "--models nowhere: no model in"),
        (
            step_time,
            "--dialogues dialogues.csv",
            "--dataset_name dialogues.csv: can't be loaded: no column 'dialogue'",
        ),
        (growth, "--models models --output_dir growth", "--reward_label 'nothate' is not a label of"),
        (learning_curve, "--learning_rate -1 --output_dir learning", "--learning_rate is -1"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(module, "--short", *args.split())
        assert stop.value.code == 2
        (message,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert message.startswith(f"{module.__name__}.py: error: ") and words in message


def test_error_of_a_child_process_is_quoted(tmp_path, monkeypatch, capsys):
    """A user error is one line; any other failure has its stack trace."""
    import step_time

    options = SimpleNamespace(threads=1)
    child = "import sys; print('a\\nchild.py: error: why', file=sys.stderr); sys.exit({})"
    for code, shown in (
        (2, "x: child.py: error: why"),
        (1, "x: failed with exit code 1; the end of its output is above"),
    ):
        with pytest.raises(SystemExit) as stop:
            step_time.run_child([sys.executable, "-c", child.format(code)], {}, tmp_path, options, "x")
        assert stop.value.code == 2
        *before, last = capsys.readouterr().err.splitlines()
        assert last.endswith(f"error: {shown}") and bool(before) == (code == 1)


# The published logits


def test_published_logits_are_compared(tiny, monkeypatch, call, capsys):
    import published_logits

    arguments = ["--reward_model_name", tiny / "classifier"]
    with pytest.raises(SystemExit) as end:
        call(published_logits, *arguments)
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "the logits differ" in printed and "nothate   4.6532   hate  -4.1782" in printed
    classifier = detox_ppo.ToxicityClassifier(
        detox_ppo.DetoxConfig(reward_model_name=arguments[1]), torch.device("cpu")
    )
    ours = {text: tuple(classifier.logits([text])[0].tolist()) for text in published_logits.PUBLISHED}
    monkeypatch.setattr(published_logits, "PUBLISHED", ours)
    with pytest.raises(SystemExit) as end:
        call(published_logits, *arguments)
    assert end.value.code == 0 and "the logits agree" in capsys.readouterr().out


# Rewards in bfloat16


@pytest.mark.parametrize("largest, code", [(0.01, 0), (-1.0, 1)])
def test_reward_precision_compares_both_dtypes(tiny, tmp_path, monkeypatch, call, capsys, largest, code):
    import reward_precision

    rows = [
        {"id": f"row_{i}", "dialogue": f"#Person1#: You are number {i}.", "summary": "What a fool."} for i in range(3)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.csv").write_text('summary\n"Nice, that is."\n')
    monkeypatch.setattr(reward_precision, "LARGEST", largest)
    arguments = ["--reward_model_name", tiny / "classifier", "--texts"]
    with pytest.raises(SystemExit) as end:
        call(reward_precision, *arguments, tmp_path / "a.jsonl", tmp_path / "b.csv")
    assert end.value.code == code
    printed = capsys.readouterr().out
    assert printed.startswith("7 texts,") and "P(hate): mean 0." in printed and "in bfloat16" in printed
    with pytest.raises(SystemExit) as end:
        call(reward_precision, *arguments, tmp_path / "none.csv")
    message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error: --texts " in message and "none.csv" in message


# Step time


def test_step_time_uses_the_given_dialogues_and_tokenizer(tmp_path, monkeypatch, tiny):
    """The prompts are distinct dialogues of the file, tokenized by the given model's tokenizer."""
    import step_time

    rows = pd.read_csv(tiny / "dialogues" / "train.csv").head(30)
    rows.to_json(tmp_path / "dialogsum.jsonl", orient="records", lines=True)
    step_time.write_narrow_models(tmp_path)
    base = AutoTokenizer.from_pretrained(tmp_path / hub.BASE)
    base.add_tokens(["#Person1#: "])  # so that it differs from the bundled tokenizer
    base.save_pretrained(tmp_path / hub.BASE)
    args = f"step_time.py --short --models {tmp_path} --dialogues {tmp_path / 'dialogsum.jsonl'}"
    monkeypatch.setattr(sys, "argv", args.split())
    options = step_time.parse_options()
    _, steps = step_time.make_plan(options, step_time.find_models(options, None), tmp_path)
    known = {tuple(base(detox_ppo.build_prompt(dialogue)).input_ids) for dialogue in rows["dialogue"]}
    prompts = {tuple(prompt) for step in steps for prompt in step["prompts"]}
    assert len(prompts) == 8 and prompts <= known
    options.recipe = True
    models = step_time.find_models(options, None)
    config = detox_ppo.parse_config(
        step_time.our_arguments(options, models, tmp_path / "dialogues.jsonl", "run", "float32")
    )
    assert config.freeze_encoder and config.ptx_coef > 0 and config.score_text == "response"
    assert all(detox_ppo.load_dialogues(config.dataset_name)["summary"])


def test_step_time_without_trl_has_no_ratios(started):
    printed, _ = started("step_time")
    last = json.loads(printed.splitlines()[-1])
    assert last["ratio_float32"] is None and last["memory_ratio_float32"] is None
    assert last["peak_share_float32"] > 0
    ours = last["details"]["float32"]["ours"]
    assert last["seconds_float32"] == {"ours": ours["step"]["median"]}
    parts = sum(ours[phase]["median"] for phase in ("rollout", "score", "optimize"))
    assert 0 < parts == pytest.approx(ours["step"]["median"], rel=0.1)
    assert ours["tokens_per_second"]["median"] > 0 and ours["peak_memory"]["median"] > 100 * 2**20
    # Four responses of 8 to 12 tokens; the classifier also reads the dialogues.
    assert 0 < ours["tokens"]["responses"] <= 4 * 12 < ours["tokens"]["classified"]
    assert "only ours is measured" in printed


def test_flop_counts_of_the_full_size_models():
    import step_time

    shape = {
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
    }
    # All of FLAN-T5-base's 247,577,856 parameters are matrices except the embeddings, the two tables of relative
    # positions and the norms. With one token on each side every matrix and every adapter is used once.
    matrices = 247_577_856 - 32128 * 768 - 2 * 32 * 12 - (12 * 2 + 12 * 3 + 2) * 768
    parts = zip(step_time.encoder_flop(shape, 1), step_time.decoder_flop(shape, 1, 1), strict=True)
    frozen, adapted, attention = map(sum, parts)
    assert (frozen, adapted) == (2 * matrices, 2 * 3_538_944)
    # Twelve encoder layers and twelve decoder layers with two attentions, each over one pair of tokens.
    assert attention == 36 * 4 * 768


# Memory


@pytest.fixture
def memory():
    import memory

    return memory


def test_memory_formula_matches_the_loaded_models(memory, small, classifier, tiny):
    shapes = [json.loads((tiny / part / "config.json").read_text()) for part in ("base", "classifier")]
    estimate = memory.memory(*shapes)
    base = sum(p.numel() for name, p in small.policy.base.named_parameters() if "lora_" not in name)
    assert memory.base_parameters(shapes[0]) == base and estimate["weights"] == 4 * base
    assert estimate["adapters"] == 4 * sum(p.numel() for name, p in small.policy.named_parameters() if "lora_" in name)
    trained = sum(p.numel() for p in small.policy.parameters() if p.requires_grad)
    assert estimate["optimizer"] == 3 * 4 * trained
    assert estimate["classifier"] == 4 * sum(p.numel() for p in classifier.model.parameters())
    # Published sizes, without the adapters.
    sizes = {name: memory.base_parameters(shape) for name, shape in memory.FLAN.items()}
    assert sizes["base"] == 247_577_856 and sizes["xl"] == 2_849_757_184 and sizes["xxl"] == 11_135_332_352


def test_memory_formula_depends_on_the_options(memory):
    def peak(**options):
        return memory.memory(memory.FLAN["base"], dtype="bfloat16", device="cuda", **options)

    plain = peak(mini_batch_size=16)
    assert peak(mini_batch_size=16, gradient_checkpointing=True)["activations"] < 0.5 * plain["activations"]
    assert peak(mini_batch_size=8)["activations"] == plain["activations"] / 2
    assert peak(mini_batch_size=16, processes=2)["activations"] == plain["activations"] / 2
    assert peak(processes=2)["cache"] == plain["cache"] / 2 and peak(processes=2)["weights"] == plain["weights"]
    # On the CPU a pass has few rows, however large the minibatch.
    on_cpu = [memory.memory(memory.FLAN["base"], mini_batch_size=size)["activations"] for size in (4, 16)]
    assert on_cpu[0] == on_cpu[1]


def test_memory_formula_matches_the_measured_peak(started):
    printed, _ = started("memory")
    (measured,) = json.loads(printed.splitlines()[-1])["measured"]
    assert measured["tensors"] == pytest.approx(measured["peak"], rel=0.15)
    assert measured["resident"] > measured["tensors"]
    for size in ("small", "base", "large", "xl", "xxl"):
        assert f"| {size} | " in printed


# Scaling


@pytest.fixture
def scaling():
    import scaling

    return scaling


def test_scaling_is_measured_modelled_and_plotted(started):
    printed, directory = started("scaling")
    last = json.loads(printed.splitlines()[-1])
    assert last == json.loads((directory / "scaling.json").read_text())
    one, two = last["points"]
    assert (one["processes"], two["processes"], one["efficiency"]) == (1, 2, 1)
    assert two["efficiency"] == pytest.approx(one["seconds"] / 2 / two["seconds"])
    assert (directory / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_communication_model_by_hand(scaling, monkeypatch):
    sizes = {"gradients": 100, "batch": 40, "updates": 3}
    network = 10, 0.5  # bytes a second, seconds
    assert scaling.communication(1, network, **sizes) == 0
    # Of four: three updates of 6/4 of the gradients in 6 hops, and 3/4 of the batch in 3 hops.
    assert scaling.communication(4, network, **sizes) == pytest.approx(3 * (150 / 10 + 3) + 30 / 10 + 1.5)
    monkeypatch.setattr(scaling, "LOOPBACK", network)
    measured = {n: scaling.expected(n, 2, 12, network, sizes) for n in (1, 2)}
    assert scaling.fit(measured, sizes) == pytest.approx((2, 12))


# Seeds of the toy example


def test_seeds_are_run_and_reported(started):
    import seeds

    printed, directory = started("seeds")
    names, _, values = ([cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[-3:])
    row = dict(zip(names, values, strict=True))
    run = directory / "seed-3"
    toxicity = json.loads((run / "results.json").read_text())["summary_toxicity"]
    before, after = (toxicity[when]["mean"] for when in ("before", "after"))
    assert row["seed"] == "3" and row["sampled"].startswith(f"{100 * (after / before - 1):+.1f}% [")
    # Variance explained over the last steps together: 1 - (1 * 0.5 + 3 * 0.9) / 4; a skipped step has none.
    steps = [
        {"ppo/skipped_steps": 0, "objective/kl": 0.5, "ppo/returns/var": 1, "ppo/val/var_explained": 0.5},
        {"ppo/skipped_steps": 1},
        {"ppo/skipped_steps": 0, "objective/kl": 0.25, "ppo/returns/var": 3, "ppo/val/var_explained": 0.1},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    summary = seeds.summarize(run)
    assert (summary["values explain"], summary["KL last / largest"]) == ("20%", "0.25 / 0.50")
    for name in ("slots", "slots, greedy", "ROUGE-L", "judge, greedy"):
        assert summary[name] == row[name]
