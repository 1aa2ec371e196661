"""Which stored rollouts a report shows, and in what form: an even sample of steps within a budget of bytes."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

_STEP = re.compile(rb'\{"step": (\d+)[,}]')
_TOKENS = 4000
"""Tokens of one rollout whose numbers are shown; of a longer one the first three quarters and the last quarter."""
_LARGEST = 400_000
"""Bytes of one rollout, and of one prompt: of what is larger the middle is left out, so that it cannot crowd out the others."""
_SNIPPET = 34
_LABEL = 300
"""Characters of a task's id and of other words of the list, and of what a single token reads as."""
_ELEMENT = 80
"""Bytes around a body and a row."""


@dataclass(slots=True)
class Index:
    """Where every line of generations.jsonl lies: 0-based step, first byte and length, in the order of the file."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    starts: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))

    @classmethod
    def of(cls, path: Path) -> Index:
        """Read a file once, a line at a time and without parsing it; empty where there is none."""
        index, at = cls(), 0
        try:
            file = path.open("rb")
        except OSError:
            return index
        with file:
            for line in file:
                found = _STEP.match(line)
                # A line without an end is one that is being written, or was when the run was killed.
                if found and line.endswith(b"\n"):
                    index.steps.append(int(found[1]))
                    index.starts.append(at)
                    index.sizes.append(len(line))
                at += len(line)
        return index

    def by_step(self) -> dict[int, list[int]]:
        """Numbers of the lines of each step."""
        found: dict[int, list[int]] = {}
        for number, step in enumerate(self.steps):
            found.setdefault(step, []).append(number)
        return found


@dataclass(frozen=True, slots=True)
class Shown:
    """The rollouts of a report. ``rows`` and ``bodies`` run over them by step, then in the order of the file.

    A body names its prompt by its place in ``prompts``, because the members of a group share one.
    """

    rows: tuple[list[Any], ...] = ()
    bodies: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    total: int = 0
    steps_total: int = 0
    bytes: int = 0
    guessed: int = 0
    """Rollouts whose verdict the file does not hold, as earlier versions wrote it: it is made from the reward."""

    @property
    def steps(self) -> int:
        """Steps of which at least one rollout is shown."""
        return len({row[0] for row in self.rows})


FIELDS = (
    "step", "task", "member", "reward", "correct", "stop", "error", "tokens", "skipped", "advantage", "planning", "end",
)  # fmt: skip
"""What a row of ``Shown.rows`` holds."""


def spread(steps: Sequence[int], urgent: Sequence[int] = ()) -> list[int]:
    """The steps in the order in which they should be shown: the first, the last, the urgent ones, and then by halving
    gaps, so that wherever a budget ends the steps before lie about evenly over the run."""
    ordered = sorted(set(steps))
    if not ordered:
        return []
    here = set(ordered)
    taken = dict.fromkeys([ordered[0], ordered[-1], *(step for step in urgent if step in here)])
    gaps = [(0, len(ordered) - 1)]
    for low, high in gaps:  # grows while it is walked: level by level, as a breadth-first search
        middle = (low + high) // 2
        if low < middle < high:
            taken.setdefault(ordered[middle])
            gaps += [(low, middle), (middle, high)]
    return list(taken)


def choose(path: Path, *, budget: int, correct_at: float | None, urgent: Sequence[int] = ()) -> Shown:
    """Rollouts of ``generations.jsonl`` in at most ``budget`` bytes; whole steps where they fit, and the middle left out
    of a rollout that is larger than an eighth of it or than ``_LARGEST``.

    The file says what the run counted as correct. Where it does not, a reward above ``correct_at`` is correct: the run's
    ``reward.correct_at``, with None 0.5 where all such rewards lie in [0, 1]. ``urgent`` steps come before others.
    """
    index = Index.of(path)
    by_step = index.by_step()
    picked: dict[int, tuple[list[Any], str]] = {}
    unjudged: list[int] = []
    prompts: dict[str, int] = {}
    most = min(_LARGEST, budget // 8)
    spent, full = 0, False
    try:
        file = path.open("rb")
    except OSError:
        return Shown()
    with file:
        for step in spread(list(by_step), urgent):
            for number in by_step[step]:
                file.seek(index.starts[number])
                row = _parsed(file.read(index.sizes[number]))
                if row is None:
                    continue
                prompt = _cut_to(str(row.get("prompt", "")), most)
                listed, body = _row(row), _fitted(row, prompts.get(prompt, len(prompts)), most)
                if body is None:
                    continue
                cost = _bytes(body) + _bytes(encode(listed)) + _ELEMENT
                if prompt not in prompts:
                    cost += _bytes(encode(prompt)) + 1
                if spent + cost > budget:
                    full = True
                    break
                spent += cost
                prompts.setdefault(prompt, len(prompts))
                picked[number] = (listed, body)
                if "correct" not in row:
                    unjudged.append(number)
            if full:
                break
    _guess([picked[n][0] for n in unjudged], correct_at)
    numbers = sorted(picked, key=lambda n: (index.steps[n], n))
    return Shown(
        rows=tuple(picked[n][0] for n in numbers),
        bodies=tuple(picked[n][1] for n in numbers),
        prompts=tuple(prompts),
        total=len(index.steps),
        steps_total=len(by_step),
        bytes=spent,
        guessed=len(unjudged),
    )


def _guess(rows: Sequence[list[Any]], correct_at: float | None) -> None:
    """Fill in verdicts from rewards, where the file holds none."""
    at, verdict = FIELDS.index("reward"), FIELDS.index("correct")
    known = [row for row in rows if isinstance(row[at], int | float)]
    inside = all(0 <= row[at] <= 1 for row in known)
    bar = correct_at if correct_at is not None else 0.5 if inside else math.nan
    for row in known:
        row[verdict] = None if math.isnan(bar) else int(row[at] > bar)


def encode(value: Any) -> str:
    """JSON that may stand inside a ``<script>`` element: nothing in it can end the element or be read as markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode()


def _row(row: Mapping[str, Any]) -> list[Any]:
    verdict = row.get("correct")
    completion = str(row.get("completion", ""))
    # The last box of an answer stands at its end, which says more than how it begins.
    said = " ".join(completion[-4 * _SNIPPET :].split())
    end = said if len(said) <= _SNIPPET and len(completion) <= 4 * _SNIPPET else f"…{said[-_SNIPPET:]}"
    return [
        row.get("step"), _label(row.get("task", "")), row.get("member"), row.get("reward"),
        int(verdict) if isinstance(verdict, bool) else None, _label(row.get("stop", "")), 1 if row.get("error") else 0,
        row.get("tokens"), _label(row.get("skipped") or ""), row.get("advantage_mean"), row.get("planning_tokens"), end,
    ]  # fmt: skip


def _label(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LABEL else f"{text[:_LABEL]}…"


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _cut(text: str, characters: int) -> str:
    """The first three quarters and the last quarter of so many characters, and in between what is left out."""
    left = len(text) - characters
    if left <= 0:
        return text
    head = characters * 3 // 4
    end = text[len(text) - (characters - head) :]
    return f"{text[:head]}\n[{left:,} characters left out; generations.jsonl has them]\n{end}"


def _cut_to(text: str, most: int) -> str:
    """The text, cut so that it takes about ``most`` bytes in the page: a character may take six."""
    characters = most
    while _bytes(encode(cut := _cut(text, characters))) > most and characters > _LABEL:
        characters //= 2
    return cut


def _fitted(row: Mapping[str, Any], prompt: int, most: int) -> str | None:
    """What is shown of an opened rollout, as JSON of at most ``most`` bytes: as many tokens and characters as fit. None
    where it cannot be cut, because something else is as large."""
    tokens, characters = _TOKENS, most
    while characters > _LABEL:
        body = encode(_body(row, prompt, tokens, characters))
        if _bytes(body) <= most:
            return body
        tokens, characters = tokens // 2, characters // 2
    return None


def _body(row: Mapping[str, Any], prompt: int, tokens: int, characters: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": prompt,
        "parts": row.get("parts"),
        "weights_version": row.get("weights_version"),
    }
    for key in ("completion", "reference", "error"):
        value = row.get(key)
        body[key] = _cut(value, characters) if isinstance(value, str) else value
    credit: Any = row.get("credit")
    if isinstance(credit, dict):
        body["credit"] = _credit(cast("dict[str, Any]", credit), tokens)
    return body


def _credit(credit: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The numbers of at most so many tokens, four digits each; one number where all tokens have the same."""
    texts = _listed(credit.get("texts"))
    count = len(texts)
    head = tokens * 3 // 4
    cut = count > tokens
    made: dict[str, Any] = {"kind": _label(credit.get("uncertainty_kind", "")), "count": count}
    if cut:
        made["gap"] = [head, count - tokens]

    def kept(values: list[Any]) -> list[Any]:
        return [*values[:head], *values[count - (tokens - head) :]] if cut else values

    made["texts"] = [_label(text) for text in kept(texts)]
    for name in ("advantages", "uncertainty", "logprobs"):
        values = [_short(value) for value in kept(_listed(credit.get(name)))]
        made[name] = values[0] if values and all(v == values[0] for v in values) else values
    made["planning"] = [i for i, flag in enumerate(kept(_listed(credit.get("planning")))) if flag]
    return made


def _listed(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _short(value: Any) -> float | None:
    if not isinstance(value, int | float):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def elements(shown: Shown) -> Iterator[str]:
    """The rollouts as elements of the page: the list and the prompts, then each body by itself, parsed when opened."""
    table = {"fields": FIELDS, "rows": shown.rows, "prompts": shown.prompts}
    yield f'<script type="application/json" id="rollout-data">{encode(table)}</script>'
    for number, body in enumerate(shown.bodies):
        yield f'<script type="application/json" id="rollout-{number}">{body}</script>'
