"""The variance that each rank keeps, over the layers of an adapter, and the rank that is recommended."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrain.errors import ConfigError, ModelError
from retrain.squeeze.source import Pair, Source, open_source
from retrain.squeeze.spectrum import Spectrum, effective_rank, retained, spectrum
from retrain.squeeze.tensors import read

Progress = Callable[[str, int, int], None]
"""Called with what is done and how many layers of how many."""

_TOLERANCE = 1e-9
"""A share this close to the wanted one reaches it: an exact rank in float32 leaves about 1e-13 behind it."""

_KEPT_BYTES = 256_000_000
"""Decompositions held from the analysis for a compression after it; beyond them they are computed again."""


def _silent(what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's result. ``kept_R`` (rank,) is the share of variance that the first k directions keep; ``needed`` the
    least k that keeps the wanted share, 0 for a zero update; ``norm`` the Frobenius norm of the scaled update."""

    pair: Pair
    values_R: torch.Tensor
    kept_R: torch.Tensor
    needed: int
    effective: float
    norm: float
    spectrum: Spectrum | None = None

    def kept(self, rank: int) -> float:
        """Share of variance kept at ``rank``."""
        return float(self.kept_R[min(rank, self.pair.rank) - 1])


@dataclass(frozen=True, slots=True)
class Row:
    """One rank of the table. Shares of variance in [0, 1]: mean, least and most over layers, and of all layers' squared
    norms together; ``error`` is the predicted relative error of the whole update, the root of what ``pooled`` leaves, without
    the rounding of a written file (``Compressed.rounding``)."""

    rank: int
    mean: float
    min: float
    max: float
    pooled: float
    error: float
    parameters: int


@dataclass(frozen=True, slots=True)
class Analysis:
    """What an adapter's layers need. ``recommended`` is the smallest rank of the table whose mean share reaches ``wanted``,
    else the adapter's own: a heuristic of ours, which no paper defines. ``least`` is the smallest of all ranks that does."""

    source: Source
    layers: tuple[Layer, ...]
    table: tuple[Row, ...]
    wanted: float
    recommended: int
    least: int
    seconds: float
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Everything but the spectra, as one JSON document."""
        return {
            "adapter": str(self.source.directory),
            "squeezed_from": os.path.abspath(self.source.directory),
            "base_model": self.source.settings.get("base_model_name_or_path"),
            "rank": self.source.rank,
            "alpha": self.source.alpha,
            "rslora": self.source.rslora,
            "min_variance_retention": self.wanted,
            "recommended_rank": self.recommended,
            "least_rank": self.least,
            "table": [
                {"rank": r.rank, "mean": r.mean, "min": r.min, "max": r.max, "pooled": r.pooled,
                 "predicted_error": r.error, "parameters": r.parameters, "recommended": r.rank == self.recommended}
                for r in self.table
            ],
            "layers": [
                {"name": la.pair.name, "layer": number_of(la.pair.name), "module": module_of(la.pair.name),
                 "rank": la.pair.rank, "alpha": la.pair.alpha, "norm": la.norm, "effective_rank": la.effective,
                 "needed_rank": la.needed, "retained": {str(r.rank): la.kept(r.rank) for r in self.table}}
                for la in self.layers
            ],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }  # fmt: skip

    def row(self, rank: int) -> Row:
        """The table's row of any rank, also of one that is not in it."""
        return _row(self.layers, rank)


_LAYERS = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)(?=\.|$)")
"""A layer's number in a dotted name, whatever other numbers (of experts, of towers) stand there."""


def number_of(name: str) -> int | None:
    """The layer's number in a module's dotted name, else the first whole number in it; None without one."""
    if found := _LAYERS.search(name):
        return int(found[1])
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def module_of(name: str) -> str:
    """The kind of module: what follows the layer's number in its name, with * for further numbers. Several modules of a
    layer may be of one kind: experts."""
    found = _LAYERS.search(name)
    if found and found.end() < len(name):
        return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name[found.end() + 1 :])
    return re.split(r"\.\d+\.", name)[-1]


def device_of(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:N`` or ``gpu:N``; ConfigError for another one, or one that this machine lacks."""
    plain = re.sub(r"^gpu", "cuda", name)
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", plain):
        raise ConfigError(
            f'squeeze.device = "{name}" is not cpu, cuda or cuda:N.', fix='for example device = "cpu".'
        )
    device = torch.device(plain)
    if device.type == "cuda" and (device.index or 0) >= (
        torch.cuda.device_count() if torch.cuda.is_available() else 0
    ):
        raise ConfigError(
            f'squeeze.device = "{name}": this machine has no such device.', fix='write device = "cpu".'
        )
    return device


def analyse(
    adapter: Path | Source,
    *,
    wanted: float = 0.95,
    target_ranks: Sequence[int] = (),
    source_rank: int = 0,
    device: str = "cpu",
    keep: bool = False,
    progress: Progress = _silent,
) -> Analysis:
    """Decompose an adapter's layers one by one.

    ``wanted`` in (0, 1]; ``target_ranks`` empty: the powers of two below the adapter's rank, and it; ``source_rank`` the
    rank that the adapter is expected to have, 0 for any. ``keep`` holds the decompositions for ``compress``, in bounded
    memory. ModelError and ConfigError say what is wrong in one line.
    """
    source = adapter if isinstance(adapter, Source) else open_source(adapter)
    on = device_of(device)
    if not 0 < wanted <= 1:
        raise ConfigError(
            f"squeeze.min_variance_retention = {wanted} is no share above 0 and at most 1.", fix="for example 0.95."
        )
    if source_rank and source_rank != source.rank:
        raise ConfigError(
            f"squeeze.source_rank = {source_rank}, and the adapter {source.directory} has rank {source.rank}.",
            fix=f"set it to {source.rank}, or to 0 to take the adapter's.",
        )
    ranks = _ranks(source, target_ranks)
    begun, left, layers = time.monotonic(), _KEPT_BYTES if keep else 0, list[Layer]()
    for done, pair in enumerate(source.pairs):
        progress("decomposing", done, len(source.pairs))
        found = decompose(source, pair, on)
        size = 16 * pair.rank**2
        held = found if size <= left else None
        left -= size if held is not None else 0
        shares = retained(found.values_R)
        norm = pair.scale * math.sqrt(float(found.values_R.square().sum()))
        needed = 0 if norm == 0 else int((shares >= wanted - _TOLERANCE).nonzero()[0]) + 1
        layers.append(Layer(pair, found.values_R, shares, needed, effective_rank(found.values_R), norm, held))
    progress("decomposing", len(source.pairs), len(source.pairs))
    table = [_row(layers, rank) for rank in ranks]
    enough = [row.rank for row in table if row.mean >= wanted - _TOLERANCE]
    recommended = min(enough, default=source.rank)
    if recommended not in ranks:
        table.append(_row(layers, recommended))
    least = next(k for k in range(1, source.rank + 1) if _mean(layers, k) >= wanted - _TOLERANCE)
    return Analysis(
        source, tuple(layers), tuple(table), wanted, recommended, least, time.monotonic() - begun,
        tuple(_notes(source, layers, recommended, least)),
    )  # fmt: skip


def factors(source: Source, pair: Pair, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) of a layer; ModelError where a number in them is not finite."""
    found: list[torch.Tensor] = []
    for name in (pair.a, pair.b):
        tensor = read(source.file, source.entries[name])
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{source.directory}: {name} holds numbers that are not finite.",
                fix="choose an earlier checkpoint.",
            )
        found.append(tensor.to(device))
    return found[0], found[1]


def decompose(source: Source, pair: Pair, device: torch.device) -> Spectrum:
    """The spectrum of one layer."""
    return spectrum(*factors(source, pair, device))


def _ranks(source: Source, wanted: Sequence[int]) -> list[int]:
    if not wanted:
        return [*(2**i for i in range(source.rank.bit_length()) if 2**i < source.rank), source.rank]
    wrong = [rank for rank in wanted if rank != int(rank) or rank < 1]
    if wrong:
        raise ConfigError(
            f"squeeze.target_ranks holds {wrong[0]}, which is no whole number above 0.", fix=f"name 1 to {source.rank}."
        )
    above = [rank for rank in wanted if rank > source.rank]
    if above:
        raise ConfigError(
            f"squeeze.target_ranks holds {above[0]}, and the adapter has rank {source.rank}.",
            fix=f"name ranks up to {source.rank}.",
        )
    return sorted(set(wanted))


def _mean(layers: Sequence[Layer], rank: int) -> float:
    return math.fsum(layer.kept(rank) for layer in layers) / len(layers)


def _row(layers: Sequence[Layer], rank: int) -> Row:
    shares = [layer.kept(rank) for layer in layers]
    total = math.fsum(layer.norm**2 for layer in layers)
    lost = math.fsum(layer.norm**2 * max(0.0, 1 - share) for layer, share in zip(layers, shares, strict=True))
    gone = lost / total if total else 0.0
    return Row(
        rank, _mean(layers, rank), min(shares), max(shares), 1 - gone, math.sqrt(gone),
        sum(layer.pair.parameters(rank) for layer in layers),
    )  # fmt: skip


def _notes(source: Source, layers: Sequence[Layer], recommended: int, least: int) -> list[str]:
    notes: list[str] = []
    still = sum(layer.norm == 0 for layer in layers)
    if still == len(layers):
        notes.append("the adapter's update is zero: nothing was trained, and every rank keeps all of it.")
    elif still:
        notes.append(
            f"{still} of {len(layers)} layers have a zero update, and count as kept whole at every rank."
        )
    if least == source.rank > 1:
        notes.append("no lower rank keeps enough: the adapter uses its whole rank, and a larger one may help.")
    elif least < recommended:
        notes.append(f"rank {least}, which the table leaves out, keeps enough too.")
    return notes
