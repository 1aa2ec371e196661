"""The nouns: every frozen value that passes between two stages of a training step.

``Task -> Rollout -> ScoredGroup -> CreditedGroup -> TrainBatch -> StepReport``.

Axis legend, used as name suffixes in the whole package: ``_P`` tasks of a step, ``_G`` members of one
task's group, ``_T`` tokens of one rollout (prompt and completion together), ``_N`` selected tokens of a
microbatch. Per-token values are numpy arrays: int32 ids, float32 values, bool masks. Lengths and finiteness
are checked when a value is made, with ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

StopReason: TypeAlias = Literal["stop", "length", "error"]
SkipReason: TypeAlias = Literal["", "errors", "all correct", "all wrong", "equal rewards", "all cut"]

_EMPTY: Mapping[str, Any] = MappingProxyType({})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class TokenRanges:
    """Half-open character ranges of N tokens, one after the other in one text: pairs (start, end) in text order.

    Kept in bytes, so that a few spans of the text are found without every token's range; ``np.asarray`` gives
    those, (N, 2).
    """

    def __init__(self, data: bytes, lengths_N: npt.NDArray[np.int64], ends_N: npt.NDArray[np.int64]) -> None:
        """``data``: the text in UTF-8; a token's ``lengths_N`` bytes end before byte ``ends_N``."""
        self._lengths_N, self._ends_N = lengths_N, ends_N
        self._starts_N = ends_N - lengths_N
        # Bytes that continue a character, of which there are few.
        self._later = np.flatnonzero(np.frombuffer(data, dtype=np.int8) < -64)

    def __len__(self) -> int:
        return len(self._ends_N)

    def __getitem__(self, at: Any) -> Any:
        return self._array[at]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self._array, dtype=dtype, copy=copy)

    @cached_property
    def _array(self) -> npt.NDArray[np.int64]:
        # A character's number is its byte's less the continuation bytes up to it.
        reached = self._ends_N - np.searchsorted(self._later, self._ends_N, side="left")
        starts = self._starts_N - np.searchsorted(self._later, self._starts_N, side="right")
        # An empty token lies where the last character before it ends.
        return np.stack([np.where(self._lengths_N > 0, starts, reached), reached]).T

    def overlapping(self, spans: Sequence[tuple[int, int]]) -> BoolArray:
        """One bool per token: does its range overlap one of ``spans``, half-open ranges of characters?"""
        mask_N = np.zeros(len(self), dtype=np.bool_)
        characters = np.array(spans, dtype=np.int64).reshape(-1, 2)
        # How many characters come before each continuation byte, the one that it continues counted too.
        before = self._later - np.arange(len(self._later))
        at = characters + np.searchsorted(before, characters, side="right")
        firsts = np.searchsorted(self._ends_N, at[:, 0], side="right").tolist()
        lasts = np.searchsorted(self._starts_N, at[:, 1], side="left").tolist()
        for first, last in zip(firsts, lasts, strict=True):
            mask_N[first:last] = True
        return mask_N & (self._lengths_N > 0)


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message: ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """One problem with its reference answer.

    ``id`` is stable over runs (``source/split/index``). ``draw`` is the running number of the draw that
    produced this task (a task seen in two epochs has two draws); it keys the sampling noise.
    """

    id: str
    messages: tuple[Message, ...]
    reference: str
    source: str
    draw: int
    info: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)

    def __post_init__(self) -> None:
        _require(bool(self.messages), f"task {self.id!r} has no messages")
        _require(self.draw >= 0, f"task {self.id!r} has a negative draw number")


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """Names one stream of sampling noise: the uniform at ``position`` is a pure function of this key.

    ``member`` is the group member of the first requested completion; completion ``i`` of a request uses
    ``member + i``. ``position`` counts the tokens sampled so far in that rollout (0 in a first turn).
    """

    seed: int
    step: int
    task: int
    member: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """Everything a request states about sampling; nothing is left to an engine's or a model's defaults.

    top_k is off, min_p is 0 and penalties are neutral by definition. ``stop_ids`` end a completion and are
    part of it; ``stop`` are texts, the token that completes one is the completion's last. ``extended`` says that a
    later request's prompt will begin with this prompt and completion: an engine may keep what it computed of them.
    """

    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...]
    want_entropy: bool
    noise: NoiseKey
    extended: bool = False

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")
        _require(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one member.

    ``token_ids_T`` holds the sampled tokens only, the end token included. ``logprobs_T`` are those tokens'
    logprobs under the temperature-scaled distribution, before any top-p truncation; ``entropies_T`` (nats)
    are the entropies of that full-vocabulary distribution, None when they were not asked for.
    """

    token_ids_T: IntArray
    logprobs_T: FloatArray
    entropies_T: FloatArray | None
    stop: Literal["stop", "length"]
    weights_version: int

    def __post_init__(self) -> None:
        n = len(self.token_ids_T)
        _require(n > 0, "a completion holds at least one token")
        _require(len(self.logprobs_T) == n, "a completion has one logprob per token")
        _require(bool(np.isfinite(self.logprobs_T).all()), "a completion's logprobs are finite")
        if self.entropies_T is not None:
            _require(len(self.entropies_T) == n, "a completion has one entropy per token")
            _require(bool(np.isfinite(self.entropies_T).all()), "a completion's entropies are finite")


@dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt at a task as one flat token sequence.

    ``sampled_T`` marks the tokens the policy sampled: only these train. ``logprobs_T`` (and ``entropies_T``
    when present) are NaN where a token was not sampled, finite where it was. ``text`` is what the policy
    wrote, without the end token. ``rewards`` are named parts that the environment itself gave. A rollout
    that broke has ``stop == "error"`` and says why in ``error``; it is data, never an exception.
    """

    task_id: str
    member: int
    token_ids_T: IntArray
    sampled_T: BoolArray
    logprobs_T: FloatArray
    entropies_T: FloatArray | None
    text: str
    stop: StopReason
    weights_version: int
    error: str = ""
    rewards: Mapping[str, float] = field(default_factory=lambda: _EMPTY)

    def __post_init__(self) -> None:
        n = len(self.token_ids_T)
        arrays: Sequence[npt.NDArray[Any]] = (self.sampled_T, self.logprobs_T)
        if self.entropies_T is not None:
            arrays = (*arrays, self.entropies_T)
        _require(all(len(a) == n for a in arrays), f"rollout of {self.task_id!r}: arrays differ in length")
        _require(
            (self.stop == "error") == bool(self.error),
            "a rollout has an error text exactly when it stopped on one",
        )
        if self.stop == "error":
            return
        _require(bool(self.sampled_T.any()), f"rollout of {self.task_id!r} holds no sampled token")
        _require(
            bool(np.isfinite(self.logprobs_T[self.sampled_T]).all()),
            f"rollout of {self.task_id!r} lacks a logprob for a sampled token",
        )
        if self.entropies_T is not None:
            _require(
                bool(np.isfinite(self.entropies_T[self.sampled_T]).all()),
                f"rollout of {self.task_id!r} lacks an entropy for a sampled token",
            )

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens, the end token included."""
        return int(np.count_nonzero(self.sampled_T))


@dataclass(frozen=True, slots=True)
class Score:
    """One rollout's reward. ``passed`` is None where only the number is known. An error has no reward."""

    reward: float
    passed: bool | None = None
    parts: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    error: str = ""

    def __post_init__(self) -> None:
        if self.error:
            _require(math.isnan(self.reward), "a score with an error has reward NaN")
        else:
            _require(math.isfinite(self.reward), f"a reward must be finite, not {self.reward}")

    @classmethod
    def failed(cls, error: str) -> Score:
        """A score that could not be computed: the rollout is masked and counted, never scored 0."""
        return cls(reward=math.nan, passed=None, error=error)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The G attempts at one task with their scores."""

    task: Task
    rollouts_G: tuple[Rollout, ...]
    scores_G: tuple[Score, ...]

    def __post_init__(self) -> None:
        _require(len(self.rollouts_G) == len(self.scores_G), f"task {self.task.id!r}: one score per rollout")
        _require(len(self.rollouts_G) > 0, f"task {self.task.id!r}: a group has members")

    @property
    def valid_G(self) -> BoolArray:
        """True for members without an error of the environment, the engine or the reward."""
        return np.array(
            [r.stop != "error" and not s.error for r, s in zip(self.rollouts_G, self.scores_G, strict=True)],
            dtype=bool,
        )


@dataclass(frozen=True, slots=True)
class CreditedGroup:
    """A scored group with token-level credit.

    ``advantages_G_T``, ``uncertainty_G_T`` and ``planning_G_T`` hold one array per member, each as long as
    the member's tokens; advantages and planning are zero where a token was not sampled, uncertainty is NaN
    there. Members that are not valid carry zeros. ``skipped`` says why the group does not train ("" = it does).
    """

    scored: ScoredGroup
    advantages_G_T: tuple[FloatArray, ...]
    uncertainty_G_T: tuple[FloatArray, ...]
    planning_G_T: tuple[BoolArray, ...]
    skipped: SkipReason

    def __post_init__(self) -> None:
        lengths = [len(r.token_ids_T) for r in self.scored.rollouts_G]
        for name, arrays in (
            ("advantages", self.advantages_G_T),
            ("uncertainty", self.uncertainty_G_T),
            ("planning", self.planning_G_T),
        ):
            _require(
                [len(a) for a in arrays] == lengths, f"task {self.scored.task.id!r}: {name} differ in length"
            )
        for r, a in zip(self.scored.rollouts_G, self.advantages_G_T, strict=True):
            _require(bool(np.isfinite(a).all()), f"task {r.task_id!r}: an advantage is not finite")
            _require(
                not np.logical_and(a, ~r.sampled_T).any(),
                f"task {r.task_id!r}: an advantage outside the sampled tokens",
            )


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One sequence to train on; ``old_logprobs_T`` is NaN and ``advantages_T`` 0 where not sampled."""

    token_ids_T: IntArray
    sampled_T: BoolArray
    old_logprobs_T: FloatArray
    advantages_T: FloatArray

    def __post_init__(self) -> None:
        n = len(self.token_ids_T)
        _require(
            len(self.sampled_T) == n and len(self.old_logprobs_T) == n and len(self.advantages_T) == n,
            "a train row's arrays differ in length",
        )
        _require(not self.sampled_T[:1].any(), "the first token of a row has no prefix and cannot be sampled")


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """All rows of a step with the loss's denominators, which also count what was not packed.

    ``num_tokens``: sampled tokens of all valid rollouts of the step; ``num_rollouts``: those rollouts;
    ``fixed_tokens``: configured batch size * group size * max_tokens.
    """

    rows: tuple[TrainRow, ...]
    num_tokens: int
    num_rollouts: int
    fixed_tokens: int
    temperature: float

    @property
    def is_empty(self) -> bool:
        """True when no group of the step carries a signal."""
        return not self.rows


@dataclass(frozen=True, slots=True)
class OptimStep:
    """What one optimizer update needs: rates and limits, resolved for this step.

    ``hash_gradient`` asks for ``StepReport.gradient_hash`` of a batch's first update.
    """

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    grad_clip: float
    hash_gradient: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """What sampling one step took, for whoever chooses the next step's size.

    ``batch_size`` tasks at once with ``group_size`` rollouts each; ``tokens`` sampled in ``seconds``; ``rows`` are (prompt
    tokens, sampled tokens) per rollout. ``skipped``: nothing of the step could be trained on, or memory ran out in it.
    ``put_back`` tasks were drawn and go to the next step because memory ran out. ``queue`` is what the engine's ``queue``
    returned, empty without one.
    """

    batch_size: int
    group_size: int
    tokens: int
    seconds: float
    skipped: bool = False
    rows: Sequence[tuple[int, int]] = ()
    put_back: int = 0
    queue: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a learner says about one train step. ``loss`` is None when unknown, never a made-up number.

    ``update_skipped`` is "" when the optimizer moved; otherwise why it did not (a non-finite loss or
    gradient). ratio = exp(new logprob - old logprob) over the trained tokens, before the update; with dropout in
    the adapter it is measured without. ``clip_share`` is the share of trained tokens whose gradient the loss cut,
    ``tis_capped`` that whose importance weight was capped, ``kl_base`` the estimated KL divergence from the base
    model and ``entropy`` the policy's, both in nats per token; None where the loss has no such term. ``gradient_hash``
    is sha256 over the gradient before clipping (float32, parameters in the order of their names), "" where it was not
    asked for or the backend cannot say.
    """

    loss: float | None
    loss_is_placeholder: bool
    grad_norm: float | None
    grad_clipped: bool
    ratio_mean: float | None
    ratio_min: float | None
    ratio_max: float | None
    approx_kl: float | None
    update_skipped: str
    num_microbatches: int
    clip_share: float | None = None
    tis_capped: float | None = None
    kl_base: float | None = None
    entropy: float | None = None
    gradient_hash: str = ""


@dataclass(frozen=True, slots=True)
class Canary:
    """Fixed tokens and the learner's own logprobs of them: what an engine must reproduce after ``load``.

    ``tolerance`` is the largest absolute difference, in nats, that numerics explain.
    """

    token_ids_T: IntArray
    logprobs_T: FloatArray
    tolerance: float


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Weights in this process: ``policy`` is the live model that learner and in-process engine share."""

    version: int
    fingerprint: str
    policy: Any
    canary: Canary


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Weights as a PEFT adapter directory that a server can load."""

    version: int
    fingerprint: str
    path: str
    canary: Canary


@dataclass(frozen=True, slots=True)
class RemoteWeights:
    """Weights that live with a remote service under ``name``."""

    version: int
    fingerprint: str
    name: str


Weights: TypeAlias = SharedWeights | AdapterWeights | RemoteWeights


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can honour; preflight refuses a configuration that needs more."""

    loop: bool
    token_advantages: bool
    resume: bool
    reports_loss: bool


@dataclass(frozen=True, slots=True)
class StepStats:
    """What schedules observe once after each step. ``correct_rate`` is None where rewards do not say."""

    correct_rate: float | None
    exec_variance: float | None


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended: ``status`` is done, interrupted or failed; ``steps`` are completed ones."""

    status: Literal["done", "interrupted", "failed"]
    steps: int
    run_dir: str
    metrics: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
