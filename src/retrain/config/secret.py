"""What looks like a secret: by the name of its key, or by its own look."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

_Path: TypeAlias = tuple[str | int, ...]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ENDS = frozenset({
    "authorization", "bearer", "secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential",
    "credentials", "apikey", "apikeys",
})  # fmt: skip
_KEYS = frozenset({"api", "access", "secret", "private", "auth", "signing"})
"""What makes the word ``key`` after it a secret: a "key" alone may be the key of a map, or of a song."""
_TOKENS = frozenset({
    "hf", "hub", "huggingface", "api", "auth", "oauth", "access", "refresh", "bearer", "judge", "wandb", "github", "gitlab",
    "slack", "security", "session", "service", "personal", "private", "deploy", "jwt",
})  # fmt: skip
"""What makes the word ``token`` after it a secret: most tokens here are those of a model."""
_MARKUP = re.compile(r"\s*[<\[{$].*[>\]}]\s*", re.DOTALL)
"""A special token, such as ``</s>``, or the place of something to fill in."""
_VALUE = re.compile(
    r"\b(sk-[A-Za-z0-9_-]{16,}|sk_live_\w{16,}|hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|npm_[A-Za-z0-9]{30,}|gsk_[A-Za-z0-9]{20,}|xai-[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}|pplx-[A-Za-z0-9]{20,}"
    r"|r8_[A-Za-z0-9]{30,}|wandb_v1_\w{20,}|AIza[\w-]{35}|AKIA[A-Z0-9]{16}|xox[abpr]-[\w-]{10,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|://[^/\s:@]+:[^/\s@]+@"
    r"|[?&](?i:api[_-]?key|(access[_-]?)?token|password|secret)=[\w.~%-]{8,}"
    r"|\b(?i:bearer)\s+(?=[\w.~+/=-]*\d)[\w.~+/=-]{16,}"
    r"|\b(?i:authorization)[\"']?\s*[:=]\s*[\"']?((?i:bearer|basic|token)\s+[\w.~+/=-]{6,}|[\w.~+/=-]{16,})"
    r"|\b(?i:x-api-key)[\"']?\s*[:=]\s*[\"']?[\w.~+/=-]{6,}"
)
_BEARER = re.compile(r"\s*(B(?i:earer)\s+|bearer\s+(?=\S*\d))[\w.~+/=-]{6,}\s*")
_HEX = re.compile(r"\s*[0-9a-f]{40}\s*")
"""A key of wandb, and a commit of git: the name of its key decides."""


def looks_secret(text: str) -> bool:
    """True for what looks like an API key, a header with one, or a URL with a password."""
    return _VALUE.search(text) is not None or _BEARER.fullmatch(text) is not None


def names_secret(name: str, value: Any) -> bool:
    """True for a value that its key's name or its own look says is a secret; of a table or list, what is inside counts
    only where the name says that all of it is secret, such as ``credentials``."""
    return bool(secrets((name,), value, deep=False))


def is_secret_name(name: str) -> bool:
    """True for the name of a key that holds secrets, as far as texts are concerned."""
    words = _words(name)
    return _always(words) or _of_access(words)


def secrets(path: _Path, value: Any, *, known: bool = False, deep: bool = True) -> list[_Path]:
    """Where secrets lie in the value of a key, at any depth, also inside a JSON text.

    ``known`` is a setting of retrain's own, whose name says nothing. With ``deep`` false, only the key itself counts.
    """
    words = [] if known or not isinstance(path[-1], str) else _words(path[-1])
    return _found(path, value, words, inside=False, deep=deep)


def _found(path: _Path, value: Any, words: Sequence[str], *, inside: bool, deep: bool) -> list[_Path]:
    inside = inside or _always(words)
    if isinstance(value, str):
        if value and (inside or looks_secret(value) or _is_token(words, value)):
            return [path]
        if not deep or value.lstrip()[:1] not in ("{", "["):
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # A number that is to be guessed is called a secret, too.
        return [path] if inside and words and not words[-1].startswith("secret") else []
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        if not deep:
            return [path] if inside and table else []
        return [
            p
            for key, v in table.items()
            for p in _found((*path, key), v, _words(key), inside=inside, deep=deep)
        ]
    if isinstance(value, list | tuple):
        items = cast("list[Any]", value)
        if not deep:
            return [path] if inside and items else []
        # A list below "token" may well be one of a model's tokens.
        words = words if len(words) > 1 else []
        return [
            p for i, v in enumerate(items) for p in _found((*path, i), v, words, inside=inside, deep=deep)
        ]
    return []


def _words(name: str) -> list[str]:
    """``X-Api-Key2``, ``apiKey`` and ``API_KEY`` are the words api and key (and x)."""
    return [word.lower() for word in _WORD.findall(name)]


def _always(words: Sequence[str]) -> bool:
    if not words:
        return False
    return (
        words[-1] in _ENDS
        or "authorization" in words
        or (len(words) > 1 and words[-1] in ("key", "keys") and words[-2] in _KEYS)
    )


def _of_access(words: Sequence[str]) -> bool:
    if not words or words[-1] not in ("token", "tokens"):
        return False
    return list(words) == ["token"] or bool(_TOKENS & set(words))


def _is_token(words: Sequence[str], value: str) -> bool:
    if _of_access(words):
        return not _MARKUP.fullmatch(value)
    return bool(_HEX.fullmatch(value)) and (list(words) == ["key"] or "wandb" in words)
