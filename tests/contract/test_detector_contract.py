"""Every planning detector of the plug-in table: made from phrases, one bool per token, exact on overlaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retrain import plugins
from retrain.protocols import Detector

TEXT = "We add 12 and 30. Wait, let me check that. The sum is 42."
WORDS = [
    (0, 2),
    (2, 6),
    (6, 9),
    (9, 13),
    (13, 16),
    (16, 17),
    (17, 22),
    (22, 23),
    (23, 27),
    (27, 30),
    (30, 36),
    (36, 41),
]


@pytest.fixture(params=list(plugins.TABLE["detector"]))
def detector(request: pytest.FixtureRequest) -> Any:
    return plugins.load("detector", request.param)(("wait let me", "let me check"))


def test_it_is_a_detector(detector: Any) -> None:
    assert isinstance(detector, Detector)


def test_one_bool_per_token(detector: Any) -> None:
    got = detector(TEXT, WORDS)
    assert got.dtype == np.bool_
    assert got.shape == (len(WORDS),)


def test_planning_is_found_and_the_rest_is_not(detector: Any) -> None:
    got = detector(TEXT, WORDS)
    assert got[6:11].all()
    assert not got[:6].any()


def test_tokens_without_width_are_never_marked(detector: Any) -> None:
    offsets = [(i, i) for i in range(len(TEXT) + 1)]
    assert not detector(TEXT, offsets).any()


def test_nothing_to_look_at(detector: Any) -> None:
    assert detector("", []).shape == (0,)
    assert detector(TEXT, []).shape == (0,)
    assert not detector("", [(0, 0)]).any()


def test_the_same_text_gets_the_same_marks(detector: Any) -> None:
    np.testing.assert_array_equal(detector(TEXT, WORDS), detector(TEXT, WORDS))
