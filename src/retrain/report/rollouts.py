"""Which stored rollouts a report shows, and in what form: an even sample of steps within a budget of bytes."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

_STEP = re.compile(rb'\{"step": (\d+)[,}]')
_TOKENS = 4000
"""Tokens of one rollout whose numbers are shown; of a longer one the first three quarters and the last quarter."""
_SNIPPET = 34


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
    """Rollouts of ``generations.jsonl`` in at most ``budget`` bytes; whole steps where they fit.

    ``correct_at`` is the run's ``reward.correct_at``: above it a reward counts as correct, with None above 0.5 where
    all rewards lie in [0, 1]. ``urgent`` steps come before others.
    """
    index = Index.of(path)
    by_step = index.by_step()
    picked: dict[int, tuple[dict[str, Any], str]] = {}
    prompts: dict[str, int] = {}
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
                prompt = str(row.get("prompt", ""))
                new = prompt not in prompts
                body = encode(_body(row, prompts.get(prompt, len(prompts))))
                cost = (
                    len(body.encode("utf-8", "surrogatepass"))
                    + (len(encode(prompt).encode()) if new else 0)
                    + 250
                )
                if spent + cost > budget and picked:
                    full = True
                    break
                spent += cost
                prompts.setdefault(prompt, len(prompts))
                picked[number] = (row, body)
            if full:
                break
    numbers = sorted(picked, key=lambda n: (index.steps[n], n))
    rewards = [picked[n][0].get("reward") for n in numbers]
    inside = all(0 <= r <= 1 for r in rewards if isinstance(r, int | float))
    bar = correct_at if correct_at is not None else 0.5 if inside else None
    return Shown(
        rows=tuple(_row(picked[n][0], bar) for n in numbers),
        bodies=tuple(picked[n][1] for n in numbers),
        prompts=tuple(prompts),
        total=len(index.steps),
        steps_total=len(by_step),
        bytes=spent,
    )


def encode(value: Any) -> str:
    """JSON that may stand inside a ``<script>`` element: nothing in it can end the element or be read as markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode()


def _row(row: Mapping[str, Any], bar: float | None) -> list[Any]:
    reward = row.get("reward")
    correct = None if bar is None or not isinstance(reward, int | float) else int(reward > bar)
    completion = str(row.get("completion", ""))
    # The last box of an answer stands at its end, which says more than how it begins.
    said = " ".join(completion[-4 * _SNIPPET :].split())
    end = said if len(said) <= _SNIPPET and len(completion) <= 4 * _SNIPPET else f"…{said[-_SNIPPET:]}"
    return [
        row.get("step"), str(row.get("task", "")), row.get("member"), reward, correct, str(row.get("stop", "")),
        1 if row.get("error") else 0, row.get("tokens"), str(row.get("skipped") or ""), row.get("advantage_mean"),
        row.get("planning_tokens"), end,
    ]  # fmt: skip


def _body(row: Mapping[str, Any], prompt: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": prompt,
        **{key: row.get(key) for key in ("completion", "reference", "parts", "error", "weights_version")},
    }
    credit: Any = row.get("credit")
    if isinstance(credit, dict):
        body["credit"] = _credit(cast("dict[str, Any]", credit))
    return body


def _credit(credit: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of every token, four digits each; one number where all tokens have the same."""
    texts = _listed(credit.get("texts"))
    count = len(texts)
    head = _TOKENS * 3 // 4
    cut = count > _TOKENS
    made: dict[str, Any] = {"kind": str(credit.get("uncertainty_kind", "")), "count": count}
    if cut:
        made["gap"] = [head, count - _TOKENS]

    def kept(values: list[Any]) -> list[Any]:
        return [*values[:head], *values[count - (_TOKENS - head) :]] if cut else values

    made["texts"] = [str(text) for text in kept(texts)]
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
