"""What users write is frozen: commands, flags and TOML keys with their types, defaults and ranges.

After a deliberate change: ``UPDATE_GOLDEN=1 pytest tests/cli/test_public_surface.py``, and review the diff.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import retrain
from retrain.cli.commands import COMMANDS, LATER
from retrain.config import describe, fields, options, templates

GOLDEN = Path(__file__).with_name("public_surface.txt")


def own_options(command: str) -> list[str]:
    """Flags that a command's help names, its own and those of a run that it points out."""
    module = importlib.import_module(COMMANDS[command][0].partition(":")[0])
    usage = getattr(module, "USAGE", "")
    text = usage.get(command, "") if isinstance(usage, Mapping) else usage
    assert text or command == "demo", f"{command} has no help"
    return sorted(set(re.findall(r"--[a-z][a-z-]*", text)) - {"--flag"})


def surface() -> str:
    lines = [f"command {name}" for name in sorted(COMMANDS)]
    lines += [f"command {name} (not in this version)" for name in sorted(LATER)]
    lines += [f"option {name} {flag}" for name in sorted(COMMANDS) for flag in own_options(name)]
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
