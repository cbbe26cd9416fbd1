"""Several processes: they learn the same as one process, print once and end together.

This compares them over ten steps and the complete test split of the toy example, in three minutes on 2 cores:

    python tests/test_processes.py --config checkpoints/tiny/config.yaml --max_ppo_steps 10 --eval_samples 399
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import forks  # noqa: E402
from kill_points import FAST, wait_for_steps  # noqa: E402
from scaling import LAUNCH  # noqa: E402

import detox_ppo  # noqa: E402


def start(processes, args, directory):
    """Start a recorded run as a user does, in a new directory, the parent of its output_dir."""
    directory.mkdir(parents=True)
    launch = [*LAUNCH.split(), str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    script = [str(ROOT / "tests" / "noted_run.py"), str(directory)]
    command = [sys.executable, *launch, *script, *args, "--output_dir", str(directory / "run"), "--device", "cpu"]
    with open(directory / "out", "w") as out, open(directory / "err", "w") as err:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)


def fork(server, args, directory, prepare=(), processes=2):
    """Start processes without a launcher, each in its own directory; see forks.py."""
    args = [*args, "--output_dir", str(directory / "run")]
    return [server.start(args, directory / env["RANK"], prepare, env) for env in forks.ranks(processes)]


def errors(output):
    return re.findall(r"^detox_ppo.py: error: .*", output, re.MULTILINE)


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def newest_of(directory):
    return detox_ppo.Checkpoints(directory / "run", 1).paths()[0].name


def read_sampled(directory):
    """The responses of every prompt, in the order in which they were sampled."""
    sampled = {}
    for file in sorted(directory.glob("sampled.*.jsonl")):
        for line in file.read_text().splitlines():
            prompt, tokens = json.loads(line)
            sampled.setdefault(tuple(prompt), []).append(tokens)
    return sampled


def compare(one, other):
    """The share of equal responses, and the largest relative difference of a metric."""
    expected, found = read_sampled(one), read_sampled(other)
    assert {prompt: len(texts) for prompt, texts in expected.items()} == {p: len(t) for p, t in found.items()}
    equal = [pair[0] == pair[1] for prompt in expected for pair in zip(expected[prompt], found[prompt], strict=True)]
    lines = read_metrics(one), read_metrics(other)
    assert len(lines[0]) == len(lines[1])
    differences = {}
    for first, second in zip(*lines, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            if not name.startswith("time/"):
                # Some are zero except for rounding, such as the mean of whitened advantages.
                difference = abs(first[name] - second[name]) / max(abs(first[name]), 1e-3)
                differences[name] = max(differences.get(name, 0), difference)
    worst = max(differences, key=differences.get)
    return sum(equal) / len(equal), len(equal), worst, differences[worst]


def within_the_interval(one, other):
    """Whether each run's final summary toxicity lies in the other's 95% interval of it."""
    found = [json.loads((path / "run" / "results.json").read_text())["summary_toxicity"] for path in (one, other)]
    spans = []
    for block in found:
        low, high = (block["before"]["mean"] + block["paired_difference"][end] for end in ("ci_low", "ci_high"))
        spans.append((low - 1e-6, block["after"]["mean"], high + 1e-6))
    return all(low <= other <= high for (low, _, high), (_, other, _) in (spans, spans[::-1]))


@pytest.fixture(scope="module")
def endless(small_arguments):
    """The arguments of a run that only a signal ends; one of its two processes has nothing to evaluate."""
    return small_arguments(max_ppo_steps=10_000, save_steps=1, eval_samples=1)


@pytest.fixture(scope="module")
def launched(endless, tmp_path_factory):
    """An endless run of two processes with accelerate's launcher, and its directory."""
    directory = tmp_path_factory.mktemp("processes") / "launched"
    process = start(2, endless, directory)
    yield process, directory
    process.terminate()  # not kill, which would leave its children behind
    process.wait()


def run_by_one_and_two(forked, args, base):
    """Directories of the same run by one process and by two; the file "told" in each has their output."""
    found = {1: base / "one", 2: base / "two"}
    runs = {
        count: fork(forked, args, path, [FAST, ["noted_run:note", {"directory": str(path)}]], count)
        for count, path in found.items()
    }
    for count, path in found.items():
        assert [run.wait() for run in runs[count]] == [0] * count, [run.output for run in runs[count]]
        (path / "told").write_text("".join(run.output for run in runs[count]))
    return found


@pytest.fixture(scope="module")
def ended(small_arguments, forked, tiny, tmp_path_factory):
    """A run with all its stages, by one process and by two."""
    base = tmp_path_factory.mktemp("ended")
    shutil.copytree(tiny / "classifier", base / "judge")
    args = small_arguments(
        adapter_name="",
        lora_dropout=0,  # each process would have its own
        sft_steps=2,
        sft_batch_size=4,
        max_ppo_steps=3,
        batch_size=6,
        mini_batch_size=3,  # of which one process takes two rows, the other one
        ppo_epochs=2,
        learning_rate=1e-3,
        eval_samples=5,
        save_steps=2,
        save_total_limit=9,
        report_to="tensorboard",
        judge_model_name=base / "judge",
        judge_label="hate",
    )
    return run_by_one_and_two(forked, args, base)


def test_a_signal_to_one_process_stops_all_after_the_same_step(forked, endless, tmp_path):
    runs = fork(forked, endless, tmp_path)
    wait_for_steps(tmp_path / "run", 2)
    os.kill(runs[1].pid, signal.SIGTERM)
    assert [run.wait() for run in runs] == [0, 0]
    assert newest_of(tmp_path) == f"checkpoint-{read_metrics(tmp_path)[-1]['step']}.pt"
    told = "".join(run.output for run in runs)
    assert told.count("stopped by SIGTERM") == 1 and not errors(told) and "Traceback" not in told


def test_a_user_error_of_one_process_is_reported_and_ends_all(forked, endless, tmp_path):
    runs = fork(forked, endless, tmp_path, [["forks:mistaken", {"rank": 1}]])
    assert [run.wait() for run in runs] == [2, 2]
    (told,) = errors("".join(run.output for run in runs))
    assert told.endswith("only here")


def test_a_process_that_dies_takes_the_others_down(launched):
    process, directory = launched
    wait_for_steps(directory / "run", 2)
    os.kill(int((directory / "process.1").read_text()), signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    (told,) = errors((directory / "err").read_text())
    assert "Another process of this run has ended" in told and "--resume" in told
    step = detox_ppo.Checkpoints(directory / "run", 1).load()["state"].step
    assert step >= 1 and newest_of(directory) == f"checkpoint-{step}.pt"  # it is valid
    assert "Signal 9 (SIGKILL)" in (directory / "err").read_text()  # accelerate's own account of who died


def test_only_the_first_process_reports_an_error(monkeypatch):
    """A user error in all processes is printed once; here two in one process, with their shared store."""
    assert detox_ppo.first_to_exit() and detox_ppo.first_to_exit()  # alone
    store = torch.distributed.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert detox_ppo.first_to_exit() and not detox_ppo.first_to_exit()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_unsupported_launches_are_an_error(way, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(SystemExit) as stop:
        detox_ppo.main([])
    assert stop.value.code == 2 and way in capsys.readouterr().err


@pytest.fixture
def several(monkeypatch):
    """Make this process behave like one of several."""

    def pretend(index, count, device="cpu"):
        state = PartialState()
        for name, value in (("process_index", index), ("num_processes", count), ("device", torch.device(device))):
            monkeypatch.setitem(state._shared_state, name, value)

    return pretend


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_row_belongs_to_one_process(several, count):
    lengths = [7, 3, 3, 9, 1, 4]
    shares = []
    for index in range(count):
        several(index, count)
        shares.append(detox_ppo.local_rows(torch.tensor([5, 0, 3, 1, 2]), lengths))
    assert sorted(sum(shares, [])) == [0, 1, 2, 3, 5]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if count == 2:  # each gets one of the two shortest
        assert [len({1, 2} & set(rows)) for rows in shares] == [1, 1]


def test_sizes_and_devices_that_do_not_fit_the_processes(several, small_config, tmp_path, monkeypatch):
    several(0, 3)
    for name, options in (("batch_size 4", {}), ("sft_batch_size 16", {"batch_size": 6})):
        with pytest.raises(detox_ppo.UserError, match=f"--{name} is not a multiple of the number of processes, 3"):
            detox_ppo.run(small_config(output_dir=tmp_path / "run", **options))
    several(1, 3, "cuda:1")
    # An empty allocation tests whether a device exists.
    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(device=torch.device(device)))

    def resolved(device):
        return detox_ppo.resolve_device(small_config(device=device, batch_size=6, sft_batch_size=6))[0]

    assert resolved("auto") == resolved("cuda") == torch.device("cuda:1")
    for device in ("cpu", "cuda:0"):
        with pytest.raises(detox_ppo.UserError, match=f"--device {device}"):
            resolved(device)


def test_two_processes_learn_the_same_as_one(ended):
    one, two = ended.values()
    equal, count, worst, difference = compare(one, two)
    assert count == 3 * 6 + 3 * 2 * 5  # PPO; base, before and after, sampled and greedy
    assert len(list(two.glob("sampled.*.jsonl"))) == 2  # each process sampled a share
    assert equal >= 0.999
    assert difference < 1e-3, worst
    assert within_the_interval(one, two)
    adapters = [load_file(path / "run" / "adapter" / "adapter_model.safetensors") for path in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).norm() < 1e-2 * tensor.norm(), name
    texts = [pd.read_csv(path / "run" / "comparison.csv", dtype=str) for path in (one, two)]
    assert texts[0]["response_after"].equals(texts[1]["response_after"])


def test_two_processes_share_the_encoder_states_and_the_human_summaries(small_arguments, forked, tmp_path):
    """Each trains on the rows that it sampled: of a minibatch of three it may have none or all."""
    options = {
        "freeze_encoder": True,
        "ptx_coef": 0.5,
        "content_coef": 10,
        "batch_size": 6,
        "mini_batch_size": 3,
        "ppo_epochs": 2,
    }
    args = small_arguments(learning_rate=1e-3, eval_samples=2, **options)
    one, two = run_by_one_and_two(forked, args, tmp_path).values()
    equal, count, worst, difference = compare(one, two)
    assert count == 2 * 6 + 2 * 2 * 2 and equal == 1 and difference < 1e-3, worst
    assert min(line["ppo/loss/ptx"] for line in read_metrics(one)) > 0
    content = [[line["ppo/mean_content"] for line in read_metrics(directory)] for directory in (one, two)]
    assert content[1] == pytest.approx(content[0], abs=1e-5) and min(content[0]) > 0
    adapters = [load_file(path / "run" / "adapter" / "adapter_model.safetensors") for path in (one, two)]
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).norm() < 1e-2 * tensor.norm(), name


def test_each_text_is_scored_by_one_process(ended):
    """Dialogues once; human summaries twice, by the classifier and by the judge."""
    for directory in ended.values():
        files = sorted(directory.glob("scored.*.jsonl"))
        shares = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        rows = pd.read_csv(directory / "run" / "comparison.csv", dtype=str)
        for texts, times in ((rows["dialogue"], 1), (rows["human_summary"], 2)):
            counts = [sum(share.count(text) for text in texts) for share in shares]
            assert sum(counts) == times * len(texts) and min(counts) > 0
    judged = [pd.read_csv(path / "run" / "comparison.csv").filter(like="judge") for path in ended.values()]
    assert judged[0].shape == (5, 4) and judged[1].to_numpy() == pytest.approx(judged[0].to_numpy(), abs=1e-3)
    human = [json.loads((path / "run" / "results.json").read_text())["human"] for path in ended.values()]
    assert human[0]["judge_toxicity"]["mean"] == pytest.approx(human[1]["judge_toxicity"]["mean"], abs=1e-5)


def test_only_one_process_prints_and_writes(ended):
    one, two = ended.values()
    numbers = re.compile(r" *-?\d[\d.,]*")
    told = [[numbers.sub("#", line) for line in (path / "told").read_text().splitlines()] for path in (one, two)]
    others = [line.replace("/two/", "/one/") for line in told[1] if not line.startswith("waiting for all")]
    assert sorted(told[0]) == sorted(others)
    written = [
        sorted(re.sub(r"detox_ppo/.*", "#", str(file.relative_to(path / "run"))) for file in path.rglob("run/**/*"))
        for path in (one, two)
    ]
    assert written[0] == written[1] and "checkpoint-5.pt" in written[0]
    results = json.loads((two / "run" / "results.json").read_text())
    assert results["environment"]["num_processes"] == 2


def test_a_run_of_two_processes_is_resumed_by_one(ended, tmp_path):
    two = ended[2]
    config = json.loads((two / "run" / "results.json").read_text())["config"]
    config |= {"resume": True, "output_dir": str(tmp_path), "report_to": "none"}
    shutil.copy(two / "run" / "checkpoint-4.pt", tmp_path)
    detox_ppo.run(detox_ppo.DetoxConfig(**config))
    last, again = read_metrics(two)[-1], json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert again["step"] == 3
    for name in ("objective/kl", "ppo/mean_scores", "ppo/loss/value", "ppo/returns/mean"):
        assert again[name] == pytest.approx(last[name], rel=1e-3, abs=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for number in (1, 2):
            runs.append(Path(scratch) / str(number))
            process = start(number, sys.argv[1:], runs[-1])
            assert process.wait() == 0, (runs[-1] / "err").read_text()
        equal, count, worst, difference = compare(*runs)
        print(f"{equal:.4%} of {count} responses have the same tokens; largest difference {difference:.1e} ({worst})")
        print(f"final summary toxicity within the other's interval: {within_the_interval(*runs)}")
