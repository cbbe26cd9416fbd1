"""The README's promises that a test can hold it to."""

import dataclasses
import re
from pathlib import Path

from detox_ppo import DetoxConfig

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_options_table_is_the_script_s():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", README, re.MULTILINE)
    expected = []
    for field in dataclasses.fields(DetoxConfig):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        shown = " ".join(default) if isinstance(default, list) else "none" if default is None else str(default)
        expected.append((field.name, shown.lower() if isinstance(default, bool) else shown, field.metadata["help"]))
    assert rows == expected


def test_both_commands_set_up_everything():
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert f"    {set_up}python detox_ppo.py --config checkpoints/tiny/config.yaml\n" in README
    assert f"    {set_up}python -m pytest\n" in README
