"""Credit: turns a step's scored groups into per-token advantages.

This is the only place where advantages, transforms, uncertainties and detectors meet; what a plug-in returns
is checked here, so that a broken one is named instead of training on nonsense.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from retrain import plugins
from retrain.algorithms import advantages, transforms
from retrain.algorithms.sepa import SepaSchedule
from retrain.algorithms.transforms import DEFAULTS, PARAMETERS, RANGES, SEPA_TRANSFORMS
from retrain.config import names
from retrain.errors import ConfigError, PluginError, RetrainError, RewardError, RunError
from retrain.protocols import (
    AdvantageFn,
    AlgorithmFn,
    BatchAdvantageFn,
    Detector,
    Float64Array,
    Renderer,
    TokenTransform,
    UncertaintyFn,
)
from retrain.types import (
    BoolArray,
    CreditedGroup,
    FloatArray,
    IntArray,
    Rollout,
    Score,
    ScoredGroup,
    SkipReason,
)

if TYPE_CHECKING:
    from retrain.config.schema import Config

Offsets: TypeAlias = Callable[[IntArray], tuple[str, list[tuple[int, int]]]]
"""Token ids -> their text and the half-open character range of each token in it."""

Lines: TypeAlias = Callable[[IntArray, Sequence[int]], tuple[str, npt.NDArray[np.int64]]]
"""Token ids of several sequences and how many belong to each -> their texts with a line feed between each two, and
the ranges of all tokens in that, (N, 2)."""

SKIP_REASONS: tuple[SkipReason, ...] = ("errors", "all correct", "all wrong", "equal rewards", "all cut")

_REWARD_LIMIT = 1e30
"""Advantages are float32; a reward near its limit is a broken reward, not a large one."""

_GAP = np.zeros(1, dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Everything that decides a token's credit. ``*_name`` is what errors and logs call each piece.

    ``advantage`` sees one group's rewards, or, with the attribute ``batch_level = True``, those of every group
    of the step that has a valid member. ``whole``, where there is one, stands in for advantage and transform. ``offsets`` is the
    renderer's, and so is ``lines``, which is asked instead where there is one and the detector reads a whole group's
    responses as the lines of one text; ``params`` is what transforms and ``whole`` read (``beta``, ``alpha``, a plug-in's own);
    ``correct_at`` is the reward above which a rollout counts as correct, None where nothing says.
    ``mask_truncated``: a rollout cut at its token limit takes part in everything and gets no credit itself. ``marks``,
    where there is one, knows a rollout's planning tokens, and the detector is not asked.
    """

    advantage: AdvantageFn | BatchAdvantageFn
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
    whole: AlgorithmFn | None = None
    whole_name: str = ""
    mask_truncated: bool = False
    lines: Lines | None = None
    marks: Callable[[Rollout], BoolArray] | None = None


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


@dataclass(frozen=True, slots=True)
class _Valid:
    """The valid members of one group, and why the group is skipped ("" = it is not)."""

    group: ScoredGroup
    index_V: list[int]
    rewards_V: Float64Array
    skipped: SkipReason

    @property
    def members(self) -> list[Rollout]:
        return [self.group.rollouts_G[i] for i in self.index_V]

    @property
    def scores(self) -> list[Score]:
        return [self.group.scores_G[i] for i in self.index_V]


def credit(group: ScoredGroup, algorithm: Algorithm, sepa_lambda: float) -> CreditedGroup:
    """``credit_step`` of a step that consists of this group."""
    return credit_step([group], algorithm, sepa_lambda)[0]


def credit_step(
    groups_P: Sequence[ScoredGroup], algorithm: Algorithm, sepa_lambda: float
) -> list[CreditedGroup]:
    """Per-token advantages, uncertainties and planning marks of every group of a step, in order.

    Members with an error leave their group before the advantage and carry zeros. A group with fewer than two
    valid members, whose valid rewards are all equal, or whose valid members are all masked, is skipped with
    its reason and has advantages of exactly 0; its uncertainties and planning marks are computed all the same,
    for the step's statistics. ``sepa_lambda`` is in [0, 1]. PluginError names a piece that returns a wrong
    length, a value that is not finite, or credit for a token that was not sampled, RunError a plug-in that
    raises; RewardError a reward beyond 1e30.
    """
    valid_P = [_valid(group, algorithm) for group in groups_P]
    advantages_P = _advantages(valid_P, algorithm)
    return [_credit(v, a_V, algorithm, sepa_lambda) for v, a_V in zip(valid_P, advantages_P, strict=True)]


def _valid(group: ScoredGroup, algorithm: Algorithm) -> _Valid:
    index_V: list[int] = np.flatnonzero(group.valid_G).tolist()
    scores = [group.scores_G[i] for i in index_V]
    rewards_V = np.array([s.reward for s in scores], dtype=np.float64)
    too_large = [s.reward for s in scores if abs(s.reward) > _REWARD_LIMIT]
    if too_large:
        raise RewardError(
            f"task {group.task.id!r} has a reward of {too_large[0]:g}.",
            fix="scale the reward to a size near 1.",
        )
    skipped = _skip_reason(rewards_V, scores, algorithm.correct_at)
    if not skipped and all(_masked(group.rollouts_G[i], algorithm) for i in index_V):
        skipped = "all cut"
    return _Valid(group, index_V, rewards_V, skipped)


def _masked(rollout: Rollout, algorithm: Algorithm) -> bool:
    return algorithm.mask_truncated and rollout.stop == "length"


def _credit(
    valid: _Valid, advantages_V: FloatArray | None, algorithm: Algorithm, sepa_lambda: float
) -> CreditedGroup:
    """One group's credit from its members' advantages; None where an algorithm has none, or it is skipped."""
    group, members = valid.group, valid.members
    u_V_T = _uncertainties(members, algorithm)
    planning_V_T = _planning_of(members, algorithm)
    advantages_V_T: Sequence[FloatArray] = [np.zeros(len(r.token_ids_T), dtype=np.float32) for r in members]
    if not valid.skipped:
        valid_group = ScoredGroup(group.task, tuple(members), tuple(valid.scores))
        # Views that cannot be written: a transform may not change what the statistics are computed from.
        frozen = [_frozen(u) for u in u_V_T], [_frozen(p) for p in planning_V_T]
        context = Context(*frozen, sepa_lambda, algorithm.params)
        if algorithm.whole is not None:
            name = algorithm.whole_name
            out = _called("algorithm", name, algorithm.whole, valid_group, context)
            advantages_V_T = _checked_credit(out, members, f"algorithm {name!r}")
        elif advantages_V is not None:
            pairs = zip(members, advantages_V, strict=True)
            advantages_V_T = [np.where(r.sampled_T, a, np.float32(0.0)) for r, a in pairs]
            name = algorithm.transform_name
            out = _called("transform", name, algorithm.transform, valid_group, advantages_V_T, context)
            advantages_V_T = _checked_credit(out, members, f"transform {name!r}")

    lengths = [len(r.token_ids_T) for r in group.rollouts_G]
    advantages_G_T = [np.zeros(n, dtype=np.float32) for n in lengths]
    u_G_T = [np.zeros(n, dtype=np.float32) for n in lengths]
    planning_G_T = [np.zeros(n, dtype=np.bool_) for n in lengths]
    for i, a_T, u_T, planning_T in zip(valid.index_V, advantages_V_T, u_V_T, planning_V_T, strict=True):
        u_G_T[i], planning_G_T[i] = u_T, planning_T
        if not _masked(group.rollouts_G[i], algorithm):
            advantages_G_T[i] = a_T
    return CreditedGroup(group, tuple(advantages_G_T), tuple(u_G_T), tuple(planning_G_T), valid.skipped)


def has_signal(group: ScoredGroup, *, mask_truncated: bool = False) -> bool:
    """True when the group has two valid members whose rewards differ, and one whose credit is not masked: what
    dynamic sampling counts."""
    valid = group.valid_G
    rewards = [score.reward for score, v in zip(group.scores_G, valid, strict=True) if v]
    if len(rewards) < 2 or max(rewards) == min(rewards):
        return False
    members = zip(group.rollouts_G, valid, strict=True)
    return not mask_truncated or any(v and rollout.stop != "length" for rollout, v in members)


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


def _uncertainties(members: Sequence[Rollout], algorithm: Algorithm) -> list[FloatArray]:
    who, name = f"uncertainty {algorithm.uncertainty_name!r}", algorithm.uncertainty_name
    given = [_called("uncertainty", name, algorithm.uncertainty, rollout) for rollout in members]
    u_V_T = [_floats(u_T, len(r.sampled_T), who) for u_T, r in zip(given, members, strict=True)]
    if members:
        u, sampled = np.concatenate(u_V_T), np.concatenate([r.sampled_T for r in members])
        _require(
            bool((np.isfinite(u) >= sampled).all()), who, "gave a sampled token a value that is not finite"
        )
        _require(bool((np.isnan(u) != sampled).all()), who, "must be NaN where no token was sampled")
    return u_V_T


def _planning_of(members: Sequence[Rollout], algorithm: Algorithm) -> list[BoolArray]:
    """Planning marks of every member, by one call of a detector that reads lines, else each by itself."""
    if algorithm.marks is not None:
        return [algorithm.marks(rollout) for rollout in members]
    if algorithm.lines is None or not members:
        return [_planning(rollout, algorithm) for rollout in members]
    # One unsampled token before each rollout and after the last: unbroken runs of sampled ones then stay apart.
    sampled = np.concatenate([x for r in members for x in (_GAP, r.sampled_T)] + [_GAP])
    ids_N = np.concatenate([r.token_ids_T for r in members])[np.concatenate([r.sampled_T for r in members])]
    edges = np.flatnonzero(sampled[1:] != sampled[:-1])
    marks = np.zeros(len(sampled), dtype=np.bool_)
    marks[sampled] = _marks(*algorithm.lines(ids_N, (edges[1::2] - edges[::2]).tolist()), algorithm)
    starts = np.cumsum([1, *(len(r.token_ids_T) + 1 for r in members)]).tolist()
    return [marks[start : start + len(r.token_ids_T)] for start, r in zip(starts, members, strict=False)]


def _planning(rollout: Rollout, algorithm: Algorithm) -> BoolArray:
    """Planning marks of the sampled tokens; one decode for each unbroken run of them (single-turn: one)."""
    planning_T = np.zeros(len(rollout.token_ids_T), dtype=np.bool_)
    # Turns are decoded apart: a phrase does not reach over a tool's answer that lies between two of them.
    edges = np.flatnonzero(np.diff(rollout.sampled_T, prepend=False, append=False))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        planning_T[start:end] = _marks(*algorithm.offsets(rollout.token_ids_T[start:end]), algorithm)
    return planning_T


def _marks(text: str, offsets: Any, algorithm: Algorithm) -> BoolArray:
    who, n = f"detector {algorithm.detector_name!r}", len(offsets)
    mask_n = np.asarray(_called("detector", algorithm.detector_name, algorithm.detector, text, offsets))
    if mask_n.shape != (n,) or mask_n.dtype != np.bool_:
        _require(mask_n.shape == (n,), who, f"returned shape {mask_n.shape} for {n} tokens")
        _require(False, who, f"returned {mask_n.dtype} values, not bool")
    return mask_n


def _advantages(valid_P: Sequence[_Valid], algorithm: Algorithm) -> list[FloatArray | None]:
    """One advantage per valid member of every group with a signal; None for the other groups."""
    name = algorithm.advantage_name
    out_P: list[FloatArray | None] = [None] * len(valid_P)
    if algorithm.whole is not None or all(valid.skipped for valid in valid_P):
        return out_P
    if getattr(algorithm.advantage, "batch_level", False):
        # A mean or maximum of an empty array is a warning at best: no function needs to think of that.
        asked = [i for i, valid in enumerate(valid_P) if len(valid.rewards_V)]
        rewards = [valid_P[i].rewards_V.copy() for i in asked]
        given = _called("advantage", name, algorithm.advantage, rewards)
        given_P = _arrays(given, f"advantage {name!r}", len(asked), "a step")
        for i, given_V in zip(asked, given_P, strict=True):
            if not valid_P[i].skipped:
                out_P[i] = _checked_advantages(given_V, valid_P[i].rewards_V, name)
        return out_P
    for i, valid in enumerate(valid_P):
        if not valid.skipped:
            given = _called("advantage", name, algorithm.advantage, valid.rewards_V.copy())
            out_P[i] = _checked_advantages(given, valid.rewards_V, name)
    return out_P


def _checked_advantages(given: npt.ArrayLike, rewards_V: Float64Array, name: str) -> FloatArray:
    who = f"advantage {name!r}"
    out_V = _floats(given, len(rewards_V), who)
    finite = bool(np.isfinite(out_V).all())
    _require(finite, who, f"returned {out_V.tolist()} for the rewards {rewards_V.tolist()}")
    return out_V


def _checked_credit(out: object, members: Sequence[Rollout], who: str) -> list[FloatArray]:
    arrays = _arrays(out, who, len(members), "a group")
    out_V_T = [_floats(a_T, len(r.token_ids_T), who) for r, a_T in zip(members, arrays, strict=True)]
    out, sampled = np.concatenate(out_V_T), np.concatenate([r.sampled_T for r in members])
    _require(bool(np.isfinite(out).all()), who, "returned a value that is not finite")
    _require(not ((out != 0) > sampled).any(), who, "gave credit to a token that was not sampled")
    return out_V_T


def _arrays(given: Any, who: str, n: int, of: str) -> list[Any]:
    try:
        arrays = list(given)
    except TypeError:
        _require(False, who, f"returned a {type(given).__name__}, not a list of arrays")
        raise
    _require(len(arrays) == n, who, f"returned {len(arrays)} arrays for {of} of {n}")
    return arrays


def _called(kind: str, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a piece; RunError names a plug-in that raises, what a built-in raises is a bug and passes."""
    if not plugins.is_own(kind, name):
        return function(*arguments)
    try:
        return function(*arguments)
    except RetrainError:
        raise
    except (Exception, SystemExit) as error:
        raise RunError(plugins.raised(kind, name, error), fix="correct the plug-in.") from error


def _floats(given: npt.ArrayLike, n: int, who: str) -> FloatArray:
    array = np.asarray(given)
    if array.dtype == np.float32 and array.shape == (n,):
        return array
    _require(array.shape == (n,), who, f"returned shape {array.shape}, expected {(n,)}")
    _require(np.issubdtype(array.dtype, np.floating), who, f"returned {array.dtype} values, not floats")
    # Too large for float32 becomes infinite here, which the check for finite values then names.
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _require(condition: bool, who: str, what: str) -> None:
    if not condition:
        fix = "correct it; its contract is in retrain.protocols."
        raise PluginError(f"{who} {what}.", fix=fix)


# From a configuration to an algorithm and its schedule.


def build(config: Config, renderer: Renderer) -> Algorithm:
    """Resolve [algorithm], [gtpo], [hicra], [planning] and ``training.truncated`` to an algorithm.

    PluginError for a name that cannot be loaded, ConfigError for a parameter that nothing reads or that is
    not a finite number where one is needed.
    """
    section = config.algorithm
    mode = section.algorithm_mode
    if section.params and not mode:
        raise ConfigError(
            f"algorithm.params sets {', '.join(section.params)}, which only an algorithm_mode reads.",
            fix="move it to algorithm.advantage_params or algorithm.transform_params.",
        )
    kind, detector_name = str(section.uncertainty_kind), str(config.planning.detector)
    uncertainty_name = names.ALIASES["uncertainty"].get(kind, kind)
    uncertainty = plugins.load("uncertainty", uncertainty_name)
    detector = cast("Detector", plugins.make("detector", detector_name, config))
    advantage_name, transform_name = str(section.advantage_mode), str(section.transform_mode)
    advantage: AdvantageFn | BatchAdvantageFn = advantages.grpo
    transform: TokenTransform = transforms.none
    whole: AlgorithmFn | None = None
    if mode:
        whole, params = plugins.load("algorithm", mode), dict(section.params)
    else:
        transform = plugins.load("transform", transform_name)
        advantage = _with_params(
            plugins.load("advantage", advantage_name), advantage_name, section.advantage_params
        )
        params = _transform_params(config, transform_name)
    return Algorithm(
        advantage=advantage,
        advantage_name=advantage_name,
        transform=transform,
        transform_name=transform_name,
        uncertainty=uncertainty,
        uncertainty_name=uncertainty_name,
        detector=detector,
        detector_name=detector_name,
        offsets=renderer.offsets,
        lines=getattr(renderer, "lines", None) if getattr(detector, "reads_lines", False) else None,
        params=params,
        correct_at=config.reward.correct_at,
        whole=whole,
        whole_name=mode,
        mask_truncated=config.training.truncated == "mask",
    )


def build_schedule(config: Config) -> SepaSchedule:
    """SEPA's schedule from [sepa]; inactive (lambda 0 throughout) for credit that does not read lambda.

    A transform or algorithm of one's own asks for the schedule with an attribute ``uses_sepa = True``.
    """
    mode, section = config.algorithm.algorithm_mode, config.sepa
    name = mode or str(config.algorithm.transform_mode)
    piece = None if name in PARAMETERS else plugins.load("algorithm" if mode else "transform", name)
    return SepaSchedule(
        steps=section.steps,
        schedule=section.schedule,
        delay_steps=section.delay_steps,
        correct_rate_gate=section.correct_rate_gate,
        ema_decay=section.ema_decay,
        threshold=section.threshold,
        warmup_updates=section.warmup_updates,
        active=name in SEPA_TRANSFORMS or bool(getattr(piece, "uses_sepa", False)),
    )


def _with_params(function: Any, name: str, params: Mapping[str, Any]) -> AdvantageFn | BatchAdvantageFn:
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
    if not params:
        return function
    bound: Any = partial(function, **params)
    bound.batch_level = getattr(function, "batch_level", False)
    return bound


def _transform_params(config: Config, name: str) -> Mapping[str, Any]:
    own = dict(config.algorithm.transform_params)
    params: dict[str, Any] = {
        "beta": config.gtpo.beta,
        "alpha": config.hicra.alpha,
        **DEFAULTS.get(name, {}),
        **own,
    }
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
        low, high = RANGES.get(key, (-math.inf, math.inf))
        if not low < value <= high:
            raise ConfigError(
                f"{key} of transform {name!r} must be above {low:g} and at most {high:g}, not {value!r}.",
                fix=f"set {key} into that range.",
            )
    return params
