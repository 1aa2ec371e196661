"""Credit: turns a scored group into per-token advantages, and a step's groups into what is logged about them.

This is the only place where advantages, transforms, uncertainties and detectors meet; what a plug-in returns
is checked here, so that a broken one is named instead of training on nonsense.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from retrain import plugins
from retrain.algorithms.planning import parse_grams
from retrain.algorithms.sepa import SepaSchedule
from retrain.algorithms.transforms import PARAMETERS, SEPA_TRANSFORMS, surprisal
from retrain.config import names
from retrain.errors import ConfigError, NotInThisVersion, PluginError, RewardError
from retrain.protocols import AdvantageFn, Detector, Float64Array, Renderer, TokenTransform, UncertaintyFn
from retrain.types import (
    BoolArray,
    CreditedGroup,
    FloatArray,
    IntArray,
    Rollout,
    Score,
    ScoredGroup,
    SkipReason,
    StepStats,
)

if TYPE_CHECKING:
    from retrain.config.schema import Config

Offsets: TypeAlias = Callable[[IntArray], tuple[str, list[tuple[int, int]]]]
"""Token ids -> their text and the half-open character range of each token in it."""

SKIP_REASONS: tuple[SkipReason, ...] = ("errors", "all correct", "all wrong", "equal rewards")

_REWARD_LIMIT = 1e30
"""Advantages are float32; a reward near its limit is a broken reward, not a large one."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Everything that decides a token's credit. ``*_name`` is what errors and logs call each piece.

    ``offsets`` is the renderer's; ``params`` is what transforms read (``beta``, ``alpha``, a plug-in's own);
    ``correct_at`` is the reward above which a rollout counts as correct, None where nothing says.
    """

    advantage: AdvantageFn
    advantage_name: str
    transform: TokenTransform
    transform_name: str
    uncertainty: UncertaintyFn
    uncertainty_name: str
    detector: Detector
    detector_name: str
    offsets: Offsets
    params: Mapping[str, Any]
    correct_at: float | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What a token transform is handed besides the group: the ``TransformContext`` protocol."""

    uncertainty_G_T: Sequence[FloatArray]
    planning_G_T: Sequence[BoolArray]
    sepa_lambda: float
    params: Mapping[str, Any]


def correct(score: Score, correct_at: float | None) -> bool | None:
    """Whether a score counts as correct; None where that is unknown.

    A score that says so itself decides; else its reward against ``correct_at``, 0.5 when that is unset and
    the reward lies in [0, 1]. A score with an error is never known.
    """
    if score.error:
        return None
    if score.passed is not None:
        return score.passed
    if correct_at is not None:
        return score.reward > correct_at
    return score.reward > 0.5 if 0.0 <= score.reward <= 1.0 else None


def credit(group: ScoredGroup, algorithm: Algorithm, sepa_lambda: float) -> CreditedGroup:
    """Per-token advantages, uncertainties and planning marks of one group.

    Members with an error leave the group before the advantage and carry zeros. A group with fewer than two
    valid members, or whose valid rewards are all equal, is skipped with its reason and has advantages of
    exactly 0; its uncertainties and planning marks are computed all the same, for the step's statistics.
    ``sepa_lambda`` is in [0, 1]. PluginError names a piece that returns a wrong length, a value that is not
    finite, or credit for a token that was not sampled; RewardError a reward beyond 1e30.
    """
    valid: list[int] = np.flatnonzero(group.valid_G).tolist()
    members = [group.rollouts_G[i] for i in valid]
    scores = [group.scores_G[i] for i in valid]
    u_V_T = [_uncertainty(rollout, algorithm) for rollout in members]
    planning_V_T = [_planning(rollout, algorithm) for rollout in members]

    rewards_V = np.array([s.reward for s in scores], dtype=np.float64)
    too_large = [s.reward for s in scores if abs(s.reward) > _REWARD_LIMIT]
    if too_large:
        raise RewardError(
            f"task {group.task.id!r} has a reward of {too_large[0]:g}.",
            fix="scale the reward to a size near 1.",
        )
    skipped = _skip_reason(rewards_V, scores, algorithm.correct_at)
    advantages_V_T: Sequence[FloatArray] = [np.zeros(len(r.token_ids_T), dtype=np.float32) for r in members]
    if not skipped:
        advantages_V = _advantages(rewards_V, algorithm)
        for rollout, a_T, a in zip(members, advantages_V_T, advantages_V, strict=True):
            a_T[rollout.sampled_T] = a
        valid_group = ScoredGroup(group.task, tuple(members), tuple(scores))
        # Views that cannot be written: a transform may not change what the statistics are computed from.
        frozen = [_frozen(u) for u in u_V_T], [_frozen(p) for p in planning_V_T]
        context = Context(*frozen, sepa_lambda, algorithm.params)
        out = algorithm.transform(valid_group, advantages_V_T, context)
        advantages_V_T = _checked_credit(out, members, algorithm.transform_name)

    lengths = [len(r.token_ids_T) for r in group.rollouts_G]
    advantages_G_T = [np.zeros(n, dtype=np.float32) for n in lengths]
    u_G_T = [np.zeros(n, dtype=np.float32) for n in lengths]
    planning_G_T = [np.zeros(n, dtype=np.bool_) for n in lengths]
    for i, a_T, u_T, planning_T in zip(valid, advantages_V_T, u_V_T, planning_V_T, strict=True):
        advantages_G_T[i], u_G_T[i], planning_G_T[i] = a_T, u_T, planning_T
    return CreditedGroup(group, tuple(advantages_G_T), tuple(u_G_T), tuple(planning_G_T), skipped)


def has_signal(group: ScoredGroup) -> bool:
    """True when the group has two valid members whose rewards differ: what dynamic sampling counts."""
    rewards = [score.reward for score, valid in zip(group.scores_G, group.valid_G, strict=True) if valid]
    return len(rewards) > 1 and max(rewards) != min(rewards)


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def _skip_reason(rewards_V: Float64Array, scores: Sequence[Score], correct_at: float | None) -> SkipReason:
    if len(scores) < 2:
        return "errors"
    if rewards_V.max() != rewards_V.min():
        return ""
    verdicts = {correct(score, correct_at) for score in scores}
    if verdicts == {True}:
        return "all correct"
    return "all wrong" if verdicts == {False} else "equal rewards"


def _uncertainty(rollout: Rollout, algorithm: Algorithm) -> FloatArray:
    who = f"uncertainty {algorithm.uncertainty_name!r}"
    sampled_T = rollout.sampled_T
    u_T = _floats(algorithm.uncertainty(rollout), len(sampled_T), who)
    _require(bool(np.isfinite(u_T[sampled_T]).all()), who, "gave a sampled token a value that is not finite")
    _require(bool(np.isnan(u_T[~sampled_T]).all()), who, "must be NaN where no token was sampled")
    return u_T


def _planning(rollout: Rollout, algorithm: Algorithm) -> BoolArray:
    """Planning marks of the sampled tokens; one decode for each unbroken run of them (single-turn: one)."""
    who = f"detector {algorithm.detector_name!r}"
    planning_T = np.zeros(len(rollout.token_ids_T), dtype=np.bool_)
    # Turns are decoded apart: a phrase does not reach over a tool's answer that lies between two of them.
    edges = np.flatnonzero(np.diff(rollout.sampled_T, prepend=False, append=False))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        text, offsets = algorithm.offsets(rollout.token_ids_T[start:end])
        mask_n = np.asarray(algorithm.detector(text, offsets))
        n = end - start
        _require(mask_n.shape == (n,), who, f"returned shape {mask_n.shape} for {n} tokens")
        _require(mask_n.dtype == np.bool_, who, f"returned {mask_n.dtype} values, not bool")
        planning_T[start:end] = mask_n
    return planning_T


def _advantages(rewards_V: Float64Array, algorithm: Algorithm) -> FloatArray:
    who = f"advantage {algorithm.advantage_name!r}"
    out_V = _floats(algorithm.advantage(rewards_V.copy()), len(rewards_V), who)
    finite = bool(np.isfinite(out_V).all())
    _require(finite, who, f"returned {out_V.tolist()} for the rewards {rewards_V.tolist()}")
    return out_V


def _checked_credit(out: Sequence[FloatArray], members: Sequence[Rollout], name: str) -> list[FloatArray]:
    who = f"transform {name!r}"
    _require(len(out) == len(members), who, f"returned {len(out)} arrays for a group of {len(members)}")
    out_V_T = [_floats(a_T, len(r.token_ids_T), who) for r, a_T in zip(members, out, strict=True)]
    for rollout, a_T in zip(members, out_V_T, strict=True):
        _require(bool(np.isfinite(a_T).all()), who, "returned a value that is not finite")
        _require(not a_T[~rollout.sampled_T].any(), who, "gave credit to a token that was not sampled")
    return out_V_T


def _floats(given: npt.ArrayLike, n: int, who: str) -> FloatArray:
    array = np.asarray(given)
    _require(array.shape == (n,), who, f"returned shape {array.shape}, expected {(n,)}")
    _require(np.issubdtype(array.dtype, np.floating), who, f"returned {array.dtype} values, not floats")
    # Too large for float32 becomes infinite here, which the check for finite values then names.
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _require(condition: bool, who: str, what: str) -> None:
    if not condition:
        fix = "correct it; its contract is in retrain.protocols."
        raise PluginError(f"{who} {what}.", fix=fix)


# What a step's credit adds up to.


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and population variance of ``count`` values; None for none."""

    count: int
    mean: float | None
    variance: float | None

    @classmethod
    def of(cls, values: Sequence[FloatArray]) -> Moments:
        """Pool the arrays, in float64."""
        pooled = np.concatenate(values).astype(np.float64) if values else np.zeros(0)
        if not pooled.size:
            return cls(0, None, None)
        return cls(int(pooled.size), float(pooled.mean()), float(pooled.var()))


@dataclass(frozen=True, slots=True)
class CreditStats:
    """What a step's valid rollouts show, pooled over their sampled tokens.

    ``correct_rate`` is None when any of them cannot be judged, or there is none. ``skipped`` counts groups
    by reason. Surprisals and entropies are in nats, entropies empty unless every valid rollout carries them;
    ``exec_uncertainty`` is of the configured uncertainty, which SEPA follows.
    """

    correct_rate: float | None
    skipped: Mapping[SkipReason, int]
    exec_uncertainty: Moments
    exec_surprisal: Moments
    plan_surprisal: Moments
    exec_entropy: Moments
    plan_entropy: Moments
    entropy_mean: float | None

    @property
    def observed(self) -> StepStats:
        """What schedules observe."""
        return StepStats(correct_rate=self.correct_rate, exec_variance=self.exec_uncertainty.variance)

    @property
    def metrics(self) -> dict[str, float | int | None]:
        """correct_rate, skipped_*, entropy_mean, {exec,plan}_{surprisal,entropy}_{mean,var}.

        Null where there was nothing to average.
        """
        named = {
            "exec_surprisal": self.exec_surprisal,
            "plan_surprisal": self.plan_surprisal,
            "exec_entropy": self.exec_entropy,
            "plan_entropy": self.plan_entropy,
        }
        found: dict[str, float | int | None] = {"correct_rate": self.correct_rate}
        found |= {f"skipped_{reason.replace(' ', '_')}": count for reason, count in self.skipped.items()}
        found["entropy_mean"] = self.entropy_mean
        for name, moments in named.items():
            found[f"{name}_mean"] = moments.mean
            found[f"{name}_var"] = moments.variance
        return found


def step_stats(groups_P: Sequence[CreditedGroup], algorithm: Algorithm) -> CreditStats:
    """Pool a step's groups, skipped ones included; members that are not valid are left out."""
    verdicts: list[bool | None] = []
    exec_u: list[FloatArray] = []
    surprisals: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    entropies: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    every_entropy = True
    for rollout, score, u_T, planning_T in _valid_members(groups_P):
        verdicts.append(correct(score, algorithm.correct_at))
        masks = (rollout.sampled_T & ~planning_T, rollout.sampled_T & planning_T)
        exec_u.append(u_T[masks[0]])
        surprisal_T = surprisal(rollout)
        every_entropy = every_entropy and rollout.entropies_T is not None
        for i, mask_T in enumerate(masks):
            surprisals[i].append(surprisal_T[mask_T])
            if rollout.entropies_T is not None:
                entropies[i].append(rollout.entropies_T[mask_T])
    if not every_entropy:
        # A mean over the rollouts that happen to carry entropies would describe another population.
        entropies = ([], [])
    known = [v for v in verdicts if v is not None]
    return CreditStats(
        correct_rate=sum(known) / len(known) if known and len(known) == len(verdicts) else None,
        skipped={reason: sum(g.skipped == reason for g in groups_P) for reason in SKIP_REASONS},
        exec_uncertainty=Moments.of(exec_u),
        exec_surprisal=Moments.of(surprisals[0]),
        plan_surprisal=Moments.of(surprisals[1]),
        exec_entropy=Moments.of(entropies[0]),
        plan_entropy=Moments.of(entropies[1]),
        entropy_mean=Moments.of([*entropies[0], *entropies[1]]).mean,
    )


def _valid_members(
    groups_P: Sequence[CreditedGroup],
) -> Iterator[tuple[Rollout, Score, FloatArray, BoolArray]]:
    for group in groups_P:
        scored = group.scored
        for i in np.flatnonzero(scored.valid_G).tolist():
            yield scored.rollouts_G[i], scored.scores_G[i], group.uncertainty_G_T[i], group.planning_G_T[i]


# From a configuration to an algorithm and its schedule.


def build(config: Config, renderer: Renderer) -> Algorithm:
    """Resolve [algorithm], [gtpo], [hicra], [planning] and ``logging.strategic_grams`` to an algorithm.

    PluginError for a name that cannot be loaded, ConfigError for a parameter that nothing reads or that is
    not a finite number where one is needed.
    """
    section = config.algorithm
    if section.algorithm_mode:
        raise NotInThisVersion(
            f"algorithm.algorithm_mode = {section.algorithm_mode!r} is not in this version.",
            fix="set advantage_mode and transform_mode instead.",
        )
    if section.params:
        raise ConfigError(
            f"algorithm.params sets {', '.join(section.params)}, which only an algorithm_mode reads.",
            fix="move it to algorithm.advantage_params or algorithm.transform_params.",
        )
    advantage_name, transform_name = str(section.advantage_mode), str(section.transform_mode)
    kind = str(section.uncertainty_kind)
    uncertainty_name = names.ALIASES["uncertainty"].get(kind, kind)
    detector_name = str(config.planning.detector)
    transform = plugins.load("transform", transform_name)
    detector = plugins.load("detector", detector_name)(parse_grams(config.logging.strategic_grams))
    if not callable(detector):
        raise PluginError(
            f"detector {detector_name!r} made a {type(detector).__name__}, not something to call.",
            fix="name a class or function that takes the phrases and returns (text, offsets) -> mask.",
        )
    advantage = plugins.load("advantage", advantage_name)
    return Algorithm(
        advantage=_with_params(advantage, advantage_name, section.advantage_params),
        advantage_name=advantage_name,
        transform=transform,
        transform_name=transform_name,
        uncertainty=plugins.load("uncertainty", uncertainty_name),
        uncertainty_name=uncertainty_name,
        detector=cast("Detector", detector),
        detector_name=detector_name,
        offsets=renderer.offsets,
        params=_transform_params(config, transform_name),
        correct_at=config.reward.correct_at,
    )


def build_schedule(config: Config) -> SepaSchedule:
    """SEPA's schedule from [sepa]; inactive (lambda 0 throughout) for a transform that does not read lambda.

    A transform of one's own asks for the schedule with an attribute ``uses_sepa = True``.
    """
    name = str(config.algorithm.transform_mode)
    section = config.sepa
    return SepaSchedule(
        steps=section.steps,
        schedule=section.schedule,
        delay_steps=section.delay_steps,
        correct_rate_gate=section.correct_rate_gate,
        ema_decay=section.ema_decay,
        threshold=section.threshold,
        warmup_updates=section.warmup_updates,
        active=name in SEPA_TRANSFORMS or bool(getattr(plugins.load("transform", name), "uses_sepa", False)),
    )


def _with_params(function: Any, name: str, params: Mapping[str, Any]) -> AdvantageFn:
    try:
        inspect.signature(function).bind(np.zeros(0), **params)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in params.items()) or "the rewards alone"
        raise ConfigError(
            f"advantage {name!r} cannot be called with {given}: {error}.",
            fix="set under algorithm.advantage_params only keyword arguments of the function.",
        ) from error
    except ValueError:
        pass  # a callable without a readable signature
    return partial(function, **params) if params else function


def _transform_params(config: Config, name: str) -> Mapping[str, Any]:
    own = dict(config.algorithm.transform_params)
    params: dict[str, Any] = {"beta": config.gtpo.beta, "alpha": config.hicra.alpha, **own}
    known = PARAMETERS.get(name)
    if known is None:
        return params
    for key in own:
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no parameters"
            raise ConfigError(
                f"transform {name!r} {takes}, and algorithm.transform_params sets {key!r}.",
                fix=f"remove {key}.",
            )
    for key in known:
        value = params[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            what = f"{key} of transform {name!r} must be a finite number, not {value!r}."
            raise ConfigError(what, fix=f"set {key} to a number.")
    return params
