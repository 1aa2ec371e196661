"""The verbs: structural protocols between the loop and everything it drives. A plug-in inherits nothing.

Each protocol has one contract test suite under ``tests/contract`` that every implementation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from retrain.types import (
    BoolArray,
    Capabilities,
    Completion,
    FloatArray,
    IntArray,
    Message,
    OptimStep,
    Rollout,
    RunResult,
    Sampled,
    Sampling,
    Score,
    ScoredGroup,
    StepReport,
    Task,
    TrainBatch,
    Weights,
)

State: TypeAlias = dict[str, Any]
"""JSON-serialisable state of anything with memory."""


@runtime_checkable
class Stateful(Protocol):
    """Everything with memory: what goes into a checkpoint and comes back."""

    def state_dict(self) -> State:
        """Return JSON-serialisable state."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Continue exactly from a state that ``state_dict`` returned."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A learner: owns the trainable weights and the optimizer.

    One with a method ``snapshot() -> Callable[[Path], None]``, which copies in memory what ``save`` would write and
    returns its writer, has its checkpoints written while the run goes on.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this backend can honour."""
        ...

    def facts(self) -> Mapping[str, str]:
        """What results depend on besides configuration and package versions: device, threads, determinism."""
        ...

    def publish(self) -> Weights:
        """Return the current weights with version, fingerprint and canary for an engine to load."""
        ...

    def train_step(self, batch: TrainBatch, optim: OptimStep) -> StepReport:
        """One optimizer update on a non-empty batch; ValueError on an empty one, OutOfMemory where nothing was changed
        because it does not fit."""
        ...

    def save(self, directory: Path) -> None:
        """Write adapter (PEFT format, in ``adapter/``) and optimizer state into an existing directory."""
        ...

    def restore(self, directory: Path) -> None:
        """Read what ``save`` wrote; afterwards the backend equals the saved one."""
        ...

    def close(self) -> None:
        """Release devices and processes; safe to call twice."""
        ...


@runtime_checkable
class Engine(Protocol):
    """A sampler.

    One with a method ``release()`` is told when a step's sampling is over, before the learner runs: no prompt goes on
    from what was sampled, and memory kept for that can be given back. Sampling more afterwards is allowed.

    One with a method ``queue() -> Mapping[str, float]`` says how loaded it was since it was last asked: ``running`` and
    ``waiting`` requests and ``kv_use`` (0 to 1) at most, and how many ``preemptions``; what it does not know is left out.

    Where memory runs out it raises ``retrain.errors.OutOfMemory`` and can be asked for less afterwards.
    """

    def load(self, weights: Weights) -> None:
        """Sample from these weights from now on; EngineError when the canary does not agree."""
        ...

    async def generate(self, prompt_ids: IntArray, n: int, sampling: Sampling) -> list[Completion]:
        """Sample ``n`` completions of one prompt; the weights' version is echoed in each."""
        ...

    def close(self) -> None:
        """Stop threads, processes and connections; safe to call twice."""
        ...


@runtime_checkable
class Renderer(Protocol):
    """What environments and engines are handed: messages to token ids and back, no model.

    One with ``lines(token_ids, counts)``, the ``offsets`` of several texts at once as arrays, spares a large step most of
    its time for detectors that read lines.
    """

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """End tokens of the tokenizer and of the model's generation config, sorted."""
        ...

    def encode(self, messages: Sequence[Message]) -> IntArray:
        """Prompt ids with the chat template's generation prompt (plain text where there is no template)."""
        ...

    def decode(self, token_ids: IntArray) -> str:
        """Text of the ids, special tokens left out."""
        ...

    def offsets(self, token_ids: IntArray) -> tuple[str, list[tuple[int, int]]]:
        """Text of the ids with the half-open character range that each token covers in it."""
        ...


@runtime_checkable
class Environment(Protocol):
    """Turns a task into attempts. Errors become rollouts with ``stop == "error"``."""

    async def attempt(self, task: Task, n: int, engine: Engine, sampling: Sampling) -> list[Rollout]:
        """Make ``n`` attempts; ``sampling.noise`` names the noise of member 0."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Scores a whole group at once: one Score per rollout, in order."""

    async def score(self, task: Task, rollouts_G: Sequence[Rollout]) -> list[Score]:
        """Score every rollout; a failure is ``Score.failed(why)``, never an exception or a 0."""
        ...


@runtime_checkable
class TaskSource(Protocol):
    """An endless, resumable stream of tasks."""

    def __len__(self) -> int:
        """Number of distinct tasks."""
        ...

    def take(self, n: int) -> list[Task]:
        """The next ``n`` tasks, in an order that the seed fixes per epoch."""
        ...

    def state_dict(self) -> State:
        """Position of the cursor."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Continue from a position."""
        ...


@runtime_checkable
class Sizer(Protocol):
    """Chooses how many tasks each step takes; made as ``factory(config)``. It decides between steps only."""

    def next(self) -> int:
        """Tasks of the coming step, the same however often it is asked; from 1 to ``backpressure.max_batch_size``."""
        ...

    def observe(self, seen: Sampled) -> Mapping[str, Any]:
        """Take in a completed step and decide about the next one; metrics by name, each of which begins with bp_."""
        ...

    def out_of_memory(self, batch_size: int) -> int:
        """Memory ran out with so many tasks: how many to go on with in the same step, fewer, or 0 to give up."""
        ...

    def state_dict(self) -> State:
        """What it remembers."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Continue from there."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Receives metrics; made as ``factory(config, run_dir)``. A failure at construction stops the run, a later one
    only warns.

    Called before ``log`` of the same step if it is there: ``generations(step, rows)`` with that step's rows of
    generations.jsonl; at the end ``ended(status)`` with done, interrupted or failed. One with ``replays = True`` is
    told every earlier row again when a run is resumed, and leaves out what it holds. ``alarm(alarm)`` with an Alarm of
    tracking/vitals.py when a core metric leaves its range; ``follow(look)`` once at the start, with a function that
    answers what the run does now.
    """

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record one step's metrics."""
        ...

    def close(self) -> None:
        """Flush and stop; safe to call twice."""
        ...


@runtime_checkable
class ExternalLoop(Protocol):
    """A trainer that owns its own loop (TRL, verl)."""

    def run(self, config: Mapping[str, Any], sink: Sink) -> RunResult:
        """Train to the end."""
        ...


Float64Array: TypeAlias = npt.NDArray[np.float64]

AdvantageFn: TypeAlias = Callable[[Float64Array], Float64Array]
"""rewards_G -> advantages_G, float64, same length; permutation-equivariant; empty in, empty out."""


class TransformContext(Protocol):
    """What a token transform may look at besides the group and its advantages."""

    @property
    def uncertainty_G_T(self) -> Sequence[FloatArray]:
        """Per-token uncertainty, NaN where not sampled."""
        ...

    @property
    def planning_G_T(self) -> Sequence[BoolArray]:
        """Planning tokens."""
        ...

    @property
    def sepa_lambda(self) -> float:
        """SEPA's pooling weight of this step, in [0, 1]."""
        ...

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters from the configuration."""
        ...


BatchAdvantageFn: TypeAlias = Callable[[Sequence[Float64Array]], Sequence[Float64Array]]
"""An advantage over all groups of a step, marked by the attribute ``batch_level = True``.

rewards_P_G -> advantages_P_G: one array per group, of the group's valid members; no group is empty, and one
whose rewards are all equal gets exactly 0. Permutation-equivariant in the groups and in their members.
"""

TokenTransform: TypeAlias = Callable[
    [ScoredGroup, Sequence[FloatArray], TransformContext], Sequence[FloatArray]
]
"""(group, advantages_G_T, context) -> advantages_G_T; zero where not sampled, finite."""

AlgorithmFn: TypeAlias = Callable[[ScoredGroup, TransformContext], Sequence[FloatArray]]
"""(group, context) -> advantages_G_T in place of advantage and transform; zero where not sampled, finite."""

UncertaintyFn: TypeAlias = Callable[[Rollout], FloatArray]
"""rollout -> uncertainty_T, NaN where not sampled."""


@runtime_checkable
class Detector(Protocol):
    """Marks planning tokens. One with ``reads_lines = True`` marks each line of a text by itself, so that the responses of a
    group may come to it as the lines of one text."""

    def __call__(self, text: str, offsets: Sequence[tuple[int, int]]) -> BoolArray:
        """One bool per token: does it overlap a planning phrase of the text?"""
        ...
