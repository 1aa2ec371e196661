"""What the device keeps of every row besides keys and values: its next token, where it stands, how it is sampled, and
what it has drawn so far. One step reads and writes these in place, so that it needs the host for nothing but the end
of a row."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from retrain.engines.draw import draw
from retrain.head import Head
from retrain.types import Sampling

_IDS, _POSITION, _COUNT, _LIMIT, _LIVE, _REPORT = range(6)
_TEMPERATURE, _TOP_P = range(2)


class Lanes:
    """Buffers for ``rows`` rows of at most ``length`` sampled tokens and ``stops`` stop ids each.

    Rows past the live ones may take part in a step: they stand still.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rows = self.length = self.stops = 0
        self._ints = torch.zeros((6, 0), dtype=torch.int64, device=device)
        self._floats = torch.ones((2, 0), dtype=torch.float32, device=device)
        self._stops = torch.zeros((0, 0), dtype=torch.int64, device=device)
        self._noise = torch.zeros((0, 0), dtype=torch.float64, device=device)
        self._logprobs = torch.zeros((0, 0), dtype=torch.float32, device=device)
        self._entropies = torch.zeros((0, 0), dtype=torch.float32, device=device)

    def fits(self, rows: int, length: int, stops: int) -> bool:
        """Is there room already?"""
        return rows <= self.rows and length <= self.length and stops <= self.stops

    def resize(self, rows: int, length: int, stops: int, live: int) -> None:
        """Reallocate, keeping the first ``live`` rows."""

        def grown(old: torch.Tensor, shape: tuple[int, int], fill: float, along: int) -> torch.Tensor:
            new = torch.full(shape, fill, dtype=old.dtype, device=self._device)
            if along:
                new[:, :live] = old[:, :live]
            else:
                new[:live, : old.shape[1]] = old[:live]
            return new

        self.rows, self.length, self.stops = rows, length, stops
        self._ints = grown(self._ints, (6, rows), 0, 1)
        self._floats = grown(self._floats, (2, rows), 1.0, 1)
        self._stops = grown(self._stops, (rows, stops), -1, 0)
        self._noise = grown(self._noise, (rows, length), 0, 0)
        self._logprobs = grown(self._logprobs, (rows, length), 0, 0)
        self._entropies = grown(self._entropies, (rows, length), 0, 0)

    def put(
        self, first: int, samplings: Sequence[Sampling], lengths: Sequence[int], noise: Sequence[np.ndarray]
    ) -> None:
        """New rows from ``first`` on, whose prompts have ``lengths`` tokens."""
        part = slice(first, first + len(samplings))
        ints = np.zeros((6, len(samplings)), dtype=np.int64)
        ints[_POSITION] = lengths
        ints[_LIMIT] = [s.max_tokens for s in samplings]
        ints[_LIVE] = 1
        floats = np.array(
            [[s.temperature for s in samplings], [s.top_p for s in samplings]], dtype=np.float32
        )
        stops = np.full((len(samplings), self.stops), -1, dtype=np.int64)
        uniforms = np.zeros((len(samplings), self.length))
        for i, (s, u) in enumerate(zip(samplings, noise, strict=True)):
            stops[i, : len(s.stop_ids)] = s.stop_ids
            uniforms[i, : len(u)] = u
        self._ints[:, part] = torch.from_numpy(ints).to(self._device)
        self._floats[:, part] = torch.from_numpy(floats).to(self._device)
        self._stops[part] = torch.from_numpy(stops).to(self._device)
        self._noise[part] = torch.from_numpy(uniforms).to(self._device)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy rows onto others."""
        source = torch.as_tensor(sources, device=self._device)
        target = torch.as_tensor(targets, device=self._device)
        for buffer in (self._ints, self._floats):
            buffer[:, target] = buffer[:, source]
        for buffer in (self._stops, self._noise, self._logprobs, self._entropies):
            buffer[target] = buffer[source]

    def vacate(self, live: int) -> None:
        """Rows from ``live`` on stand still at position 0."""
        self._ints[:, live:] = 0

    def tokens(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens to compute next and their positions, (B) each."""
        return self._ints[_IDS, :rows], self._ints[_POSITION, :rows]

    @property
    def live(self) -> torch.Tensor:
        """1 for rows that move, else 0."""
        return self._ints[_LIVE]

    def advance(self, rows: int) -> None:
        """The tokens were computed: the next ones stand one further."""
        self._ints[_POSITION, :rows] += self._ints[_LIVE, :rows]

    def draw(
        self,
        hidden_BH: torch.Tensor,
        head: Head,
        first: int,
        temperature: float | None,
        top_p: bool,
        entropy: bool,
    ) -> None:
        """Draw the next token of rows from ``first`` on, after final hidden states; with ``temperature`` all have that one."""
        part = slice(first, first + len(hidden_BH))
        ints = self._ints[:, part]
        at = ints[_COUNT, :, None]
        drawn = draw(
            head.logits(hidden_BH),
            self._floats[_TEMPERATURE, part] if temperature is None else temperature,
            self._floats[_TOP_P, part] if top_p else None,
            self._noise[part].gather(1, at).squeeze(1),
            entropy,
        )
        self._logprobs[part].scatter_(1, at, drawn.logprobs_B[:, None])
        if drawn.entropies_B is not None:
            self._entropies[part].scatter_(1, at, drawn.entropies_B[:, None])
        ints[_IDS] = torch.where(ints[_LIVE] > 0, drawn.ids_B, ints[_IDS])
        ints[_COUNT] += ints[_LIVE]
        ended = (self._stops[part] == drawn.ids_B[:, None]).any(1) | (ints[_COUNT] >= ints[_LIMIT])
        torch.add(ended, drawn.ids_B, alpha=2, out=ints[_REPORT])

    def report(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids that rows first..end have just drawn, and which of them end there. The one thing a step waits for."""
        packed = self._ints[_REPORT, first:end].cpu().numpy()
        return packed >> 1, (packed & 1).astype(bool)

    def drawn(self, rows: Sequence[int], length: int, entropy: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Logprobs and entropies (rows, length) so far."""
        picked = torch.as_tensor(rows, device=self._device)
        logprobs = self._logprobs[picked, :length].cpu().numpy()
        return logprobs, self._entropies[picked, :length].cpu().numpy() if entropy else None
