"""Stored token ids as text, by a tokenizer's file alone: quick, without torch, and never from the network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

_BEFORE, _AFTER = 16, 8
"""Tokens shown around one."""


def tokenizer_of(model: str, revision: str = "") -> Any:
    """The tokenizer of a packaged or local model, or of one that was downloaded; None where there is no such file.

    What comes back is a ``tokenizers.Tokenizer``.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    path = _file(model, revision)
    if path is None:
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 - its own untyped errors for a file of another kind
        return None


def _file(model: str, revision: str) -> Path | None:
    if model.startswith("retrain/"):
        place = Path(str(files("retrain").joinpath("assets", model.removeprefix("retrain/"))))
    else:
        place = Path(model).expanduser()
    if place.is_dir():
        found = place / "tokenizer.json"
        return found if found.is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "tokenizer.json", revision=revision or "main")
    except (ImportError, ValueError):
        return None
    return Path(cached) if isinstance(cached, str) else None


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of the ids with special tokens; without a tokenizer the numbers."""
    if tokenizer is None:
        return "".join(f"<{i}>" for i in ids)
    return str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def around(tokenizer: Any, ids: Sequence[int], at: int) -> tuple[str, str, str]:
    """Text before, of, and after the token at place ``at``: a few tokens on each side."""
    return (
        decode(tokenizer, ids[max(0, at - _BEFORE) : at]),
        decode(tokenizer, ids[at : at + 1]),
        decode(tokenizer, ids[at + 1 : at + 1 + _AFTER]),
    )
