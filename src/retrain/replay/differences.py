"""Credit of the same tokens by two algorithms, in numbers: per step, over all steps, and token by token."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrain.tracking import texts
from retrain.training.recredit import trains
from retrain.types import BoolArray, CreditedGroup, FloatArray


@dataclass(frozen=True, slots=True)
class StepComparison:
    """One step's credit by the run's own algorithm and by the other one.

    ``tokens`` are the sampled tokens of groups that train under either; shares, correlations and means are over them,
    None where there is nothing to compute them from. ``own_trains`` and ``other_trains`` count groups with any credit,
    ``flipped_groups`` those that train under one of the two only. ``reproduced``: is the run's own credit, computed now,
    equal to the recorded one in every bit?
    """

    step: int
    tokens: int
    sign_changed: float | None
    pearson: float | None
    spearman: float | None
    own_planning: float | None
    own_execution: float | None
    other_planning: float | None
    other_execution: float | None
    groups: int
    own_trains: int
    other_trains: int
    flipped_groups: int
    own_lambda: float
    other_lambda: float
    reproduced: bool


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """A token whose credit changed a lot, with the text around it."""

    step: int
    task: str
    member: int
    position: int
    own: float
    other: float
    own_planning: bool
    other_planning: bool
    before: str
    token: str
    after: str


@dataclass(frozen=True, slots=True)
class Pairs:
    """Credit of the same N tokens by both algorithms, float64, each with its own planning marks."""

    own_N: npt.NDArray[np.float64]
    other_N: npt.NDArray[np.float64]
    own_planning_N: BoolArray
    other_planning_N: BoolArray


def pairs_of(a_P: Sequence[CreditedGroup], b_P: Sequence[CreditedGroup]) -> Pairs:
    own: list[tuple[FloatArray, BoolArray]] = []
    other: list[tuple[FloatArray, BoolArray]] = []
    for a, b in zip(a_P, b_P, strict=True):
        if not (trains(a) or trains(b)):
            continue
        for i in np.flatnonzero(a.scored.valid_G).tolist():
            sampled_T = a.scored.rollouts_G[i].sampled_T
            for found, group in ((own, a), (other, b)):
                found.append((group.advantages_G_T[i][sampled_T], group.planning_G_T[i][sampled_T]))
    return Pairs(*(_joined(x, np.float64, 0) for x in (own, other)), *(_joined(x, np.bool_, 1) for x in (own, other)))


def _joined(found: Sequence[Sequence[npt.NDArray[Any]]], dtype: type[np.generic], which: int) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *(arrays[which].astype(dtype) for arrays in found)])


def groups_of(a_P: Sequence[CreditedGroup], b_P: Sequence[CreditedGroup]) -> tuple[int, int, int, int]:
    own, other = [trains(g) for g in a_P], [trains(g) for g in b_P]
    return len(own), sum(own), sum(other), sum(a != b for a, b in zip(own, other, strict=True))


def _mean(values_N: npt.NDArray[np.float64]) -> float | None:
    return float(np.abs(values_N).mean()) if len(values_N) else None


def correlation(a_N: npt.NDArray[np.float64], b_N: npt.NDArray[np.float64]) -> float | None:
    """Pearson's; None where either does not vary."""
    a, b = a_N - a_N.mean() if len(a_N) else a_N, b_N - b_N.mean() if len(b_N) else b_N
    scale = float(np.sqrt((a * a).sum()) * np.sqrt((b * b).sum()))
    return min(1.0, max(-1.0, float((a * b).sum()) / scale)) if scale > 0 else None


def ranks(values_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rank of each value from 1 on; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def compared(
    step: int, pairs: Pairs, counts: tuple[int, int, int, int], own: float, other: float, *, reproduced: bool
) -> StepComparison:
    a, b = pairs.own_N, pairs.other_N
    return StepComparison(
        step=step,
        tokens=len(a),
        sign_changed=int(np.count_nonzero(np.sign(a) != np.sign(b))) / len(a) if len(a) else None,
        pearson=correlation(a, b),
        spearman=correlation(ranks(a), ranks(b)) if len(a) else None,
        own_planning=_mean(a[pairs.own_planning_N]),
        own_execution=_mean(a[~pairs.own_planning_N]),
        other_planning=_mean(b[pairs.other_planning_N]),
        other_execution=_mean(b[~pairs.other_planning_N]),
        groups=counts[0],
        own_trains=counts[1],
        other_trains=counts[2],
        flipped_groups=counts[3],
        own_lambda=own,
        other_lambda=other,
        reproduced=reproduced,
    )


class Tally:
    """Sums over steps, so that a run of any length needs the memory of one step."""

    def __init__(self) -> None:
        self._moments = np.zeros(6)
        """n, sum a, sum b, sum aa, sum bb, sum ab."""
        self._changed = 0
        self._absolute = np.zeros(4)
        """Sums of |A|: own planning, own execution, other planning, other execution; ``_counts`` are their tokens."""
        self._counts = np.zeros(4, dtype=np.int64)
        self._groups = np.zeros(4, dtype=np.int64)

    def add(self, pairs: Pairs, counts: tuple[int, int, int, int], compared: StepComparison) -> None:
        a, b = pairs.own_N, pairs.other_N
        self._moments += [len(a), a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()]
        self._changed += int(np.count_nonzero(np.sign(a) != np.sign(b)))
        parts = [x[m] for x, marks in ((a, pairs.own_planning_N), (b, pairs.other_planning_N)) for m in (marks, ~marks)]
        self._absolute += [float(np.abs(part).sum()) for part in parts]
        self._counts += [len(part) for part in parts]
        self._groups += counts

    def total(self, steps: Sequence[StepComparison]) -> StepComparison:
        n, a, b, aa, bb, ab = self._moments.tolist()
        tokens = int(n)
        spread = (aa - a * a / n) * (bb - b * b / n) if tokens else 0.0
        ranked = [(s.tokens, s.spearman) for s in steps if s.spearman is not None]
        weight = sum(count for count, _ in ranked)
        sums = zip(self._absolute.tolist(), self._counts.tolist(), strict=True)
        means = [float(total) / count if count else None for total, count in sums]
        own_planning, own_execution, other_planning, other_execution = means
        groups, own, other, flipped = self._groups.tolist()
        return StepComparison(
            step=-1,
            tokens=tokens,
            sign_changed=self._changed / tokens if tokens else None,
            pearson=min(1.0, max(-1.0, (ab - a * b / n) / spread**0.5)) if spread > 0 else None,
            spearman=sum(count * value for count, value in ranked) / weight if weight else None,
            own_planning=own_planning,
            own_execution=own_execution,
            other_planning=other_planning,
            other_execution=other_execution,
            groups=groups,
            own_trains=own,
            other_trains=other,
            flipped_groups=flipped,
            own_lambda=float(np.mean([s.own_lambda for s in steps])),
            other_lambda=float(np.mean([s.other_lambda for s in steps])),
            reproduced=all(s.reproduced for s in steps),
        )


class Largest:
    """The tokens whose credit differs most, with what their text needs."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, dict[str, Any], list[int], int]] = []
        self._count = 0

    def look(self, step: int, a_P: Sequence[CreditedGroup], b_P: Sequence[CreditedGroup]) -> None:
        for a, b in zip(a_P, b_P, strict=True):
            for i, rollout in enumerate(a.scored.rollouts_G):
                gap_T = np.abs(b.advantages_G_T[i].astype(np.float64) - a.advantages_G_T[i])
                least = self._heap[0][0] if len(self._heap) == self._most else 0.0
                # At most one token of a rollout: the ten largest of a step are often one rollout's.
                at = int(gap_T.argmax()) if len(gap_T) else 0
                if not len(gap_T) or gap_T[at] <= least or not self._most:
                    continue
                first = max(0, at - 16)
                window = rollout.token_ids_T[first : at + 9].tolist()
                entry = {
                    "step": step,
                    "task": a.scored.task.id,
                    "member": rollout.member,
                    "position": int(np.count_nonzero(rollout.sampled_T[:at])),
                    "own": float(a.advantages_G_T[i][at]),
                    "other": float(b.advantages_G_T[i][at]),
                    "own_planning": bool(a.planning_G_T[i][at]),
                    "other_planning": bool(b.planning_G_T[i][at]),
                }
                self._count += 1
                item = (float(gap_T[at]), -self._count, entry, window, at - first)
                if len(self._heap) < self._most:
                    heapq.heappush(self._heap, item)
                else:
                    heapq.heapreplace(self._heap, item)

    def found(self, tokenizer: Any) -> tuple[TokenDifference, ...]:
        out: list[TokenDifference] = []
        for _, _, entry, window, at in sorted(self._heap, key=lambda item: (-item[0], -item[1])):
            before, token, after = texts.around(tokenizer, window, at)
            out.append(TokenDifference(**entry, before=before, token=token, after=after))
        return tuple(out)
