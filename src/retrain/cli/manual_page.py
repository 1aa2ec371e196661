"""The manual as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_STYLE = """
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1.5rem 4rem; font: 1rem/1.5 system-ui, sans-serif;
  color: #1b1b1b; background: #fff; }
nav a { display: inline-block; margin-right: 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
pre { background: #f4f4f4; padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
code { background: #f4f4f4; padding: 0 .2em; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616; } pre, code { background: #242424; }
  a { color: #8ab4f8; } h2 { border-color: #444; } }
"""


def page(topics: Sequence[tuple[str, str]]) -> str:
    """A whole document from (name, text) of each topic; a text begins with its heading."""
    links = "".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>\n' for name, _ in topics)
    body = "".join(
        f'<section id="{html.escape(name)}">\n<h2>{html.escape(name)}</h2>\n{_blocks(text)}</section>\n'
        for name, text in topics
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>retrain: manual</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>retrain</h1>\n<nav>\n{links}</nav>\n{body}</body>\n</html>\n"
    )


def _blocks(text: str) -> str:
    """Paragraphs of a topic; what is indented, or begins with a section's name in brackets, stands as it is."""
    lines = text.partition("\n")[2].strip("\n").splitlines()
    out: list[str] = []
    block: list[str] = []
    as_is = False

    def end() -> None:
        while block and not block[-1]:
            block.pop()
        if block and as_is:
            shift = min(len(line) - len(line.lstrip()) for line in block if line)
            out.append("<pre>" + html.escape("\n".join(line[shift:] for line in block)) + "</pre>\n")
        elif block:
            words = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape("\n".join(block), quote=False))
            out.append(f"<p>{words}</p>\n")
        block.clear()

    for line in lines:
        kept = line.startswith("  ") or re.fullmatch(r"\[\w+\]", line) is not None
        if line and kept != as_is:
            end()
            as_is = kept
        if line or as_is:
            block.append(line)
        else:
            end()
    end()
    return "".join(out)
