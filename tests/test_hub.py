"""The stand-in hub against the real download code: every client is a process with an empty cache."""

import csv
import http.client
import json
import subprocess
import sys
from pathlib import Path

import hub
import pytest
from hub import ADAPTER, BASE, CLASSIFIER, DIALOGUES, Repository, StandInHub, hub_environment

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"

# The libraries wait 23 s in all between their attempts at a dead hub; the attempts stay, the waiting goes.
IMPATIENT = "import time\ntime.sleep = lambda seconds: None\n"
DOWNLOAD = """
import json, sys
from huggingface_hub import hf_hub_download
try:
    print(json.dumps(open(hf_hub_download(*sys.argv[1:3], revision=sys.argv[3], repo_type="dataset")).read()))
except Exception as error:
    print(json.dumps([type(error).__name__, isinstance(error, OSError)]))
"""


def client(environment, code, *arguments):
    """Run `code` in a process of its own; what it prints last, as JSON, is the result."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(server, path, method="GET", **headers):
    """One request without any library: status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return result


@pytest.fixture
def dialogues(tmp_path):
    """A DialogSum-shaped repository of three splits; train.csv is large enough for "half" to cut it."""
    directory = tmp_path / "dialogues"
    directory.mkdir()
    (directory / "README.md").write_text("---\nlicense: cc0-1.0\n---\nNothing but greetings.\n")
    for split, rows in (("train", 200), ("validation", 3), ("test", 2)):
        with (directory / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "dialogue", "summary", "topic"])
            for i in range(rows):
                text = f"#Person1#: Hello, this is the {split} row {i}.\n#Person2#: Hello."
                writer.writerow([f"{split}_{i}", text, "Two people greet each other.", "greeting"])
    assert (directory / "train.csv").stat().st_size > 2 * hub.LARGE
    return directory


def test_the_commit_follows_the_contents(dialogues):
    before = Repository(dialogues).sha
    assert Repository(dialogues).sha == before and len(before) == 40
    (dialogues / "README.md").write_text("changed")
    assert Repository(dialogues).sha != before


def test_head_and_ranges(dialogues):
    whole = (dialogues / "train.csv").read_bytes()
    path = f"/datasets/{DIALOGUES}/resolve/main/train.csv"
    with StandInHub({}, {DIALOGUES: dialogues}) as server:
        status, headers, body = ask(server, path, "HEAD")
        assert (status, headers["Content-Length"], body) == (200, str(len(whole)), b"")
        assert headers["X-Repo-Commit"] == server.sha(DIALOGUES) and headers["ETag"].startswith('"')
        assert ask(server, path)[2] == whole
        status, headers, body = ask(server, path, Range="bytes=10-19")
        assert (status, headers["Content-Range"]) == (206, f"bytes 10-19/{len(whole)}")
        assert body == whole[10:20]
        assert ask(server, path, Range="bytes=100-")[2] == whole[100:]
        assert ask(server, path, Range=f"bytes={len(whole)}-")[0] == 416
        assert server.requests[:2] == [("HEAD", path), ("GET", path)]


def test_tree(dialogues):
    (dialogues / "extra" / "deep").mkdir(parents=True)
    (dialogues / "extra" / "deep" / "a b.txt").write_text("?")
    with StandInHub({}, {DIALOGUES: dialogues}) as server:

        def tree(rest):
            entries = json.loads(ask(server, f"/api/datasets/{DIALOGUES}/tree/{rest}")[2])
            return [entry["path"] for entry in entries]

        assert tree("main") == ["README.md", "extra", "test.csv", "train.csv", "validation.csv"]
        assert tree(f"{server.sha(DIALOGUES)}/extra") == ["extra/deep"]
        assert tree("main/extra?recursive=true") == ["extra/deep", "extra/deep/a b.txt"]
        assert tree("main/extra%2Fdeep") == ["extra/deep/a b.txt"]
        assert ask(server, f"/api/datasets/{DIALOGUES}/tree/main/none")[0] == 404
        assert ask(server, f"/datasets/{DIALOGUES}/resolve/main/extra/deep/a%20b.txt")[2] == b"?"


def test_load_dataset(dialogues, tmp_path):
    code = """
import json
from datasets import load_dataset
from huggingface_hub import HfApi
loaded = load_dataset("knkarthick/dialogsum")
rows = {split: rows.num_rows for split, rows in loaded.items()}
print(json.dumps([HfApi().dataset_info("knkarthick/dialogsum").sha, rows, loaded["test"][1]["id"]]))
"""
    with StandInHub({}, {DIALOGUES: dialogues}) as server:
        sha, rows, last = client(server.environment(tmp_path / "home"), code)
    assert sha == server.sha(DIALOGUES)
    assert rows == {"train": 200, "validation": 3, "test": 2} and last == "test_1"


def test_models_and_adapter(tmp_path):
    if not all((TINY / folder).is_dir() for folder in ("base", "classifier", "adapter", "dialogues")):
        pytest.skip(f"the bundled small world is not in {TINY}")
    code = """
import json, sys
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

def load(base, classifier, adapter):
    policy = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), adapter)
    judge = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokens = [AutoTokenizer.from_pretrained(name)("Hello there!").input_ids for name in (base, classifier)]
    return policy.state_dict() | judge.state_dict(), tokens

names, tiny = sys.argv[1:4], sys.argv[4]
got, got_tokens = load(*names)
own, own_tokens = load(*(f"{tiny}/{folder}" for folder in ("base", "classifier", "adapter")))
same = got.keys() == own.keys() and all(torch.equal(got[key], own[key]) for key in got)
print(json.dumps([[HfApi().model_info(name).sha for name in names], same, got_tokens == own_tokens]))
"""
    models, datasets = hub.small_repositories(tmp_path / "repositories", TINY)
    names = (BASE, CLASSIFIER, ADAPTER)
    with StandInHub(models, datasets) as server:
        environment = server.environment(tmp_path / "home")
        shas, same_weights, same_tokens = client(environment, code, *names, str(TINY))
    assert shas == [server.sha(name) for name in names]
    assert same_weights and same_tokens
    fetched = {path for method, path in server.requests if method == "GET" and "/resolve/" in path}
    assert f"/{BASE}/resolve/{server.sha(BASE)}/model.safetensors" in fetched


@pytest.mark.parametrize(
    ("repo_id", "file", "revision", "error"),
    [
        (DIALOGUES, "none.csv", "main", "RemoteEntryNotFoundError"),
        (DIALOGUES, "train.csv", "none", "RevisionNotFoundError"),
        ("example/none", "train.csv", "main", "RepositoryNotFoundError"),
    ],
)
def test_what_is_not_there(dialogues, tmp_path, repo_id, file, revision, error):
    with StandInHub({}, {DIALOGUES: dialogues}) as server:
        result = client(server.environment(tmp_path / "home"), DOWNLOAD, repo_id, file, revision)
    assert result == [error, True]


@pytest.mark.parametrize(
    ("fault", "error", "is_oserror"),
    [
        ("401", "HfHubHTTPError", True),
        ("404", "RemoteEntryNotFoundError", True),
        ("500", "LocalEntryNotFoundError", True),
        ("half", "RemoteProtocolError", False),
        ("refused", "LocalEntryNotFoundError", True),
    ],
)
def test_faults_end_in_errors(dialogues, tmp_path, fault, error, is_oserror):
    """None of them hangs, and which exception each becomes is what callers have to catch."""
    server = StandInHub({}, {DIALOGUES: dialogues}, fault=None if fault == "refused" else fault)
    with server:
        environment = server.environment(tmp_path / "home")
        if fault != "refused":
            result = client(environment, IMPATIENT + DOWNLOAD, DIALOGUES, "train.csv", "main")
    if fault == "refused":  # the port was free a moment ago and is closed now
        result = client(environment, IMPATIENT + DOWNLOAD, DIALOGUES, "train.csv", "main")
    assert result == [error, is_oserror]


def test_half_lets_small_files_through(dialogues, tmp_path):
    with StandInHub({}, {DIALOGUES: dialogues}, fault="half") as server:
        environment = server.environment(tmp_path / "home")
        text = client(environment, DOWNLOAD, DIALOGUES, "README.md", "main")
    assert text == (dialogues / "README.md").read_text()


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="fault must be one of"):
        StandInHub({}, {}, fault="403")


def test_the_environment_is_rid_of_the_callers_settings(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    environment = hub_environment("http://127.0.0.1:1", tmp_path)
    assert not {"HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"} & environment.keys()
    assert environment["HF_ENDPOINT"] == "http://127.0.0.1:1" and environment["HF_HOME"] == str(tmp_path)


def test_dialogues_as_published_become_rows(tmp_path):
    dev = {"fname": "dev_0", "dialogue": "a", "summary": "b", "topic": "c"}
    test = {"fname": "test_0", "dialogue": "d"}
    test |= {"summary1": "e", "topic1": "f", "summary2": "x", "topic2": "y"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(dev) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(test) + "\n")
    (tmp_path / "train.csv").write_text("id,dialogue,summary,topic\ntrain_0,g,h,i\n")
    rows = [tuple(row.values()) for row in hub.read_dialogues(tmp_path)]
    assert rows == [("dev_0", "a", "b", "c"), ("test_0", "d", "e", "f"), ("train_0", "g", "h", "i")]
