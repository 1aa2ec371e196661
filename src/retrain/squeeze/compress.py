"""An adapter at a lower rank, as a folder that PEFT and a run load."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrain.adapter_settings import SETTINGS, WEIGHTS
from retrain.errors import ConfigError, ModelError
from retrain.squeeze.analysis import Analysis, Progress, decompose, device_of, factors
from retrain.squeeze.folder import same
from retrain.squeeze.source import Pair, Source
from retrain.squeeze.spectrum import truncated
from retrain.squeeze.tensors import DTYPES, write
from retrain.tracking.run_log import write_atomically


def _silent(what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Compressed:
    """What was written: the settings' rank and alpha, how many numbers, and their format. ``rounding`` is what that format
    changed, as a share of the norm of the whole update before. ``patterns`` says that layers differ in rank or alpha, so that
    PEFT alone loads it."""

    directory: Path
    rank: int
    alpha: float
    parameters: int
    bytes: int
    folded: bool
    patterns: bool
    dtype: str
    rounding: float

    def record(self, of: Analysis) -> dict[str, Any]:
        """As JSON, with what its rank keeps of the analysed adapter; ``compresses`` is False at the rank of that."""
        row = of.row(self.rank)
        return {
            "output": str(self.directory), "rank": self.rank, "alpha": self.alpha, "parameters": self.parameters,
            "bytes": self.bytes, "folded": self.folded, "patterns": self.patterns,
            "dtype": self.dtype, "rounding_error": self.rounding, "compresses": self.rank < of.source.rank,
            "retained": row.mean, "pooled": row.pooled, "predicted_error": math.hypot(row.error, self.rounding),
        }  # fmt: skip


def compress(
    analysis: Analysis,
    rank: int,
    directory: Path,
    *,
    keep_alpha: bool = False,
    uniform: bool = False,
    device: str = "cpu",
    progress: Progress = _silent,
) -> Compressed:
    """Write the adapter at ``rank`` (1 to the adapter's) into the folder ``directory``, in place of another one there but
    never of the analysed one (ConfigError); its files appear when they are whole.

    The scale of each layer stays as it was: alpha becomes ``alpha k / r``, with rslora ``alpha sqrt(k / r)``. Where that is no
    whole number, or differs between layers, the nearest whole alpha is written and what it lacks goes into the factors, so
    that every program can load it; ``keep_alpha`` writes the number itself, and patterns. Layers of a rank below ``rank``
    keep theirs, in rank_pattern; ``uniform`` fills them up with directions that add nothing.
    """
    source, on = analysis.source, device_of(device)
    if not 1 <= rank <= source.rank:
        raise ConfigError(
            f"squeeze.compress_to = {rank}, and the adapter has rank {source.rank}.",
            fix=f"name 1 to {source.rank}.",
        )
    if same(directory.resolve(), source.directory.resolve()):
        raise ConfigError(f"{directory} holds the adapter that is squeezed.", fix="write to another folder.")
    ranks = {p.name: rank if uniform else min(rank, p.rank) for p in source.pairs}
    exact = {p.name: _alpha(p.scale, ranks[p.name], source.rslora) for p in source.pairs}
    alpha, written = _written(exact, keep_alpha=keep_alpha)
    own = {name: value for name, value in written.items() if value != alpha}
    folded = any(not math.isclose(exact[n], written[n], rel_tol=1e-12) for n in exact)
    dtype = DTYPES[source.dtype]
    shapes = dict(sorted(_shapes(source, ranks).items()))
    directory.mkdir(parents=True, exist_ok=True)
    rounded: list[float] = []

    def tensors() -> Generator[torch.Tensor]:
        # Ordered as the header: A and B of one layer stand side by side in it.
        waiting: dict[str, torch.Tensor] = {}
        by_tensor = {name: i for i, p in enumerate(source.pairs) for name in (p.a, p.b)}
        done = 0
        for name in shapes:
            if name not in waiting:
                progress("compressing", done, len(source.pairs))
                layer = analysis.layers[by_tensor[name]]
                pair = layer.pair
                a, b = factors(source, pair, on)
                found = layer.spectrum or decompose(source, pair, on)
                scale = _scale(written[pair.name], ranks[pair.name], source.rslora)
                new_a, new_b = truncated(a, b, found, ranks[pair.name], pair.scale / scale)
                rounded.append(scale**2 * _rounding(source, pair, new_a, new_b, dtype))
                waiting |= {pair.a: new_a, pair.b: new_b}
                done += 1
            yield waiting.pop(name)
        progress("compressing", len(source.pairs), len(source.pairs))

    smaller = {p.name: ranks[p.name] for p in source.pairs if ranks[p.name] != rank}
    settings = _settings(source, rank, alpha, smaller, own)
    weights = directory / f".{WEIGHTS}.tmp"
    try:
        write(weights, shapes, dtype, tensors())
        weights.replace(directory / WEIGHTS)
    finally:
        weights.unlink(missing_ok=True)
    write_atomically(directory / SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    count = sum(int(torch.Size(s).numel()) for s in shapes.values())
    total = math.fsum(layer.norm**2 for layer in analysis.layers)
    return Compressed(
        directory, rank, alpha, count, (directory / WEIGHTS).stat().st_size, folded, bool(smaller or own),
        source.dtype, math.sqrt(math.fsum(rounded) / total) if total else 0.0,
    )  # fmt: skip


def _rounding(source: Source, pair: Pair, a_RI: torch.Tensor, b_OR: torch.Tensor, dtype: torch.dtype) -> float:
    """Squared norm of what rounding both float64 factors to ``dtype`` changes in ``B A``; ModelError where they overflow.

    The change is ``dB A' + B dA`` with A' rounded: its norm comes from products of size rank x rank, none of which cancel.
    """
    rounded_a, rounded_b = a_RI.to(dtype).double(), b_OR.to(dtype).double()
    for name, tensor in ((pair.a, rounded_a), (pair.b, rounded_b)):
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{source.directory}: {name} at another rank holds numbers beyond {source.dtype}, which ends at "
                f"{torch.finfo(dtype).max:.3g}.",
                fix="convert the adapter to float32, and squeeze that.",
            )
    d_a, d_b = rounded_a - a_RI, rounded_b - b_OR
    first = ((d_b.T @ d_b) * (rounded_a @ rounded_a.T)).sum()
    second = ((b_OR.T @ b_OR) * (d_a @ d_a.T)).sum()
    mixed = ((d_b.T @ b_OR) * (rounded_a @ d_a.T)).sum()
    return max(0.0, float(first + second + 2 * mixed))


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    found = scale * (math.sqrt(rank) if rslora else rank)
    return float(round(found)) if math.isclose(found, round(found), rel_tol=1e-12) else found


def _scale(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def _written(exact: Mapping[str, float], *, keep_alpha: bool) -> tuple[float, dict[str, float]]:
    """The alpha of the settings, and that of each layer."""
    values = list(exact.values())
    usual = max(sorted(set(values)), key=values.count)
    if keep_alpha:
        return usual, dict(exact)
    alpha = float(max(1, round(usual)))
    return alpha, dict.fromkeys(exact, alpha)


def _shapes(source: Source, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for pair in source.pairs:
        found |= {pair.a: (ranks[pair.name], pair.columns), pair.b: (pair.rows, ranks[pair.name])}
    return found


def _settings(
    source: Source, rank: int, alpha: float, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """PEFT's settings of the new adapter: the old ones, where rank and alpha do not say something else."""
    found = dict(source.settings)
    for name, value in found.items():
        if name in ("target_modules", "exclude_modules") and isinstance(value, list):
            found[name] = sorted(map(str, value))
    base = found.get("base_model_name_or_path")
    if isinstance(base, str) and base and not os.path.isdir(base) and os.path.isdir(source.directory / base):
        found["base_model_name_or_path"] = str((source.directory / base).resolve())
    return {
        **found,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "rank_pattern": {_exactly(source, name): value for name, value in sorted(ranks.items())},
        "alpha_pattern": {
            _exactly(source, name): int(v) if v.is_integer() else v for name, v in sorted(alphas.items())
        },
        # The new factors say all; how the old ones began would only confuse who reads them.
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _exactly(source: Source, name: str) -> str:
    """A pattern that names this layer and no other; PEFT reads it as a regular expression at the name's end."""
    other = any(p.name != name and p.name.endswith(f".{name}") for p in source.pairs)
    return f"^{name}" if other else name
