"""A length trace: completions of forced lengths, prompts of forced lengths and rewards without a judge, so that two
trainers, or two versions of one, do the same work token for token.

Every value is a pure function of the draw number of a task, the member of its group and a seed: no stored state, no
dependence on batching, order or what a model writes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeAlias, cast

import numpy as np

from retrain import plugins
from retrain.environments.single_turn import SingleTurn
from retrain.errors import PluginError, UsageError
from retrain.protocols import Engine, Renderer, State
from retrain.types import Completion, IntArray, Message, Rollout, Sampling, Score, Task, Weights

Trace: TypeAlias = Callable[[int, int], int]
"""(draw number of the task, member of its group) -> tokens of that completion, at least 1; pure."""

_MOST = 2**31
"""Tokens, far above every model's context: bounds what is computed with, so that no text can overflow it."""
_MOST_SCALE = 1e6

_P95 = NormalDist().inv_cdf(0.95)


def _uniform(*key: int) -> float:
    """In (0, 1), a pure function of whole numbers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Lengths from a log-normal distribution: what completions of a reasoning model look like.

    ``median`` and ``p95`` (above it) are tokens and fix the distribution; ``cap`` cuts its tail (0: 2 * p95). All
    three are multiplied by ``scale``, for models whose context is short.
    """

    median: float = 700.0
    p95: float = 2048.0
    cap: int = 0
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _demand(self.median >= 1, f"median = {self.median:g}: a length is at least 1 token.")
        _demand(self.p95 > self.median, f"p95 = {self.p95:g} must be above median = {self.median:g}.")
        _demand(self.p95 <= _MOST, f"p95 = {self.p95:g} is more than {_MOST} tokens.")
        _demand(0 <= self.cap <= _MOST, "cap must be a number of tokens up to 2**31, or 0 for 2 * p95.")
        _demand(-(2**63) <= self.seed < 2**63, "seed must fit into 64 bits.")
        _demand_scale(self.scale)

    @property
    def longest(self) -> int:
        """The largest length that can come, in tokens."""
        return max(1, round((self.cap or 2 * self.p95) * self.scale))

    def __call__(self, draw: int, member: int) -> int:
        """Tokens of one completion."""
        sigma = math.log(self.p95 / self.median) / _P95
        z = NormalDist().inv_cdf(_uniform(self.seed, draw, member))
        return max(1, min(self.longest, round(self.median * math.exp(sigma * z) * self.scale)))


@dataclass(frozen=True, slots=True)
class Flat:
    """Every completion of the same length: the worst case for memory, the best for batching."""

    length: int = 128

    def __post_init__(self) -> None:
        _demand(self.length >= 1, f"length = {self.length}: a length is at least 1 token.")
        _demand(self.length <= _MOST, f"the length is more than {_MOST} tokens.")

    @property
    def longest(self) -> int:
        """The length."""
        return self.length

    def __call__(self, draw: int, member: int) -> int:
        """Tokens of one completion."""
        return self.length


@dataclass(frozen=True, slots=True)
class Recorded:
    """Lengths that were recorded, over and over: draw d, member m gets number ``d * group + m``."""

    lengths: tuple[int, ...]
    group: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        _demand(bool(self.lengths), "a trace needs at least one length.")
        _demand(min(self.lengths) >= 1, f"{min(self.lengths)} is no length: a length is at least 1 token.")
        _demand(max(self.lengths) <= _MOST, f"a length is more than {_MOST} tokens.")
        _demand(self.group >= 1, f"group = {self.group} must be at least 1.")
        _demand_scale(self.scale)

    @property
    def longest(self) -> int:
        """The largest of them, in tokens."""
        return max(1, round(max(self.lengths) * self.scale))

    def __call__(self, draw: int, member: int) -> int:
        """Tokens of one completion."""
        return max(1, round(self.lengths[(draw * self.group + member) % len(self.lengths)] * self.scale))


@dataclass(frozen=True, slots=True)
class _Own:
    """A trace of one's own behind a check of what it returns."""

    name: str
    function: Callable[[int, int], Any]

    def __call__(self, draw: int, member: int) -> int:
        try:
            length = self.function(draw, member)
        except Exception as error:
            raise PluginError(
                plugins.raised("trace", self.name, error), fix="correct the plug-in."
            ) from error
        whole = isinstance(length, (int, np.integer)) and not isinstance(length, bool)
        if not whole or int(cast(int, length)) < 1:
            raise PluginError(
                f"trace {self.name!r} returned {length!r} for draw {draw}, member {member}.",
                fix="return a whole number of tokens, at least 1.",
            )
        return int(cast(int, length))


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _demand_scale(scale: float) -> None:
    _demand(0 < scale <= _MOST_SCALE, f"scale = {scale:g} must be above 0 and at most {_MOST_SCALE:g}.")


def from_file(path: Path | str, *, group: int = 8, scale: float = 1.0) -> Recorded:
    """A trace from a file with one length a line, each a JSON number; UsageError names the line that is none."""
    found: list[int] = []
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"the trace {path} cannot be read: {why}.", fix="name a file of lengths.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise UsageError(
                f"{path}:{number}: {line.strip()[:40]!r} is no length.",
                fix="write one whole number of tokens a line, at least 1.",
            )
        found.append(value)
    if not found:
        raise UsageError(f"the trace {path} is empty.", fix="write one length a line.")
    return Recorded(tuple(found), group, scale)


_FORMS = (
    '"lognormal:median=700,p95=2048,cap=4096,seed=0,scale=1", "flat:128", "file:lengths.jsonl" or '
    '"my_module:my_function"'
)


def parse(text: str) -> Trace:
    """The trace that a short text names; UsageError, or PluginError for one of one's own, in one line.

    ``lognormal`` and ``flat`` with their fields, ``file:PATH`` with ``group`` and ``scale``, or a dotted path to a
    function of (draw, member).
    """
    name, colon, rest = text.strip().partition(":")
    words = [word.strip() for word in rest.split(",")] if rest else []
    try:
        if name == "lognormal":
            return Lognormal(
                **_fields(words, {"median": float, "p95": float, "cap": int, "seed": int, "scale": float})
            )
        if name == "flat":
            values = _fields(
                [f"length={w}" if w.isdecimal() else w for w in words], {"length": int, "scale": float}
            )
            scale = values.pop("scale", 1.0)
            _demand_scale(scale)
            length = Flat(int(values.get("length", Flat.__dataclass_fields__["length"].default))).length
            return Flat(max(1, round(length * scale)))
        if name == "file" and colon:
            at = next((i for i, w in enumerate(words) if w.startswith(("group=", "scale="))), len(words))
            path = rest if at == len(words) else ",".join(rest.split(",")[:at])
            _demand(bool(path.strip()), "no file is named.")
            return from_file(path, **_fields(words[at:], {"group": int, "scale": float}))
    except ValueError as error:
        raise UsageError(f"trace {text!r}: {error}", fix=f"write {_FORMS}.") from error
    if plugins.is_dotted(text.strip()):
        own = _Own(text.strip(), plugins.load("trace", text.strip()))
        own(0, 0)
        return own
    raise UsageError(f"trace {text!r} is unknown.", fix=f"write {_FORMS}.")


def _fields(words: Sequence[str], kinds: Mapping[str, type]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals or key not in kinds:
            raise ValueError(f"{word!r} is not one of its settings ({', '.join(kinds)}).")
        if key in found:
            raise ValueError(f"{key} is given twice.")
        try:
            found[key] = kinds[key](value)
        except ValueError:
            kind = "a whole number" if kinds[key] is int else "a number"
            raise ValueError(f"{key} = {value!r} is not {kind}.") from None
        if isinstance(found[key], float) and not math.isfinite(found[key]):
            raise ValueError(f"{key} = {value!r} is not finite.")
    return found


def longest_of(trace: Trace, draws: int, group_size: int) -> int:
    """The largest length of the first ``draws`` groups, or the trace's own bound where it has one."""
    bound = getattr(trace, "longest", None)
    return int(bound) if bound else max(trace(d, m) for d in range(draws) for m in range(group_size))


class _Given:
    """Renders a task to ids that are given; texts come from the real renderer, or are empty without one."""

    stop_ids: tuple[int, ...] = ()

    def __init__(self, prompt: IntArray | None, renderer: Renderer | None) -> None:
        self._prompt, self._renderer = prompt, renderer

    def encode(self, messages: Sequence[Message]) -> IntArray:
        """The given ids."""
        if self._prompt is not None:
            return self._prompt
        if self._renderer is None:
            raise ValueError("the task carries no prompt_ids, and there is no renderer")
        return self._renderer.encode(messages)

    def decode(self, token_ids: IntArray) -> str:
        """Text of the ids."""
        return self._renderer.decode(token_ids) if self._renderer else ""

    def offsets(self, token_ids: IntArray) -> tuple[str, list[tuple[int, int]]]:
        """Text and ranges of the ids; without a renderer every token covers nothing."""
        return self._renderer.offsets(token_ids) if self._renderer else ("", [(0, 0)] * len(token_ids))


class _Forced:
    """An engine's ``generate`` with lengths from a trace: one request per member, which nothing ends early."""

    def __init__(self, engine: Engine, trace: Trace) -> None:
        self._engine, self._trace = engine, trace

    async def generate(self, prompt_ids: IntArray, n: int, sampling: Sampling) -> list[Completion]:
        """``n`` completions of one prompt, requested together."""
        noise = sampling.noise

        def forced(member: int) -> Sampling:
            length = self._trace(noise.task, member)
            return replace(
                sampling, max_tokens=length, stop_ids=(), stop=(), noise=replace(noise, member=member)
            )

        members = range(noise.member, noise.member + n)
        asked = await asyncio.gather(*(self._engine.generate(prompt_ids, 1, forced(m)) for m in members))
        return [completion for completions in asked for completion in completions]

    def load(self, weights: Weights) -> None:
        """The engine's own."""
        self._engine.load(weights)

    def close(self) -> None:
        """The engine's own."""
        self._engine.close()


class TracedEnvironment:
    """Single-turn environment whose completions have the lengths of a trace: end tokens and stop texts are ignored.

    The prompt is ``task.info["prompt_ids"]`` where a task has it, else its messages rendered. The trace is asked with
    the draw number in ``sampling.noise.task`` and the member. Without a renderer, texts are empty.
    """

    def __init__(self, renderer: Renderer | None, trace: Trace) -> None:
        self._renderer, self._trace = renderer, trace

    async def attempt(self, task: Task, n: int, engine: Engine, sampling: Sampling) -> list[Rollout]:
        """``n`` rollouts, assembled as those of every single-turn run."""
        ids = task.info.get("prompt_ids")
        prompt = None if ids is None else np.asarray(ids, dtype=np.int32)
        made = SingleTurn(_Given(prompt, self._renderer))
        return await made.attempt(task, n, _Forced(engine, self._trace), sampling)


def coin(draw: int, member: int, seed: int = 0) -> int:
    """0 or 1, each with probability one half; members 0 and 1 of a draw that trains are opposites.

    Draws with ``(draw + seed) % 2 == 0`` train: in a group of two or more both values occur. In the others all
    members have the same one.
    """
    if (draw + seed) % 2:
        return int(_uniform(seed, draw, -1) < 0.5)
    if member == 1:
        return 1 - coin(draw, 0, seed)
    return int(_uniform(seed, draw, member) < 0.5)


class CoinReward:
    """Bernoulli(0.5) rewards from ``coin``, whatever was written: exactly every second group trains."""

    bounds = (0.0, 1.0)

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One coin per rollout; those that broke stay errors."""
        return [Score.failed(r.error) if r.error else self._flip(task.draw, r.member) for r in rollouts_G]

    def _flip(self, draw: int, member: int) -> Score:
        side = coin(draw, member, self._seed)
        return Score(float(side), bool(side))


class TracedTasks:
    """Task source of prompts with exactly ``tokens`` tokens each, every draw another one, for ever.

    With ``vocab_size`` the prompts are random ids below it, in ``info["prompt_ids"]``, and belong to a
    ``TracedEnvironment``. With ``renderer`` they are random digits, as many as the rendered message (template
    included) needs to have that length: any environment, and any other trainer, can read those.
    """

    def __init__(
        self, tokens: int, *, vocab_size: int | None = None, renderer: Renderer | None = None, seed: int = 0
    ) -> None:
        if tokens < 1:
            raise UsageError(f"a prompt of {tokens} tokens.", fix="give it at least 1.")
        if (vocab_size is None) == (renderer is None):
            raise ValueError("prompts are made from vocab_size or from a renderer, not both")
        self._tokens, self._vocab_size, self._renderer, self._seed = tokens, vocab_size, renderer, seed
        self._draw = 0

    def __len__(self) -> int:
        return 2**31

    def take(self, n: int) -> list[Task]:
        """The next ``n`` draws."""
        made = [self._task(draw) for draw in range(self._draw, self._draw + n)]
        self._draw += n
        return made

    def _task(self, draw: int) -> Task:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, draw]))
        if self._vocab_size is not None:
            ids = generator.integers(0, self._vocab_size, self._tokens).astype(np.int32)
            text, info = f"draw {draw}", {"prompt_ids": ids}
        else:
            text, info = self._text(generator), dict[str, Any]()
        return Task(f"trace/train/{draw}", (Message("user", text),), "", "trace", draw, info)

    def _text(self, generator: np.random.Generator) -> str:
        """Digits that render to the wanted length. A tokenizer adds none or one token per digit, so that every length
        above the template's own is met."""
        renderer = cast(Renderer, self._renderer)
        digits = "".join(map(str, generator.integers(0, 10, 4 * self._tokens + 16)))

        def length(n: int) -> int:
            return len(renderer.encode((Message("user", digits[:n]),)))

        low, high = 1, len(digits)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if length(middle) < self._tokens else (low, middle)
        # Merging is not quite monotone: look around.
        for n in sorted(range(max(1, low - 8), min(len(digits), low + 8) + 1), key=lambda n: abs(n - low)):
            if length(n) == self._tokens:
                return digits[:n]
        raise UsageError(
            f"no prompt of {self._tokens} tokens: the template alone has about {length(1) - 1}.",
            fix="ask for longer prompts.",
        )

    def state_dict(self) -> State:
        """Draws so far."""
        return {"draw": self._draw}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self._draw = int(state["draw"])
