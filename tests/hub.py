"""A stand-in for the Hugging Face hub on the loopback address, so that the real download code runs offline.

In a test (the client must be a new process: the libraries read HF_ENDPOINT once, at import):

    with StandInHub(models={"google/flan-t5-base": directory}, datasets={}) as hub:
        subprocess.run([sys.executable, "detox_ppo.py"], env=hub.environment(empty_directory))

By hand, with random weights of the true shapes (1.5 GB of disk, under a minute):

    python tests/hub.py --full_size DIR --dialogues DIR_OF_CSV_OR_JSONL

builds google/flan-t5-base, facebook/roberta-hate-speech-dynabench-r4-target and knkarthick/dialogsum under
DIR, serves them, and prints two lines to paste into the shell that uses them.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BASE = "google/flan-t5-base"
CLASSIFIER = "facebook/roberta-hate-speech-dynabench-r4-target"
DIALOGUES = "knkarthick/dialogsum"
ADAPTER = "example/summary-adapter"

FAULTS = (None, "401", "404", "500", "half", "silent")
LARGE = 8192  # bytes: "half" truncates files from this size on, so weights and tables break but configs arrive
DATE = "2024-01-01T00:00:00.000Z"  # the hub dates every commit; a constant keeps the answers deterministic

FILE_URL = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API_URL = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.+))?)?)?"
)


class Repository:
    """The files of a directory under one commit, whose sha depends only on their names and contents."""

    def __init__(self, directory):
        self.files = {}  # path in the repository -> (local path, size, git blob id)
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"no directory {directory} to serve as a repository")
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            size = path.stat().st_size
            digest = hashlib.sha1(b"blob %d\0" % size)  # git's own name for the content, as the hub's etag is
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            self.files[path.relative_to(directory).as_posix()] = (path, size, digest.hexdigest())
        listing = "".join(f"{blob} {name}\n" for name, (_, _, blob) in self.files.items())
        self.sha = hashlib.sha1(listing.encode()).hexdigest()

    def folders(self):
        """Every folder that holds a file, at any depth."""
        return {str(parent) for name in self.files for parent in Path(name).parents if str(parent) != "."}

    def entry(self, name):
        """The entry of a file or folder in the tree API."""
        if name in self.files:
            _, size, blob = self.files[name]
            entry = {"type": "file", "path": name, "size": size, "oid": blob}
        else:
            oid = hashlib.sha1(name.encode()).hexdigest()
            entry = {"type": "directory", "path": name, "size": 0, "oid": oid}
        return entry | {"lastCommit": {"id": self.sha, "title": "stand-in", "date": DATE}}

    def info(self, kind, repo_id):
        """The answer to model_info and dataset_info."""
        about = {"id": repo_id, "sha": self.sha, "siblings": [{"rfilename": name} for name in self.files]}
        about |= {"tags": [], "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        about |= {"lastModified": DATE, "createdAt": DATE}
        return about | {"modelId": repo_id} if kind == "models" else about


class Handler(BaseHTTPRequestHandler):
    """One connection of a client; `self.server.hub` is the StandInHub."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes, which Nagle's algorithm would separate by 40 ms

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        hub = self.server.hub
        hub.requests.append((self.command, self.path))
        # Always read the body: unread bytes would be parsed as the next request.
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        url = urlsplit(self.path)
        if match := FILE_URL.fullmatch(url.path):
            kind, repo_id, revision, name = match.groups()
            action = "resolve"
        elif match := API_URL.fullmatch(url.path):
            kind, repo_id, action, revision, name = match.groups()
        else:
            kind, repo_id, action, revision, name = None, None, None, None, None
        kind, revision, name = kind or "models", unquote(revision or "main"), unquote(name or "")

        repository = hub.repositories.get((kind, repo_id))
        fault = hub.fault if hub.only in (None, repo_id) and (hub.api or action == "resolve") else None
        if repository is None:
            # Like the real hub, which does not reveal without a token whether a private repository exists.
            status = 404 if "Authorization" in self.headers else 401
            self.send_failure(status, "RepoNotFound", "Repository not found")
        elif action != "refs" and revision not in ("main", repository.sha):
            self.send_failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif fault == "silent":
            self.close_connection = True
            hub.closing.wait()
        elif fault == "401":
            self.send_failure(401, None, "Invalid username or password.")
        elif fault == "500":
            self.send_failure(500, None, "Internal Error")
        elif fault == "404":
            self.send_failure(404, "EntryNotFound", "Entry not found", repository.sha)
        elif action == "resolve":
            self.send_file(repository, name, fault)
        elif action == "tree":
            self.send_tree(repository, name, recursive="recursive=true" in url.query.lower())
        elif action == "paths-info":
            known = repository.files.keys() | repository.folders()
            self.send_json([repository.entry(path) for path in form.get("paths", []) if path in known])
        elif action == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.sha}
            self.send_json({"branches": [main], "tags": [], "converts": []})
        else:
            self.send_json(repository.info(kind, repo_id))

    def send_tree(self, repository, folder, recursive):
        known = repository.folders()
        if folder and folder not in known:
            return self.send_failure(404, "EntryNotFound", "Entry not found", repository.sha)
        inside = f"{folder}/" if folder else ""
        below = [name for name in sorted(repository.files.keys() | known) if name.startswith(inside)]
        if not recursive:
            below = [name for name in below if "/" not in name.removeprefix(inside)]
        self.send_json([repository.entry(name) for name in below])

    def send_file(self, repository, name, fault):
        if name not in repository.files:
            return self.send_failure(404, "EntryNotFound", "Entry not found", repository.sha)

        path, size, blob = repository.files[name]
        start, stop, status = 0, size, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1, size) if wanted[2] else size
            status = 206
            if start >= stop:
                return self.send(416, {"Content-Range": f"bytes */{size}"})
        headers = {"ETag": f'"{blob}"', "X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(stop - start)}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.send_head(status, headers)
        if self.command == "HEAD":
            return
        if fault == "half" and size >= LARGE:
            # Never send anything past the middle, whatever the range: clients resume where the transfer stopped,
            # and half of each remainder would add up to the complete file.
            stop = min(stop, size // 2)
            self.close_connection = True
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                chunk = file.read(min(1 << 20, stop - start))
                self.wfile.write(chunk)
                start += len(chunk)

    def send_failure(self, status, code, message, commit=None):
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.send_json({"error": message}, status, {name: value for name, value in headers.items() if value})

    def send_json(self, value, status=200, headers=()):
        self.send(status, {"Content-Type": "application/json"} | dict(headers), json.dumps(value).encode())

    def send(self, status, headers, body=b""):
        self.send_head(status, headers | {"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        """Print nothing: the hub records its requests."""


class StandInHub:
    """A context manager that serves directories as hub repositories at `url` and records its `requests`.

    `fault` breaks every request for a file (the API still answers): an HTTP status as text, "half", which sends
    the first half of every file of at least LARGE bytes and hangs up, or "silent", which never answers. With `api`
    the fault breaks every request; `only` is the one repository to break. All three may be set while the hub is
    serving. Files are read when they are requested, but commits and etags are computed at construction.
    """

    def __init__(self, models, datasets, fault=None, port=0):
        self.fault, self.api, self.only = fault, False, None
        self.closing = threading.Event()
        self.port = port
        self.requests = []  # (method, path with query)
        served = {("models", repo_id): directory for repo_id, directory in models.items()}
        served |= {("datasets", repo_id): directory for repo_id, directory in datasets.items()}
        self.repositories = {key: Repository(directory) for key, directory in served.items()}

    @property
    def fault(self):
        return self._fault

    @fault.setter
    def fault(self, fault):
        if fault not in FAULTS:
            raise ValueError(f"fault must be one of {FAULTS}, not {fault!r}")
        self._fault = fault

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Leaving the context may take this interval; the default is half a second.
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def sha(self, repo_id):
        """The commit of a served model or dataset."""
        return next(repository.sha for (_, name), repository in self.repositories.items() if name == repo_id)

    def environment(self, home):
        """Environment variables for a child process that uses this hub, with its caches in `home`."""
        return hub_environment(self.url, home)


def hub_environment(url, home):
    """The caller's environment without its hub settings (token, offline, caches) and with `url` as the hub."""
    prefixes = ("HF_", "HUGGING", "TRANSFORMERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    # Without the last one `datasets` reports its downloads to an address that HF_ENDPOINT does not change.
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    return environment | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def small_repositories(directory, tiny):
    """(models, datasets) for StandInHub: the bundled toy example `tiny` under the names of the full-size models.

    They are copies in `directory`, so that a test may change or remove their files.
    """
    folders = {BASE: "base", CLASSIFIER: "classifier", ADAPTER: "adapter", DIALOGUES: "dialogues"}
    for repo_id, folder in folders.items():
        shutil.copytree(Path(tiny) / folder, Path(directory) / repo_id)
    models = {repo_id: Path(directory) / repo_id for repo_id in (BASE, CLASSIFIER, ADAPTER)}
    return models, {DIALOGUES: Path(directory) / DIALOGUES}


def read_dialogues(directory):
    """Rows of id, dialogue, summary and topic from every csv and jsonl file of DialogSum in `directory`."""
    rows = []
    for path in sorted(Path(directory).iterdir()):
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                records = [json.loads(line) for line in file if line.strip()]
            elif path.suffix == ".csv":
                records = list(csv.DictReader(file))
            else:
                continue
        for row in records:
            # The published files name the row "fname" and have three summaries and topics per test dialogue.
            name = row.get("id") or row["fname"]
            summary, topic = (row.get(key) or row.get(f"{key}1") for key in ("summary", "topic"))
            rows.append({"id": name, "dialogue": row["dialogue"], "summary": summary, "topic": topic})
    if not rows:
        raise FileNotFoundError(f"no dialogues: {directory} has no csv or jsonl file with rows")
    return rows


def write_base(directory, texts, seed):
    """Random FLAN-T5-base: 247,577,856 parameters, with a separate lm_head."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration, T5Tokenizer

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    # 32,000 pieces and the 100 sentinels are FLAN-T5's 32,100 tokens; its model rounds them up to 32,128.
    trainer = trainers.UnigramTrainer(
        vocab_size=32_000, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    T5Tokenizer(vocab=pieces, model_max_length=512).save_pretrained(directory)

    config = T5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        num_layers=12,
        num_decoder_layers=12,
        num_heads=12,
        relative_attention_num_buckets=32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    T5ForConditionalGeneration(config).save_pretrained(directory)

    # transformers ties lm_head to the embeddings in a model built in memory and does not save it. It unties
    # them only when a file has a different lm_head.weight, so add one. The scale is that of T5's tied head,
    # d_model ** -0.5, which gives logits of about unit variance.
    file = directory / "model.safetensors"
    head = {"lm_head.weight": torch.randn(32128, 768) * 768**-0.5}
    save_file(load_file(file) | head, file, metadata={"format": "pt"})
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"tie_word_embeddings": False}
    file.write_text(json.dumps(config, indent=2) + "\n")

    model = AutoModelForSeq2SeqLM.from_pretrained(directory)
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if tied or parameters != 247_577_856:
        raise RuntimeError(f"{directory} came back {tied=} with {parameters:,} parameters")


def write_classifier(directory, texts, seed):
    """Random roberta-base with the labels nothate and hate."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(texts, vocab_size=50265, special_tokens=special, show_progress=False)
    model = json.loads(pairs.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=512).save_pretrained(directory)

    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        id2label={0: "nothate", 1: "hate"},
        label2id={"nothate": 0, "hate": 1},
    )
    torch.manual_seed(seed)
    RobertaForSequenceClassification(config).save_pretrained(directory)


def write_dataset(directory, rows):
    """DialogSum's columns in a train.csv."""
    with (directory / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "dialogue", "summary", "topic"])
        writer.writeheader()
        writer.writerows(rows)


def full_size_repositories(directory, dialogues, seed):
    """(models, datasets) of random weights in the true shapes. Repositories that exist in `directory` are kept."""
    directory = Path(directory)
    rows = read_dialogues(dialogues)
    texts = [row[column] for row in rows for column in ("dialogue", "summary")]
    builders = {
        BASE: lambda path: write_base(path, texts, seed),
        CLASSIFIER: lambda path: write_classifier(path, texts, seed),
        DIALOGUES: lambda path: write_dataset(path, rows),
    }
    for repo_id, build in builders.items():
        final = directory / repo_id
        if not final.exists():
            print(f"writing {final}", flush=True)
            # Renamed when complete, so that an interrupted build is not mistaken for a finished one.
            partial = final.with_name(final.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            build(partial)
            partial.rename(final)
    models = {repo_id: directory / repo_id for repo_id in (BASE, CLASSIFIER)}
    return models, {DIALOGUES: directory / DIALOGUES}


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--full_size", metavar="DIR", required=True, help="where the repositories are kept")
    parser.add_argument("--dialogues", metavar="DIR", required=True, help="csv or jsonl files of DialogSum")
    parser.add_argument("--fault", choices=FAULTS[1:], help="break every request for a file in this way")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: any free one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args()

    models, datasets = full_size_repositories(options.full_size, options.dialogues, options.seed)
    with StandInHub(models, datasets, fault=options.fault, port=options.port) as hub:
        print(f"export HF_ENDPOINT={hub.url}")
        print(f"export HF_HOME={Path(options.full_size).resolve() / 'hf_home'}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"answered {len(hub.requests)} requests")


if __name__ == "__main__":
    main()
