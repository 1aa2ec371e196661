"""The shape of the package: sizes, depth, edges, and a printed tree that tells the truth."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "retrain"
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "common", "core", "helpers", "manager", "base", "misc"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_is_long_deep_or_badly_named(path):
    assert len(path.read_text().splitlines()) <= 500
    assert len(path.relative_to(PACKAGE).parts) <= 2
    assert not FORBIDDEN_NAMES & {path.stem, path.parent.name}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.name != "__init__.py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_every_module_opens_by_saying_what_it_does(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc
    assert doc.split("\n\n")[0].rstrip().endswith((".", ":"))


def test_the_loop_is_short_and_reaches_few_modules():
    assert len((PACKAGE / "training" / "loop.py").read_text().splitlines()) <= 250
    graph = grimp.build_graph("retrain")
    reached = graph.find_upstream_modules("retrain.training.loop")
    assert len([m for m in reached if "." in m]) <= 25, sorted(reached)


def test_the_command_line_starts_without_the_heavy_packages():
    code = (
        "import sys, retrain, retrain.cli.main; "
        "print([m for m in ('torch', 'transformers', 'pandas', 'pydantic', 'numpy', 'rich', 'tomlkit') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_the_tree_in_the_docs_equals_the_module_docstrings():
    made = runpy.run_path(str(ROOT / "scripts" / "architecture_tree.py"))
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert made["BLOCK"].search(page)[0] == made["tree"](), "run: python scripts/architecture_tree.py --write"


def test_the_readme_prints_real_files():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"^(?:src/retrain/)?([a-z_]+/[a-z_]+\.py)\b", text, flags=re.M):
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name
