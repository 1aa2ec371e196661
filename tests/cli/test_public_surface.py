"""What users write is frozen: commands, flags and TOML keys with their types, defaults and ranges.

After a deliberate change: ``UPDATE_GOLDEN=1 pytest tests/cli/test_public_surface.py``, and review the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import retrain
from retrain.cli.commands import COMMANDS, LATER
from retrain.config import describe, fields, options, templates

GOLDEN = Path(__file__).with_name("public_surface.txt")


def surface() -> str:
    lines = [f"command {name}" for name in sorted(COMMANDS)]
    lines += [f"command {name} (not in this version)" for name in sorted(LATER)]
    lines += [f"template {name}" for name in sorted(templates.TEMPLATES)]
    lines += [f"template {name} (not in this version)" for name in sorted(templates.LATER)]
    lines += [f"export {name}" for name in sorted(retrain.__all__)]
    lines += [f"flag {flag}" for flag in sorted(options.SWITCHES)]
    for key, setting in fields.settings().items():
        given = " ".join(options.flags_of(key))
        lines.append(f"key {key}: {setting.accepts} = {describe.default_text(setting)} | {given}")
    return "\n".join(lines) + "\n"


def test_the_public_surface_is_what_was_agreed() -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(surface(), encoding="utf-8")
    assert surface() == GOLDEN.read_text(encoding="utf-8")
