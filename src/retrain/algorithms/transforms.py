"""Token-level credit: how uncertain each sampled token was, and how that reshapes a rollout's advantage.

The order is fixed: episode advantage, SEPA on the uncertainties, GTPO's weights, HICRA's amplification.
``entropy_mask`` stands alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from retrain.errors import ConfigError
from retrain.protocols import Float64Array, TransformContext
from retrain.types import BoolArray, FloatArray, Rollout, ScoredGroup

Floats: TypeAlias = npt.NDArray[np.floating[Any]]

SURPRISAL_CAP = 50.0
"""Nats. A token this improbable is numerical noise; without a cap one of them would own its rollout."""

PARAMETERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "gtpo": ("beta",),
    "gtpo_hicra": ("beta", "alpha"),
    "gtpo_sepa": ("beta",),
    "gtpo_sepa_amp": ("beta",),
    "gtpo_sepa_amp_c": ("beta",),
    "entropy_mask": ("rho",),
}
"""What each built-in transform reads from ``context.params``."""

DEFAULTS: dict[str, dict[str, float]] = {"entropy_mask": {"rho": 0.2}}
"""Values of parameters that have no setting of their own."""

RANGES: dict[str, tuple[float, float]] = {"rho": (0.0, 1.0)}
"""Parameters that must lie above the first number and at most at the second."""

SEPA_TRANSFORMS = frozenset({"gtpo_sepa", "gtpo_sepa_amp", "gtpo_sepa_amp_c"})
"""Built-in transforms that read ``context.sepa_lambda``."""


# Uncertainties: rollout -> (T,) float32, finite where sampled, NaN elsewhere.


def surprisal(rollout: Rollout) -> FloatArray:
    """``u_t = min(-logprob_t, 50)`` in nats, of the token that was sampled; NaN where none was.

    Weighting by the surprisal of the sampled token adds an entropy-gradient term
    (E[u grad log p] = grad H): unlike the entropy it depends on the action, not on the state alone.
    """
    # 0 - x instead of -x: a certain token has surprisal 0.0, not -0.0.
    u_T = np.minimum(np.float32(0.0) - rollout.logprobs_T, np.float32(SURPRISAL_CAP))
    return np.where(rollout.sampled_T, u_T, np.float32(np.nan))


def predictive_variance(rollout: Rollout) -> FloatArray:
    """``u_t = p_t (1 - p_t)`` of the sampled token's probability, in [0, 0.25]; NaN where none was."""
    # expm1 keeps 1 - p of a nearly certain token; numerics may leave a logprob a hair above 0.
    logprobs_T = np.minimum(rollout.logprobs_T.astype(np.float64), 0.0)
    u_T = (np.exp(logprobs_T) * -np.expm1(logprobs_T)).astype(np.float32)
    return np.where(rollout.sampled_T, u_T, np.float32(np.nan))


def shannon_entropy(rollout: Rollout) -> FloatArray:
    """``u_t`` = entropy in nats of the whole next-token distribution; NaN where no token was sampled.

    ConfigError when the rollout carries no entropies: only an engine that sees the full vocabulary has them.
    """
    if rollout.entropies_T is None:
        raise ConfigError(
            'uncertainty_kind = "shannon_entropy" needs full-vocabulary entropies, and the engine sent none.',
            fix='set uncertainty_kind = "surprisal" under [algorithm], or inference.engine = "pytorch".',
        )
    return np.where(rollout.sampled_T, rollout.entropies_T, np.float32(np.nan)).astype(np.float32, copy=False)


# Pure pieces over n sampled tokens, in float64: of one rollout, or of several one after the other, whose
# boundaries ``edges`` then gives (0, ..., n). Means are over each rollout's own tokens.


def _mean_of_each(values_n: Float64Array, edges: Sequence[int]) -> Float64Array:
    """The mean between each two edges, 0 where there is nothing between them."""
    bounds = itertools.pairwise(edges)
    # numpy's mean, without what it looks at first.
    sums = [np.add.reduce(values_n[a:b]) / (b - a) if b > a else 0.0 for a, b in bounds]
    return np.array(sums, dtype=np.float64)


def gtpo_weigh(
    advantages_n: Floats, uncertainty_n: Floats, beta: float, edges: Sequence[int] = ()
) -> Float64Array:
    """GTPO-like weights: ``A_t w_t``, ``w_t = max(0, 1 + beta (u_t / (mean(u) + 1e-8) - 1))``.

    Unchanged when ``beta`` is 0 or ``mean(u)`` below 1e-7. While no weight is floored at 0 they average to 1,
    so the rollout keeps its total credit. This simplifies the paper it is named after (GTPO, arXiv
    2508.04349), which shapes rewards across the responses alive at each position and treats correct and wrong
    ones differently.
    Arguments and result are (n,); ``advantages_n`` may also be a scalar array.
    """
    a_n = np.asarray(advantages_n, dtype=np.float64)
    u_n = np.asarray(uncertainty_n, dtype=np.float64)
    if beta == 0.0 or u_n.size == 0:
        return a_n
    edges = edges or (0, u_n.size)
    means = _mean_of_each(u_n, edges)
    mean_n = np.repeat(means, np.diff(edges))
    weighed_n = a_n * np.maximum(0.0, 1.0 + beta * (u_n / (mean_n + 1e-8) - 1.0))
    return weighed_n if means.min() >= 1e-7 else np.where(mean_n < 1e-7, a_n, weighed_n)


def hicra_amplify(advantages_n: Floats, planning_n: BoolArray, alpha: float) -> Float64Array:
    """HICRA: ``A_t + alpha |A_t|`` on planning tokens, ``A_t`` elsewhere. Paper: arXiv 2509.03646.

    A planning token gains whatever the sign: more credit in a success, less blame in a failure.
    Arguments and result are (n,).
    """
    a_n = np.asarray(advantages_n, dtype=np.float64)
    return np.where(planning_n, a_n + alpha * np.abs(a_n), a_n)


def sepa_pool(
    uncertainty_n: Floats, planning_n: BoolArray, sepa_lambda: float, edges: Sequence[int] = ()
) -> Float64Array:
    """SEPA pooling: ``u_t <- lambda mean_exec(u) + (1 - lambda) u_t`` on execution tokens.

    Planning tokens keep their ``u_t``; a rollout without execution tokens is unchanged. ``sepa_lambda`` is in
    [0, 1]; arguments and result are (n,). SEPA ("selective
    entropy pooling with annealing") is a proposal on its author's own site, together with null results over
    more than a hundred runs. It flattens the uncertainty of execution tokens; no gain is promised.
    """
    u_n = np.asarray(uncertainty_n, dtype=np.float64)
    if sepa_lambda == 0.0 or u_n.size == 0:
        return u_n
    mean_n = _execution_means(u_n, planning_n, edges)
    return np.where(planning_n, u_n, sepa_lambda * mean_n + (1.0 - sepa_lambda) * u_n)


def sepa_amplify(
    uncertainty_n: Floats,
    planning_n: BoolArray,
    sepa_lambda: float,
    edges: Sequence[int] = (),
    *,
    floored: bool = False,
) -> Float64Array:
    """SEPA the other way round: ``u_t <- (1 + lambda) u_t - lambda mean_exec(u)`` on execution tokens.

    It spreads what ``sepa_pool`` flattens, and keeps the same mean unless ``floored`` lifts what fell below 0
    to 0. Planning tokens keep their ``u_t``; a rollout without execution tokens is unchanged. No paper: a
    control for the direction of SEPA. ``sepa_lambda`` is in [0, 1]; arguments and result are (n,).
    """
    u_n = np.asarray(uncertainty_n, dtype=np.float64)
    if sepa_lambda == 0.0 or u_n.size == 0:
        return u_n
    mean_n = _execution_means(u_n, planning_n, edges)
    spread_n = (1.0 + sepa_lambda) * u_n - sepa_lambda * mean_n
    return np.where(planning_n, u_n, np.maximum(spread_n, 0.0) if floored else spread_n)


def _execution_means(u_n: Float64Array, planning_n: BoolArray, edges: Sequence[int]) -> Float64Array:
    """Each token's mean over the execution tokens of its rollout; 0 where there are none."""
    edges = edges or (0, u_n.size)
    execution_n = ~planning_n
    counts = [int(np.count_nonzero(execution_n[a:b])) for a, b in itertools.pairwise(edges)]
    before = list(itertools.accumulate(counts, initial=0))
    return np.repeat(_mean_of_each(u_n[execution_n], before), np.diff(edges))


# Token transforms: (group, advantages_G_T, context) -> advantages_G_T.


def none(
    group: ScoredGroup, advantages_G_T: Sequence[FloatArray], context: TransformContext
) -> Sequence[FloatArray]:
    """Every sampled token keeps its rollout's advantage."""
    return advantages_G_T


Reshape: TypeAlias = Callable[[Floats, BoolArray, Sequence[int]], Float64Array]
"""(uncertainty_n, planning_n, edges) -> uncertainty_n: what happens to the uncertainties before GTPO."""


def _transform(
    group: ScoredGroup,
    advantages_G_T: Sequence[FloatArray],
    context: TransformContext,
    *,
    reshape: Reshape | None = None,
    alpha: float = 0.0,
) -> list[FloatArray]:
    rollouts = group.rollouts_G
    sampled = np.concatenate([r.sampled_T for r in rollouts])
    edges = np.cumsum([0, *(int(np.count_nonzero(r.sampled_T)) for r in rollouts)]).tolist()
    u_n: Floats = np.concatenate(context.uncertainty_G_T)[sampled]
    planning_n = np.concatenate(context.planning_G_T)[sampled]
    if reshape is not None:
        u_n = reshape(u_n, planning_n, edges)
    credit_n = gtpo_weigh(np.concatenate(advantages_G_T)[sampled], u_n, float(context.params["beta"]), edges)
    if alpha != 0.0:
        credit_n = hicra_amplify(credit_n, planning_n, alpha)
    out = np.zeros(len(sampled), dtype=np.float32)
    out[sampled] = credit_n
    return np.split(out, np.cumsum([len(r.sampled_T) for r in rollouts])[:-1])


def gtpo(
    group: ScoredGroup, advantages_G_T: Sequence[FloatArray], context: TransformContext
) -> Sequence[FloatArray]:
    """GTPO's weights on the raw uncertainties, per rollout; see ``gtpo_weigh``. Reads ``params["beta"]``."""
    return _transform(group, advantages_G_T, context)


def gtpo_hicra(
    group: ScoredGroup, advantages_G_T: Sequence[FloatArray], context: TransformContext
) -> Sequence[FloatArray]:
    """GTPO's weights, then HICRA on planning tokens. Reads ``params["beta"]`` and ``params["alpha"]``."""
    return _transform(group, advantages_G_T, context, alpha=float(context.params["alpha"]))


def gtpo_sepa(
    group: ScoredGroup, advantages_G_T: Sequence[FloatArray], context: TransformContext
) -> Sequence[FloatArray]:
    """SEPA on the uncertainties, then GTPO's weights. Reads ``params["beta"]`` and ``sepa_lambda``."""
    return _transform(
        group,
        advantages_G_T,
        context,
        reshape=lambda u_n, planning_n, edges: sepa_pool(u_n, planning_n, context.sepa_lambda, edges),
    )


def gtpo_sepa_amp(
    group: ScoredGroup, advantages_G_T: Sequence[FloatArray], context: TransformContext
) -> Sequence[FloatArray]:
    """``sepa_amplify``, then GTPO's weights. Reads ``params["beta"]`` and ``sepa_lambda``."""
    return _transform(
        group,
        advantages_G_T,
        context,
        reshape=lambda u_n, planning_n, edges: sepa_amplify(u_n, planning_n, context.sepa_lambda, edges),
    )


def gtpo_sepa_amp_c(
    group: ScoredGroup, advantages_G_T: Sequence[FloatArray], context: TransformContext
) -> Sequence[FloatArray]:
    """``sepa_amplify`` floored at 0, then GTPO's weights. Reads ``params["beta"]`` and ``sepa_lambda``."""
    return _transform(
        group,
        advantages_G_T,
        context,
        reshape=lambda u_n, planning_n, edges: sepa_amplify(
            u_n, planning_n, context.sepa_lambda, edges, floored=True
        ),
    )


def entropy_mask(
    group: ScoredGroup, advantages_G_T: Sequence[FloatArray], context: TransformContext
) -> Sequence[FloatArray]:
    """Credit only for the most uncertain share ``rho`` of the group's sampled tokens, 0 for the others.

    Paper: "Beyond the 80/20 rule", arXiv 2506.01939, which takes the entropy of the whole distribution
    (``uncertainty_kind = "shannon_entropy"``) and a rho of 0.2. Of n tokens ``ceil(rho n)`` are kept, and all
    that are as uncertain as the last of them: ties do not depend on the order of members or tokens. Reads
    ``params["rho"]``, in (0, 1].
    """
    pooled_N = np.concatenate(
        [u_T[r.sampled_T] for r, u_T in zip(group.rollouts_G, context.uncertainty_G_T, strict=True)]
    )
    # Less a hair, because 0.1 * 30 is 3.0000000000000004.
    kept = max(1, math.ceil(float(context.params["rho"]) * pooled_N.size - 1e-9))
    threshold = np.partition(pooled_N, pooled_N.size - kept)[pooled_N.size - kept]
    # NaN, where no token was sampled, is not at least the threshold.
    return [
        np.where(u_T >= threshold, a_T, np.float32(0.0))
        for a_T, u_T in zip(advantages_G_T, context.uncertainty_G_T, strict=True)
    ]
