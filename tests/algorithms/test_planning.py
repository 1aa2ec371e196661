"""The regex detector: what matches, and that exactly the overlapping tokens are marked, toy and real."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.algorithms.planning import DEFAULT_GRAMS, RegexDetector, _fold, parse_grams
from retrain.errors import ConfigError

DETECT = RegexDetector()


def characters(text: str, detect: RegexDetector = DETECT) -> str:
    """The text with every unmarked character replaced by a dot, one token per character."""
    mask = detect(text, [(i, i + 1) for i in range(len(text))])
    return "".join(c if m else "." for c, m in zip(text, mask, strict=True))


@pytest.mark.parametrize("gram", DEFAULT_GRAMS)
def test_every_default_phrase_is_found_in_any_case(gram: str) -> None:
    assert characters(f"x {gram.upper()}.") == f"..{gram.upper()}."


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("Wait, let me see", "Wait, let me...."),
        ("so wait -- let   me", "...wait -- let   me"),
        ("double-check it", "double-check..."),
        ("double\u2011check", "double\u2011check"),
        ("that's not right", "that's not right"),
        ("That\u2019s not right", "That\u2019s not right"),
        ("that doesn\u2019t work!", "that doesn\u2019t work."),
        ("the key insight is", "the key insight..."),
    ],
)
def test_what_matches(text: str, marked: str) -> None:
    assert characters(text) == marked


@pytest.mark.parametrize(
    "text",
    [
        "await let me",
        "wait let men",
        "wait\nlet me",
        "wait,\nlet me",
        "wait. let me",
        "wait let\tme",
        "waitlet me",
        "double \u2014 check",
        "thats not right",
        "notice_that",
        "",
    ],
)
def test_what_does_not_match(text: str) -> None:
    assert "." * len(text) == characters(text)


def test_phrases_may_overlap_each_other_and_themselves() -> None:
    assert characters("wait, let me check!") == "wait, let me check."
    assert characters("a b a b a x", RegexDetector(["a b a"])) == "a b a b a.."
    assert characters("the key is", RegexDetector(["the key", "key is"])) == "the key is"


def test_offsets_stay_true_where_lower_case_is_longer() -> None:
    assert characters("\u0130\u0130 notice that \u0130") == "...notice that.."


@given(
    st.text(
        st.one_of(st.characters(), st.sampled_from("aKZ \u2019\u2013\u212a\u0130\u03a3\u00c9\u01c5\ud800")),
        max_size=12,
    )
)
def test_folding_is_lower_case_character_by_character(text: str) -> None:
    assert _fold(text) == text.replace("\u0130", "i").lower()
    assert len(_fold(text)) == len(text)


def test_exactly_the_overlapping_tokens_are_marked() -> None:
    text = "x wait, let me y"
    #         x      _w       ait      ,_l      et_      (none)   me_      y
    offsets = [(0, 1), (1, 3), (3, 6), (6, 9), (9, 12), (12, 12), (12, 15), (15, 16)]
    assert DETECT(text, offsets).tolist() == [False, True, True, True, True, False, True, False]
    # Touching is not overlapping; a token may hold a whole phrase; several tokens may share a character.
    assert DETECT(text, [(0, 2), (14, 16), (0, 16), (2, 3), (2, 3)]).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_no_tokens_and_empty_offsets() -> None:
    assert DETECT("wait let me", []).tolist() == []
    assert DETECT("", [(0, 0), (0, 0)]).tolist() == [False, False]


def test_words_split_over_toy_tokens(toy: Callable, make_rollout: Callable) -> None:
    words = [" so", "wa", "it", ",", " let", " me", "\n", "that", "'", "s", " not", " ri", "ght", " sum"]
    rollout = make_rollout(prompt=0, words=words)
    text, offsets = toy(rollout.token_ids_T)
    # " so" + "wait" is one word, "sowait": not a phrase.
    assert DETECT(text, offsets).tolist() == [False] * 7 + [True] * 6 + [False] * 2
    rollout = make_rollout(prompt=0, words=words[1:])
    text, offsets = toy(rollout.token_ids_T)
    assert DETECT(text, offsets).tolist() == [True] * 5 + [False] + [True] * 6 + [False] * 2


def naive(text: str, offsets: list[tuple[int, int]], grams: tuple[str, ...]) -> list[bool]:
    """Every start and gram tried, character by character."""
    inside = [False] * len(text)
    for start in range(len(text)):
        for gram in grams:
            pattern = r"[ ,\-]+".join(re.escape(w) for w in gram.split())
            found = re.compile(pattern, re.IGNORECASE).match(text, start)
            if not found:
                continue
            before = start == 0 or not (text[start - 1].isalnum() or text[start - 1] == "_")
            after = found.end() == len(text) or not (text[found.end()].isalnum() or text[found.end()] == "_")
            if before and after:
                inside[start : found.end()] = [True] * (found.end() - start)
    return [any(inside[a:b]) for a, b in offsets]


@given(
    st.lists(st.sampled_from(["a", "B", "b", "A", " ", ", ", "-", "\n", "_", "c"]), max_size=30),
    st.lists(st.integers(0, 40), max_size=20),
)
def test_marks_equal_a_naive_search(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    grams = ("a b", "b", "b a b", "aa")
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    offsets = [*itertools.pairwise(edges), (0, 0)]
    got = RegexDetector(grams)(text, offsets)
    assert got.dtype == np.bool_
    assert got.tolist() == naive(text, offsets, grams)


# Phrases of one's own.


@pytest.mark.parametrize(
    ("text", "grams"),
    [
        ("", DEFAULT_GRAMS),
        ("  \n", DEFAULT_GRAMS),
        ("hold on, let us see", ("hold on", "let us see")),
        (' hold  on ,, "wait, what",hold on', ("hold on", "wait what")),
        ("one\ntwo", ("one", "two")),
        ('["hold on", "wait, what"]', ("hold on", "wait what")),
        ("[]", ()),
    ],
)
def test_grams_are_read_from_json_or_csv(text: str, grams: tuple[str, ...]) -> None:
    assert parse_grams(text) == grams


@pytest.mark.parametrize("text", ["[1, 2]", '["a"', '{"a": 1}', '"open', '["a", ""]', "?, a", '[["a"]]'])
def test_grams_that_cannot_be_read_name_the_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"logging\.strategic_grams") as caught:
        parse_grams(text)
    assert caught.value.fix


def test_grams_of_ones_own_replace_the_defaults() -> None:
    assert characters("Hmm, wait let me", RegexDetector(parse_grams("hmm"))) == "Hmm............."
    assert characters("wait let me", RegexDetector(())) == "..........."
    assert characters("c++ is c++x", RegexDetector(["C++"])) == "c++....c++."


def test_a_phrase_without_a_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="without a word"):
        RegexDetector(["..."])


# The real tokenizer.


@pytest.fixture(scope="module")
def qwen3(shared: Path) -> tuple[Any, Any]:
    """Renderer and tokenizer of Qwen3."""
    from transformers import AutoTokenizer

    from retrain.renderer import load_renderer

    path = str(shared / "tokenizers" / "qwen3")
    return load_renderer(path), AutoTokenizer.from_pretrained(path)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("12 + 7 = 18. Wait, let me see again", "Wait, let me"),
        ("Hmm, so that's not right.\nStart", "that's not right"),
        ("Hmm, so that\u2019s not right.\nStart", "that\u2019s not right"),
        ("WaIt, LeT mE", "WaIt, LeT mE"),
        ("\u4f60\u597d \U0001f600 double-check", "double-check"),
        ("await let me", ""),
        ("wait\nlet me", ""),
    ],
)
def test_spans_are_exact_on_the_qwen3_tokenizer(qwen3: tuple[Any, Any], text: str, phrase: str) -> None:
    renderer, tokenizer = qwen3
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    decoded, offsets = renderer.offsets(ids)
    assert decoded == text
    start = text.index(phrase)
    want = (
        [a < start + len(phrase) and b > start and b > a for a, b in offsets]
        if phrase
        else [False] * len(ids)
    )
    assert DETECT(decoded, offsets).tolist() == want
    assert sum(want) >= 2 or not phrase


@pytest.mark.shared_data
def test_a_word_split_into_bytes_and_letters_is_found_on_the_qwen3_tokenizer(qwen3: tuple[Any, Any]) -> None:
    renderer, tokenizer = qwen3
    text = "x that\u2019s not right y"
    # A sampled sequence need not be the tokenizer's own: one token per byte, three for the apostrophe.
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    ids = [i for char in text for i in tokenizer.convert_tokens_to_ids(list(split(char)[0][0]))]
    decoded, offsets = renderer.offsets(np.array(ids, dtype=np.int32))
    assert decoded == text
    assert len(ids) == len(text.encode()) == len(text) + 2
    phrase = len("that\u2019s not right") + 2
    assert DETECT(decoded, offsets).tolist() == [False] * 2 + [True] * phrase + [False] * 2
