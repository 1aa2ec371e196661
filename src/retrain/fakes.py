"""Fakes of every protocol that are good enough to learn: a table of logits per position instead of a model, so
that a loop, a plug-in or a schedule can be tested in milliseconds without torch.

``FakeBackend`` takes exact policy-gradient steps on the table, ``FakeEngine`` samples from it with the real
sampling noise, ``FakeRenderer`` maps characters to ids. A task is solved by writing its reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrain.engines.noise import uniforms
from retrain.errors import EngineError
from retrain.protocols import State
from retrain.types import (
    BoolArray,
    Canary,
    Capabilities,
    Completion,
    IntArray,
    Message,
    OptimStep,
    Rollout,
    Sampling,
    Score,
    SharedWeights,
    StepReport,
    Task,
    TrainBatch,
    Weights,
)

ALPHABET = "\n0123456789+-=? abcdefghijklmnopqrstuvwxyz"
"""Characters by id; id 0, the line feed, is the end token."""


class FakeRenderer:
    """One character, one id; unknown characters become spaces."""

    stop_ids: tuple[int, ...] = (0,)

    def encode(self, messages: Sequence[Message]) -> IntArray:
        """Ids of all messages' texts, one after the other."""
        text = "".join(m.content for m in messages).lower()
        return np.array([max(ALPHABET.find(c), 0) or ALPHABET.index(" ") for c in text], dtype=np.int32)

    def decode(self, token_ids: IntArray) -> str:
        """Text of the ids without end tokens."""
        return "".join(ALPHABET[i] for i in token_ids if i)

    def offsets(self, token_ids: IntArray) -> tuple[str, list[tuple[int, int]]]:
        """Text and character range per token; the end token covers nothing."""
        spans: list[tuple[int, int]] = []
        at = 0
        for i in token_ids:
            spans.append((at, at + (1 if i else 0)))
            at = spans[-1][1]
        return self.decode(token_ids), spans


def _log_softmax(logits: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class FakeBackend:
    """Logits ``table[position, token]``, trained by plain gradient descent at a large rate."""

    def __init__(self, *, positions: int = 4, seed: int = 0, scale: float = 400.0) -> None:
        generator = np.random.Generator(np.random.Philox(seed))
        self.table = generator.normal(0.0, 0.1, (positions, len(ALPHABET)))
        self.version = 0
        self.scale = scale
        self.closed = False

    @property
    def capabilities(self) -> Capabilities:
        """Everything the loop asks for."""
        return Capabilities(loop=True, token_advantages=True, resume=True, reports_loss=True)

    def facts(self) -> Mapping[str, str]:
        """A device that never changes."""
        return {"device": "fake", "threads": "1", "deterministic": "yes"}

    def publish(self) -> SharedWeights:
        """The table itself."""
        canary = Canary(np.zeros(1, np.int32), _log_softmax(self.table)[0, :1].astype(np.float32), 1e-6)
        return SharedWeights(self.version, f"fake-{self.version}-{self.table.sum():.12g}", self.table, canary)

    def train_step(self, batch: TrainBatch, optim: OptimStep) -> StepReport:
        """One exact importance-weighted policy-gradient step."""
        if batch.is_empty:
            raise ValueError("train_step needs at least one row")
        gradient = np.zeros_like(self.table)
        loss = 0.0
        ratios: list[float] = []
        for row in batch.rows:
            logprobs = _log_softmax(self.table / batch.temperature)
            for position, t in enumerate(np.flatnonzero(row.sampled_T)):
                token = row.token_ids_T[t]
                ratio = float(np.exp(logprobs[position, token] - row.old_logprobs_T[t]))
                weight = ratio * float(row.advantages_T[t]) / batch.num_tokens
                loss -= weight
                slope = -np.exp(logprobs[position])
                slope[token] += 1.0
                gradient[position] -= weight * slope / batch.temperature
                ratios.append(ratio)
        self.table = self.table - self.scale * optim.lr * gradient
        self.version += 1
        norm = float(np.linalg.norm(gradient))
        kl = float(np.mean([r - 1 - np.log(r) for r in ratios]))
        return StepReport(
            loss, False, norm, False, float(np.mean(ratios)), min(ratios), max(ratios), kl, "", 1
        )

    def save(self, directory: Path) -> None:
        """Write the table, with an adapter directory as every backend has."""
        (directory / "adapter").mkdir()
        text = json.dumps({"table": self.table.tolist(), "version": self.version})
        (directory / "adapter" / "table.json").write_text(text, encoding="utf-8")

    def restore(self, directory: Path) -> None:
        """Read the table."""
        state = json.loads((directory / "adapter" / "table.json").read_text(encoding="utf-8"))
        self.table, self.version = np.array(state["table"]), int(state["version"])

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


class FakeEngine:
    """Samples from a ``FakeBackend``'s table."""

    def __init__(self) -> None:
        self._weights: SharedWeights | None = None

    def load(self, weights: Weights) -> None:
        """Take the table."""
        if not isinstance(weights, SharedWeights):
            raise EngineError("the fake engine samples only from a fake backend.")
        self._weights = weights

    async def generate(self, prompt_ids: IntArray, n: int, sampling: Sampling) -> list[Completion]:
        """Sample up to one token per table row, by inverse CDF on the real noise."""
        if self._weights is None:
            raise EngineError("the engine was asked to sample before it was given weights.")
        logprobs = _log_softmax(self._weights.policy / sampling.temperature)
        mass = np.exp(logprobs)
        limit = min(sampling.max_tokens, len(mass))
        out: list[Completion] = []
        for noise in uniforms(sampling.noise, n, limit):
            ids: list[int] = []
            for position in range(limit):
                level = float(noise[position]) * float(mass[position].sum())
                ids.append(int((mass[position].cumsum() <= level).sum()))
                if ids[-1] in sampling.stop_ids:
                    break
            entropy = (
                -(mass * logprobs).sum(-1)[: len(ids)].astype(np.float32) if sampling.want_entropy else None
            )
            picked = logprobs[np.arange(len(ids)), ids].astype(np.float32)
            stop = "stop" if ids[-1] in sampling.stop_ids else "length"
            out.append(Completion(np.array(ids, np.int32), picked, entropy, stop, self._weights.version))
        return out

    def close(self) -> None:
        """Nothing to stop."""


class FakeReward:
    """1 when the text is the reference, else 0."""

    bounds = (0.0, 1.0)

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """One pass/fail score per rollout."""
        return [
            Score.failed(r.error)
            if r.error
            else Score(float(r.text == task.reference), r.text == task.reference)
            for r in rollouts_G
        ]


class FakeTasks:
    """The same few tasks for ever."""

    def __init__(self, references: Sequence[str] = ("7", "7", "7")) -> None:
        self._references = tuple(references)
        self._draw = 0

    def __len__(self) -> int:
        return len(self._references)

    def take(self, n: int) -> list[Task]:
        """The next ``n`` in a fixed cycle."""
        made = [
            Task(
                f"fake/train/{d % len(self)}",
                (Message("user", "?"),),
                self._references[d % len(self)],
                "fake",
                d,
            )
            for d in range(self._draw, self._draw + n)
        ]
        self._draw += n
        return made

    def state_dict(self) -> State:
        """How many were drawn."""
        return {"draw": self._draw}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self._draw = int(state["draw"])


class FakeSink:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.closed = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a row."""
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def no_planning(text: str, offsets: Sequence[tuple[int, int]]) -> BoolArray:
    """A detector that finds nothing."""
    return np.zeros(len(offsets), dtype=bool)
