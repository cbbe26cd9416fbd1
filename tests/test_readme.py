"""The README pages: commands, options, links, Python snippets and length."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import detox_ppo

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("README.md", "tests/README.md", "benchmarks/README.md", "checkpoints/tiny/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)  # output and Python, as the reader sees them
OPTIONS = {field.name: field.default for field in dataclasses.fields(detox_ppo.DetoxConfig)}


def blocks(text: str, language: str) -> list[str]:
    """The contents of a page's fenced code blocks of one language."""
    return [body for marked, body in FENCED.findall(text) if marked == language]


def commands(text: str) -> list[str]:
    """The commands of a page: lines of bash blocks, indented lines, and inline code, which may be wrapped."""
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    text = FENCED.sub("", text)
    lines += re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*$", "", text, flags=re.M))]
    parts = [part for command in lines + spans for part in command.split(" && ")]
    return [part for part in parts if re.match(r"(python|accelerate launch|torchrun) ", part)]


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub generates them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in titles}


def test_length_of_the_pages():
    assert len(TEXTS["README.md"].splitlines()) <= 170


def test_readme_installs_runs_and_tests():
    lines = "".join(blocks(TEXTS["README.md"], "bash")).splitlines()
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -r "
    assert lines[:2] == [f"{set_up}requirements.txt", "python detox_ppo.py --config checkpoints/tiny/config.yaml"]
    test = f"{set_up}tests/requirements.txt && python -m pytest"
    assert test in lines
    # .ci/run runs the first line of the README that contains this command.
    assert next(line for line in TEXTS["README.md"].splitlines() if "python -m pytest" in line) == test
    assert (ROOT / "requirements.txt").is_file() and (ROOT / "tests" / "requirements.txt").is_file()


def test_options_table_has_the_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| .+ \|$", TEXTS["README.md"], re.MULTILINE)
    assert len(rows) == 10
    assert rows == [(name, "none" if OPTIONS[name] is None else str(OPTIONS[name]).lower()) for name, _ in rows]


@pytest.mark.parametrize("name", NAMES)
def test_links_have_targets(name):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", TEXTS[name]))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), link
        assert not anchor or anchor in headings(target), link


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 20
    assert {"python detox_ppo.py --config checkpoints/tiny/config.yaml", "python -m pytest"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_existing_files_and_options(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if "-c" in words:
        tree = ast.parse(words[words.index("-c") + 1])
        used = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        assert used and all(hasattr(detox_ppo, name) for name in used)
        return
    if words[1:3] == ["-m", "pytest"]:
        assert all(Path(word).is_file() for word in words[3:] if not word.startswith("-"))
        return
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script, args = words[at], words[at + 1 :]
    assert Path(script).is_file()
    if script == "detox_ppo.py":
        if args != ["--help"]:
            detox_ppo.parse_config(args)  # an unknown option, or a value out of range, is an error
        return
    source = Path(script).read_text(encoding="utf-8")
    own = set(re.findall(r'add_argument\(\s*"--(\w+)"', source))
    # Some scripts pass unknown options to detox_ppo.py.
    known = own | (OPTIONS.keys() | {"config"} if "parse_known_args" in source or "sys.argv[1:]" in source else set())
    assert {word.removeprefix("--") for word in args if word.startswith("--")} <= known


def test_the_example_job_has_existing_options():
    job = re.search(r"hyperparameters=({.*?})", TEXTS["README.md"])[1]
    # The job passes them as flags.
    flags = [str(part) for name, value in ast.literal_eval(job).items() for part in (f"--{name}", value)]
    assert flags and detox_ppo.parse_config(flags)


def test_python_examples_are_python():
    examples = [block for text in TEXTS.values() for block in blocks(text, "python")]
    assert len(examples) >= 3 and all(ast.parse(block).body for block in examples)


def test_readme_s_adapter_example_runs(tmp_path, monkeypatch, capsys):
    """With the bundled adapter instead of the quickstart's: it prints a summary, and so does the merged model."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "adapter").symlink_to(ROOT / "checkpoints/tiny/adapter")
    (tmp_path / "comparison.csv").symlink_to(ROOT / "checkpoints/tiny/dialogues/train.csv")
    example = next(block for block in blocks(TEXTS["README.md"], "python") if "PeftModel" in block)
    names = {}
    exec(example.replace("checkpoints/tiny-run", str(tmp_path)), names)
    assert names["prompt"] == detox_ppo.PROMPT
    summary = capsys.readouterr().out.strip()
    assert re.fullmatch(r"[^\n]*#Person[12]#[^\n]+", summary)
    merged = detox_ppo.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    tokens = merged.generate(**names["inputs"], max_new_tokens=100)[0]
    assert names["tokenizer"].decode(tokens, skip_special_tokens=True) == summary
    assert detox_ppo.AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == names["tokenizer"].get_vocab()


def test_readme_s_training_example_is_valid(monkeypatch, capsys):
    trained = []

    def run(config):
        trained.append(config)
        return {"verdict": "less toxic", "quality": {"after": {"retrieval_at_1": 0.5}}}

    monkeypatch.setattr(detox_ppo, "run", run)
    exec(next(block for block in blocks(TEXTS["README.md"], "python") if "DetoxConfig" in block), {})
    assert isinstance(trained[0], detox_ppo.DetoxConfig) and "less toxic 0.5" in capsys.readouterr().out
