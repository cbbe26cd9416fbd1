import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

# A test that tries to reach the hub must fail at once. Tests of the hub start processes with their own settings.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Models this small gain nothing from a second thread, and become much slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# A shell that starts the tests in the background ignores Ctrl-C, and every run would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# the modules under test are single files in the repository root
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One process per core, at most four; no extra processes for a single file."""
    files = {argument.split("::")[0] for argument in config.args}
    return 0 if all(map(os.path.isfile, files)) and len(files) == 1 else min(4, len(os.sched_getaffinity(0)))


TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"


@pytest.fixture(scope="session")
def tiny():
    """The bundled toy example: base/, adapter/, classifier/, dialogues/train.csv and config.yaml."""
    return TINY


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory):
    """A directory with thirty of the bundled dialogues; preparing all 2,000 takes longer than a run."""
    import kill_points

    return kill_points.make_dialogues(tmp_path_factory.mktemp("data") / "dialogues")


@pytest.fixture(scope="session")
def small_arguments(tiny, dialogues):
    """Command-line arguments of a small, exact run on the toy example; keywords override options."""

    def arguments(**overrides):
        options = {
            "model_name": tiny / "base",
            "adapter_name": tiny / "adapter",
            "reward_model_name": tiny / "classifier",
            "dataset_name": dialogues,
            "device": "cpu",
            "dtype": "float32",
            "max_ppo_steps": 2,
            "batch_size": 4,
            "mini_batch_size": 2,
            "output_min_length": 4,
            "output_max_length": 8,
            "eval_samples": 4,
            "eval_max_new_tokens": 8,
        }
        options |= overrides
        return [str(part) for name, value in options.items() for part in (f"--{name}", value)]

    return arguments


@pytest.fixture(scope="session")
def small_config(small_arguments):
    import detox_ppo

    return lambda **overrides: detox_ppo.parse_config(small_arguments(**overrides))


@pytest.fixture(scope="module")
def quick():
    """Runs skip slow parts that most tests do not check: 10,000 resamples of four prompts, and pictures."""
    import kill_points

    with pytest.MonkeyPatch.context() as patch:
        kill_points.fast(patch.setattr)
        yield


@pytest.fixture(scope="session")
def load_small(small_config):
    """Load a policy and its tokenizer in float32 on the CPU, for tests that modify them."""
    import torch

    import detox_ppo

    def load(dtype=torch.float32, **overrides):
        config = small_config(**overrides)
        policy, tokenizer = detox_ppo.load_policy(config, torch.device("cpu"), dtype)
        # A new value head returns 0 everywhere, which would hide misplaced values.
        torch.nn.init.normal_(policy.value_head.summary.weight, std=0.05)
        return SimpleNamespace(config=config, policy=policy, tokenizer=tokenizer)

    return load


@pytest.fixture(scope="session")
def small(load_small):
    """A policy and its tokenizer, shared by the tests that do not modify them."""
    return load_small()


@pytest.fixture(scope="session")
def classifier(small_config):
    import torch

    import detox_ppo

    return detox_ppo.ToxicityClassifier(small_config(), torch.device("cpu"))


@pytest.fixture(scope="session")
def splits(small, tiny):
    """The first rows of the bundled dialogues as prompts: 32 to train on, 8 held out."""
    import detox_ppo

    rows = detox_ppo.load_dialogues(str(tiny / "dialogues")).select(range(40))
    return detox_ppo.build_dataset(rows, small.tokenizer, small.config)


@pytest.fixture(scope="session")
def forked():
    """A server that starts runs quickly in separate processes: see forks.Server."""
    import forks

    with forks.Server() as server:
        yield server


@pytest.fixture(scope="session")
def undisturbed(forked, dialogues, tmp_path_factory):
    """A finished run of a few seconds with SFT and PPO; left: the content of its files."""
    import kill_points

    directory = tmp_path_factory.mktemp("undisturbed")
    args = kill_points.arguments(dialogues)
    run = forked.run(args, directory, [kill_points.FAST])
    assert run.code == 0, run.output
    files = kill_points.left(directory / "run")
    return SimpleNamespace(args=args, dialogues=dialogues, directory=directory, left=files)
