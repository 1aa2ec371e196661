"""Reward ``math``: the last box of a response must equal the reference in value, by math_verify."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from retrain.errors import ConfigError
from retrain.protocols import Renderer
from retrain.rewards.calling import Answer, FunctionRefused
from retrain.rewards.extract import boxed_answer
from retrain.rewards.sandbox import Sandbox
from retrain.types import Rollout, Score, Task

if TYPE_CHECKING:
    from retrain.config.schema import Config

_CACHED = 16384
_MEMORY_BYTES = 2 << 30  # sympy needs a tenth of it; the same on every machine, so that verdicts are
_LONGEST = 1000  # characters; the longest reference of MATH has 159
_DEEPEST = 50
_DECIDES = ("math-verify", "latex2sympy2_extended", "sympy")


class Math:
    """1.0 for an equal answer, else 0.0, always with ``passed``.

    The last box after the last ``</think>`` counts. No box or an empty reference is wrong, the reference's own
    text is right. A box of more than 1000 characters and ten times the reference's, or with brackets more than 50
    deep, is wrong as it stands; anything else is decided by math_verify in child processes, once per pair of box and
    reference. A comparison without a verdict (past its deadline, out of memory, crashed, an exception) is a
    failed Score, never a 0. Not to be used from two event loops at once.
    """

    bounds = (0.0, 1.0)

    def __init__(self, sandbox: Sandbox, timeout_s: float) -> None:
        self._sandbox = sandbox
        # math_verify has three stages with an alarm each, in whole seconds; the sandbox bounds their sum.
        self._stage_s = max(1, int(min(5.0, 0.8 * timeout_s)))
        self._verdicts: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._running = 0
        self._first_traceback = ""
        self.code_digest = _code_digest()
        """Of the versions that decide what is equal: says whether a resume scores alike."""

    @property
    def first_traceback(self) -> str:
        """The first failure's traceback since scoring was last idle, "" without one."""
        return self._first_traceback

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; equal boxes of a group are compared once."""
        if self._running == 0:
            self._first_traceback = ""
        self._running += 1
        try:
            reference = task.reference.strip()
            boxes = [None if r.stop == "error" else boxed_answer(r.text) for r in rollouts_G]
            unique = list(dict.fromkeys(box for box in boxes if box is not None))
            answers = await asyncio.gather(*(self._verdict(box, reference) for box in unique))
            verdicts = dict(zip(unique, answers, strict=True))
            return [
                Score.failed(rollout.error)
                if rollout.stop == "error"
                else _score(False if box is None else verdicts[box])
                for rollout, box in zip(rollouts_G, boxes, strict=True)
            ]
        finally:
            self._running -= 1

    async def _verdict(self, box: str, reference: str) -> bool | str:
        """Whether the box equals the reference, or why nobody knows."""
        if not box or not reference:
            return False
        if box == reference:
            return True
        if len(box) > max(_LONGEST, 10 * len(reference)) or _depth(box) > _DEEPEST:
            return False  # a run of digits or brackets costs seconds to read, and equals nothing
        pair = (box, reference)
        if pair in self._verdicts:
            self._verdicts.move_to_end(pair)
            return self._verdicts[pair]
        answer = await self._sandbox.call(
            {"response": box, "reference": reference, "info": {"stage_s": self._stage_s}}
        )
        if answer.error or answer.passed is None:
            return self._failed(box, answer)
        self._verdicts[pair] = answer.passed
        if len(self._verdicts) > _CACHED:
            self._verdicts.popitem(last=False)
        return answer.passed

    def _failed(self, box: str, answer: Answer) -> str:
        reason = answer.error or "math_verify gave no verdict"
        if not self._first_traceback:
            self._first_traceback = f"\\boxed{{{box[:500]}}}: {answer.traceback or reason}"
        return reason

    def close(self) -> None:
        """End the child processes; safe to call twice."""
        self._sandbox.close()


def _depth(text: str) -> int:
    """How deep braces, parentheses and brackets stand inside each other, closed or not."""
    depth = deepest = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth = max(0, depth - 1)
    return deepest


def _score(verdict: bool | str) -> Score:
    return Score.failed(verdict) if isinstance(verdict, str) else Score(reward=float(verdict), passed=verdict)


def _code_digest() -> str:
    versions = " ".join(f"{name}=={metadata.version(name)}" for name in _DECIDES)
    return hashlib.sha256(versions.encode()).hexdigest()[:16]


def build(config: Config, renderer: Renderer) -> Math:
    """The reward of a configuration; ConfigError when math_verify is missing or cannot be imported."""
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            'reward.type = "math" needs the package math-verify, which is not installed.',
            fix='pip install "retrain[local]".',
        )
    timeout_s = config.reward.timeout_s
    sandbox = Sandbox("retrain.rewards.math_child", "score", timeout_s=timeout_s, memory_bytes=_MEMORY_BYTES)
    try:
        sandbox.check()
        return Math(sandbox, timeout_s)
    except (FunctionRefused, metadata.PackageNotFoundError) as error:
        sandbox.close()
        reason = error.reason if isinstance(error, FunctionRefused) else f"there is no package {error}."
        raise ConfigError(
            f'reward.type = "math" cannot use math-verify: {reason}', fix='pip install "retrain[local]".'
        ) from error
    except BaseException:
        sandbox.close()
        raise
