"""Print the package's file tree with each module's first sentence; ``--write`` puts it into docs/architecture.md."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "retrain"
PAGE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(?<=<!-- tree -->\n).*?(?=\n<!-- /tree -->)", flags=re.S)


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    doc = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=[\w)`\]])\.(?= [A-Z`]|$)", doc)[0].rstrip(".")


def tree() -> str:
    """The tree as a fenced block: packages in alphabetical order, each file with what it does."""
    lines = ["```", "src/retrain/"]
    files = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent == PACKAGE)
    for path in sorted(files, key=lambda p: (len(p.relative_to(PACKAGE).parts) > 1, str(p))):
        name = str(path.relative_to(PACKAGE))
        lines.append(f"  {name:<32} {first_sentence(path)}")
    lines += [f"  {'assets/':<32} the embedded tiny model and generated texts (data, no code)", "```"]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(BLOCK.sub(lambda _: tree(), page), encoding="utf-8")
    else:
        print(tree())
