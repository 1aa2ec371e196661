"""What need not be computed again: prompts that are equal, prompts that begin alike, and parked sequences that a prompt
goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from retrain.engines.arena import Parked
from retrain.types import IntArray

_LEAST = 64
"""Tokens that prompts must share before their common beginning is computed on its own."""

_Prints: TypeAlias = npt.NDArray[np.uint64]


class _Fingerprints:
    """Of all beginnings of a sequence at once: a running sum of token times a number of its position."""

    def __init__(self) -> None:
        self._numbers: _Prints = np.zeros(0, dtype=np.uint64)

    def of(self, token_ids_T: IntArray) -> _Prints:
        """Entry i names the first i + 1 tokens; equal beginnings have equal prints, others hardly ever."""
        if len(token_ids_T) > len(self._numbers):
            generator = np.random.Generator(np.random.Philox(key=1))
            size = 2 * len(token_ids_T)
            self._numbers = generator.integers(1, 2**64, size=size, dtype=np.uint64, endpoint=False)
        return np.cumsum((token_ids_T.astype(np.uint64) + np.uint64(1)) * self._numbers[: len(token_ids_T)])


class ParkingLot:
    """Parked sequences, the least recently used first to go."""

    def __init__(self) -> None:
        self._prints = _Fingerprints()
        self._held: dict[tuple[int, int], Parked] = {}
        self._lengths: dict[int, int] = {}  # length -> how many
        self.tokens = self.bytes = 0

    def add(self, parked: Parked) -> None:
        """Keep it, in place of an equal one."""
        key = (len(parked.token_ids_T), int(self._prints.of(parked.token_ids_T)[-1]))
        self._drop(key)
        self._held[key] = parked
        self._lengths[key[0]] = self._lengths.get(key[0], 0) + 1
        self.tokens += key[0]
        self.bytes += parked.bytes

    def find(self, prompt_ids: IntArray) -> Parked | None:
        """The longest one that the prompt begins with; it becomes the most recently used."""
        if not self._held:
            return None
        prints = self._prints.of(prompt_ids)
        for length in sorted(self._lengths, reverse=True):
            if length > len(prompt_ids):
                continue
            key = (length, int(prints[length - 1]))
            parked = self._held.get(key)
            if parked is not None and np.array_equal(parked.token_ids_T, prompt_ids[:length]):
                self._held[key] = self._held.pop(key)
                return parked
        return None

    def take(self, parked: Parked) -> None:
        """It lives on in a row."""
        self._drop((len(parked.token_ids_T), int(self._prints.of(parked.token_ids_T)[-1])))

    def shrink(self, tokens: int) -> None:
        """Drop the least recently used until at most so many tokens are held."""
        while self.tokens > max(tokens, 0):
            self._drop(next(iter(self._held)))

    def _drop(self, key: tuple[int, int]) -> None:
        parked = self._held.pop(key, None)
        if parked is None:
            return
        self.tokens -= key[0]
        self.bytes -= parked.bytes
        self._lengths[key[0]] -= 1
        if not self._lengths[key[0]]:
            del self._lengths[key[0]]


def _common(a: IntArray, b: IntArray) -> int:
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def shared_beginnings(prompts: Sequence[IntArray]) -> list[tuple[int, list[int]]]:
    """Groups of different prompts with the number of tokens that each group shares, at least 64 and more than half of
    its shortest prompt; at least one token of every prompt is left over. A prompt is in one group at most."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tolist())
    groups: list[tuple[int, list[int]]] = []
    run: list[int] = []
    shared = 0
    for i in [*order, -1]:
        if run and i >= 0:
            shortest = min(len(prompts[j]) for j in (*run, i))
            so_far = _common(prompts[run[-1]], prompts[i])
            joint = min(so_far, shared if len(run) > 1 else so_far, shortest - 1)
            if joint >= _LEAST and joint > shortest / 2:
                run.append(i)
                shared = joint
                continue
        if len(run) > 1:
            groups.append((shared, run))
        run, shared = [i], 0
    return groups
