"""Counter-based sampling noise: each uniform is a pure function of (seed, step, task, member, position), so a
sample depends neither on batching nor on order, needs no stored RNG state, and pairs across conditions."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import numpy.typing as npt

from retrain.types import NoiseKey


def stream_seed(key: NoiseKey, member: int) -> int:
    """The 128-bit Philox key of one rollout's stream; servers that take a seed get its low 63 bits."""
    packed = struct.pack("<4q", key.seed, key.step, key.task, key.member + member)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")


def uniforms(key: NoiseKey, n: int, length: int) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1) of shape (n, length): members ``key.member ..``, positions ``key.position ..``."""
    out = np.empty((n, length))
    for i in range(n):
        generator = np.random.Generator(np.random.Philox(key=stream_seed(key, i)))
        out[i] = generator.random(key.position + length)[key.position :]
    return out
