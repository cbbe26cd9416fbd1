"""The stand-in hub with the real download code; every client is a process with an empty cache."""

import csv
import http.client
import json
import subprocess
import sys

import hub
import pytest
from hub import DIALOGUES, Repository, StandInHub, hub_environment


def client(environment, code, *arguments):
    """Run `code` in a new process and return its last line of output, parsed as JSON."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(server, path, method="GET", **headers):
    """One request without a hub library: status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return result


@pytest.fixture
def dialogues(tmp_path):
    """A DialogSum-shaped repository of three splits; train.csv is large enough for "half" to truncate it."""
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
    complete = (dialogues / "train.csv").read_bytes()
    path = f"/datasets/{DIALOGUES}/resolve/main/train.csv"
    with StandInHub({}, {DIALOGUES: dialogues}) as server:
        status, headers, body = ask(server, path, "HEAD")
        assert (status, headers["Content-Length"], body) == (200, str(len(complete)), b"")
        assert headers["X-Repo-Commit"] == server.sha(DIALOGUES) and headers["ETag"].startswith('"')
        assert ask(server, path)[2] == complete
        status, headers, body = ask(server, path, Range="bytes=10-19")
        assert (status, headers["Content-Range"]) == (206, f"bytes 10-19/{len(complete)}")
        assert body == complete[10:20]
        assert ask(server, path, Range="bytes=100-")[2] == complete[100:]
        assert ask(server, path, Range=f"bytes={len(complete)}-")[0] == 416
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


def test_an_unknown_fault_is_an_error():
    with pytest.raises(ValueError, match="fault must be one of"):
        StandInHub({}, {}, fault="403")


def test_the_environment_drops_the_callers_settings(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    environment = hub_environment("http://127.0.0.1:1", tmp_path)
    assert not {"HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"} & environment.keys()
    assert environment["HF_ENDPOINT"] == "http://127.0.0.1:1" and environment["HF_HOME"] == str(tmp_path)


def test_published_dialogues_become_rows(tmp_path):
    dev = {"fname": "dev_0", "dialogue": "a", "summary": "b", "topic": "c"}
    test = {"fname": "test_0", "dialogue": "d"}
    test |= {"summary1": "e", "topic1": "f", "summary2": "x", "topic2": "y"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(dev) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(test) + "\n")
    (tmp_path / "train.csv").write_text("id,dialogue,summary,topic\ntrain_0,g,h,i\n")
    rows = [tuple(row.values()) for row in hub.read_dialogues(tmp_path)]
    assert rows == [("dev_0", "a", "b", "c"), ("test_0", "d", "e", "f"), ("train_0", "g", "h", "i")]
