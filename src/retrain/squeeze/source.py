"""What a PEFT adapter on disk is made of: its layers with their ranks and scales, and whether it can be squeezed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from retrain.adapter_settings import REFUSED, WEIGHTS, read_settings
from retrain.errors import ModelError
from retrain.squeeze.tensors import DTYPES, Entry, entries

_HONOURED = ("rank_pattern", "alpha_pattern", "fan_in_fan_out")
"""Settings that a run cannot start from and that squeezing understands."""

_MORE = {
    "use_qalora": "QA-LoRA pools the adapter's inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "monteclora_config": "its matrices are sampled",
    "kasa_config": "KaSA changes the base weights",
    "velora_config": "VeLoRA compresses its inputs",
    "arrow_config": "it routes between several adapters",
    "alora_invocation_tokens": "it acts on a part of the tokens only",
}
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take something out of the base weights, and would take out something else at another rank."""

_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapted layer: A (rank, in) and B (out, rank) with the update ``scale * B A``; ``a`` and ``b`` name tensors."""

    name: str
    a: str
    b: str
    rank: int
    alpha: float
    scale: float
    columns: int
    rows: int

    def parameters(self, rank: int) -> int:
        """Numbers that the layer's adapter holds at ``rank``."""
        return min(rank, self.rank) * (self.columns + self.rows)


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter that can be squeezed. ``rank`` is its largest; ``dtype`` the name of its widest number format."""

    directory: Path
    settings: Mapping[str, Any]
    pairs: tuple[Pair, ...]
    entries: Mapping[str, Entry]
    rank: int
    alpha: float
    rslora: bool
    dtype: str

    @property
    def file(self) -> Path:
        """The file of its tensors."""
        return self.directory / WEIGHTS

    @property
    def is_uniform(self) -> bool:
        """True where every layer has the same rank and scale."""
        return len({(p.rank, p.scale) for p in self.pairs}) == 1


def open_source(directory: Path, key: str = "squeeze.adapter_path") -> Source:
    """Read an adapter's settings and header, no tensor yet; ModelError, naming the setting ``key`` or the reason, when
    there is none or it is more than products of two matrices."""
    if str(directory).startswith("tinker:"):
        raise ModelError(
            f"{directory}: adapters at Tinker are not in this version.",
            fix="download it, and name its folder.",
        )
    settings = read_settings(directory, key)
    _refuse(directory, settings)
    found = entries(directory / WEIGHTS)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    patterns: list[Any] = [settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not _is_scale(alpha):
        raise ModelError(
            f"{directory}: its rank and alpha are {rank!r} and {alpha!r}, not numbers above 0 (alpha: 1e-9 to 1e9).",
            fix="correct adapter_config.json.",
        )
    if not all(isinstance(p, Mapping) for p in patterns) or not all(map(_is_scale, patterns[1].values())):
        raise ModelError(
            f"{directory}: rank_pattern and alpha_pattern must map layers to numbers above 0 (alpha: 1e-9 to 1e9).",
            fix="correct adapter_config.json.",
        )
    rslora = bool(settings.get("use_rslora"))
    pairs = tuple(_pairs(directory, found, settings, float(cast("float", alpha)), rslora))
    formats = {found[n].dtype for p in pairs for n in (p.a, p.b)}
    widest = next(name for name in DTYPES if name in formats)
    if formats == {"F16", "BF16"}:
        widest = "F32"  # neither holds all of the other's numbers
    return Source(
        directory,
        settings,
        pairs,
        found,
        max(p.rank for p in pairs),
        float(cast("float", alpha)),
        rslora,
        widest,
    )


def matched(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that names the layer, as PEFT matches them: a suffix at a dot, or a regular expression."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-9 <= value <= 1e9


def _refuse(directory: Path, settings: Mapping[str, Any]) -> None:
    def cannot(why: str) -> ModelError:
        return ModelError(f"{directory} cannot be squeezed: {why}.", fix="squeeze an adapter of plain LoRA.")

    reasons = {**{k: v for k, v in REFUSED.items() if k not in _HONOURED}, **_MORE}
    for name, why in reasons.items():
        if settings.get(name):
            raise cannot(f"{why} ({name})")
    if settings.get("bias", "none") != "none":
        raise cannot(f"it trained biases (bias = {settings['bias']!r})")
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGING):
        raise cannot(
            f"it belongs to base weights that were changed at its rank (init_lora_weights = {begun!r}); PEFT converts "
            "such an adapter with path_initial_model_for_weight_conversion"
        )
    unknown = [k for k, v in settings.items() if k.startswith("use_") and v and k != "use_rslora"]
    if unknown:
        raise cannot(f"{unknown[0]} is a variant that is not known here")


def _pairs(
    directory: Path, found: Mapping[str, Entry], settings: Mapping[str, Any], alpha: float, rslora: bool
) -> Iterable[Pair]:
    alphas = cast("Mapping[str, float]", settings.get("alpha_pattern") or {})
    ranks = cast("Mapping[str, object]", settings.get("rank_pattern") or {})
    used: set[str] = set()
    for first, second in _PAIRS:
        for a in (n for n in found if n.endswith(first)):
            stem = a.removesuffix(first)
            b = stem + second
            for name in (a, b):
                entry = found.get(name)
                if entry is None:
                    raise _unfit(directory, f"{name} is missing")
                if entry.dtype not in DTYPES:
                    raise _unfit(
                        directory, f"{name} is held as {entry.dtype}, which is no format of an adapter"
                    )
                if len(entry.shape) != 2:
                    raise _unfit(directory, f"{name} has shape {entry.shape}: it adapts no linear layer")
            (rank, columns), (rows, other) = found[a].shape, found[b].shape
            if rank != other or not rank:
                raise _unfit(directory, f"{a} has rank {rank}, and its partner {other}")
            used.update((a, b))
            layer = stem.removeprefix(_PREFIX)
            try:
                own = float(alphas.get(matched(alphas, layer) or "", alpha))
            except re.error as error:
                raise _unfit(directory, f"alpha_pattern holds an expression that is none: {error}") from error
            try:
                said = ranks.get(matched(ranks, layer) or "", settings["r"])
            except re.error as error:
                raise _unfit(directory, f"rank_pattern holds an expression that is none: {error}") from error
            if said != rank:
                raise _unfit(directory, f"{a} has rank {rank}, and adapter_config.json says {said!r}")
            yield Pair(layer, a, b, rank, own, own / (math.sqrt(rank) if rslora else rank), columns, rows)
    extra = sorted(set(found) - used)
    if extra:
        raise _unfit(directory, f"it holds {extra[0]}, which is no part of plain LoRA")
    if not used:
        raise _unfit(directory, "it is empty")


def _unfit(directory: Path, why: str) -> ModelError:
    return ModelError(
        f"{directory} cannot be squeezed: {why}.", fix="squeeze a LoRA adapter as PEFT writes it."
    )
