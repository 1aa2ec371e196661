"""Exact proportions without chance: which of several sources each draw comes from."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


class Shares:
    """Deals draws to ``len(weights)`` sources so that after any number of draws none has had a whole draw more
    than its share. A pure function of the weights: no chance and, besides the counts, no memory.

    Weights are above 0; ValueError otherwise.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or any(w <= 0 for w in weights):
            raise ValueError(f"weights must be above 0, not {list(weights)}")
        # As written: 0.1 is a tenth, not the float beside it.
        exact = [Fraction(str(w)) for w in weights]
        self._shares = [w / sum(exact) for w in exact]
        self.counts = [0] * len(weights)

    def next(self) -> int:
        """The source of the next draw: the one that is furthest behind its share, the first of equals."""
        draw = sum(self.counts) + 1
        behind = [share * draw - count for share, count in zip(self._shares, self.counts, strict=True)]
        chosen = behind.index(max(behind))
        self.counts[chosen] += 1
        return chosen
