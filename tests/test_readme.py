"""What the READMEs promise, as far as a test can hold them to it: commands, options, links, length."""

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


def commands(text: str) -> list[str]:
    """What a reader is told to type: indented lines, and code in sentences, which may be wrapped."""
    text = FENCED.sub("", text)
    lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*$", "", text, flags=re.M))]
    parts = [part for command in lines + spans for part in command.split(" && ")]
    return [part for part in parts if re.match(r"(python|accelerate launch|torchrun) ", part)]


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_it_can_be_read_at_a_sitting():
    assert len(TEXTS["README.md"].splitlines()) <= 250


def test_both_commands_set_up_everything():
    lines = TEXTS["README.md"].splitlines()
    set_up = "    python3 -m venv .venv && . .venv/bin/activate && pip install -r "
    assert f"{set_up}requirements.txt && python detox_ppo.py --config checkpoints/tiny/config.yaml" in lines
    # .ci/run runs the first line that tells how to test.
    assert next(line for line in lines if "python -m pytest" in line) == (
        f"{set_up}tests/requirements.txt && python -m pytest"
    )
    assert (ROOT / "requirements.txt").is_file() and (ROOT / "tests" / "requirements.txt").is_file()


def test_options_table_tells_the_script_s_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| .+ \|$", TEXTS["README.md"], re.MULTILINE)
    assert len(rows) >= 12
    assert rows == [(name, "none" if OPTIONS[name] is None else str(OPTIONS[name]).lower()) for name, _ in rows]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
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
def test_commands_name_what_there_is(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
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
    # Some scripts pass what they do not know on to detox_ppo.py.
    known = own | (OPTIONS.keys() | {"config"} if "parse_known_args" in source or "sys.argv[1:]" in source else set())
    assert {word.removeprefix("--") for word in args if word.startswith("--")} <= known


def test_the_job_of_the_example_has_options_that_there_are():
    job = re.search(r"hyperparameters=({.*?})", TEXTS["README.md"])[1]
    # They arrive as flags.
    flags = [str(part) for name, value in ast.literal_eval(job).items() for part in (f"--{name}", value)]
    assert flags and detox_ppo.parse_config(flags)


def test_python_examples_are_python():
    blocks = [body for text in TEXTS.values() for language, body in FENCED.findall(text) if language == "python"]
    assert len(blocks) >= 2 and all(ast.parse(block).body for block in blocks)
