"""Composite: the sum, the gates, what is correct, and the errors of its parts, against a naive twin."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.errors import ConfigError, PluginError
from retrain.rewards import composite
from retrain.rewards.composite import Composite, Part
from retrain.types import Score

ROOT = Path(__file__).resolve().parents[2]


class Fixed:
    """Gives the same scores to every group."""

    def __init__(self, *scores: Score, bounds=None, first_traceback="", code_digest=""):
        self.scores, self.bounds, self.closed = list(scores), bounds, 0
        self.first_traceback, self.code_digest = first_traceback, code_digest

    async def score(self, task, rollouts_G):
        return list(self.scores)

    def close(self):
        self.closed += 1


def one(score_all, *parts, **settings):
    return score_all(Composite(parts, **settings), "5", "text")[0]


def test_the_sum_is_weighted_and_the_parts_are_raw(score_all):
    got = one(
        score_all,
        Part("a", Fixed(Score(1.0, passed=True)), weight=2.0),
        Part("b", Fixed(Score(-0.5)), weight=0.5),
    )
    assert (got.reward, got.passed, dict(got.parts)) == (1.75, True, {"a": 1.0, "b": -0.5})


@pytest.mark.parametrize(
    ("score", "bounds", "fails"),
    [
        (Score(1.0), (0.0, 1.0), False),
        (Score(0.51), (0.0, 1.0), False),
        (Score(0.5), (0.0, 1.0), True),
        (Score(0.0), (0.0, 1.0), True),
        (Score(0.0), None, True),
        (Score(0.0), (-1.0, 0.0), False),
        (Score(-0.01), (-1.0, 0.0), True),
        (Score(0.1, passed=True), (0.0, 1.0), False),
        (Score(0.9, passed=False), (0.0, 1.0), True),
        (Score.failed("broke"), (0.0, 1.0), True),
    ],
)
def test_a_gate(score_all, score, bounds, fails):
    got = one(
        score_all,
        Part("gate", Fixed(score, bounds=bounds), gate=True),
        Part("main", Fixed(Score(3.0, passed=True))),
        penalty=-7.0,
    )
    assert not got.error
    assert (got.reward == -7.0) is fails
    assert got.passed is not fails
    assert ("gate" in got.parts) is not bool(score.error)


def test_a_gate_that_breaks_is_announced_once(score_all, caplog):
    reward = Composite([Part("gate", Fixed(Score.failed("no luck")), gate=True)], penalty=-1.0)
    for _ in range(3):
        score_all(reward, "5", "x")
    assert caplog.text.count("no luck") == 1


def test_an_error_of_another_part_fails_the_score_unless_a_gate_has_decided(score_all):
    broken = Part("b", Fixed(Score.failed("broke")))
    good, bad = (Part("g", Fixed(Score(v), bounds=(0.0, 1.0)), gate=True) for v in (1.0, 0.0))
    assert one(score_all, good, broken).error == "b: broke"
    assert one(score_all, bad, broken, penalty=-2.0).reward == -2.0


def test_an_error_of_a_part_of_weight_nothing_leaves_the_reward(score_all, caplog):
    broken = Part("b", Fixed(Score.failed("no luck")), weight=0.0)
    reward = Composite([Part("a", Fixed(Score(0.75, passed=True)), weight=2.0), broken])
    for _ in range(3):
        (got,) = score_all(reward, "5", "x")
        assert (got.error, got.reward, got.passed, dict(got.parts)) == ("", 1.5, True, {"a": 0.75})
    assert caplog.text.count("no luck") == 1
    reward.close()
    reward.close()
    assert caplog.text.count("times: b 3") == 1
    assert (
        one(score_all, Part("b", Fixed(Score.failed("no luck")), weight=0.0, gate=True), penalty=-2.0).reward
        == -2
    )


def test_what_a_part_consists_of_is_kept(score_all):
    inner = Fixed(Score(0.5, parts={"a": 1.0, "b": -0.5}))
    got = one(score_all, Part("a", Fixed(Score(3.0))), Part("mine", inner), Part("b", Fixed(Score(0.0))))
    assert dict(got.parts) == {"a": 3.0, "mine": 0.5, "mine/a": 1.0, "mine/b": -0.5, "b": 0.0}


def test_nothing_is_said_where_no_part_decides_or_a_number_does(score_all):
    decides, plain = Fixed(Score(1.0, passed=True)), Fixed(Score(1.0))
    assert one(score_all, Part("p", plain)).passed is None
    assert one(score_all, Part("p", plain, gate=True), penalty=1.0).passed is None
    assert one(score_all, Part("d", decides), Part("p", plain)).passed is True
    assert one(score_all, Part("d", decides), decided_by_number=True).passed is None
    wrong = Part("w", Fixed(Score(0.0, passed=False)))
    assert one(score_all, Part("d", decides), wrong).passed is False


def test_a_broken_rollout_keeps_its_error_and_a_short_answer_is_one(score_all, make_rollout):
    reward = Composite([Part("a", Fixed(Score(1.0), Score(1.0)))])
    got = score_all(reward, "5", make_rollout("", error="it broke"), "x")
    assert [s.error for s in got] == ["it broke", ""]
    assert "2 scores for 1 rollouts" in score_all(reward, "5", "x")[0].error


@st.composite
def parts_and_scores(draw):
    made = []
    for i in range(draw(st.integers(1, 4))):
        low, high = sorted(draw(st.tuples(st.floats(-2, 2), st.floats(-2, 2))))
        made.append(
            (
                Part(f"p{i}", Fixed(bounds=(low, high)), draw(st.floats(-3, 3)), draw(st.booleans())),
                Score(draw(st.floats(low, high)), draw(st.sampled_from([None, True, False]))),
            )
        )
    return made, draw(st.floats(-5, 5))


@given(parts_and_scores())
def test_the_reward_stays_in_its_bounds_and_equals_a_naive_twin(given):
    pairs, penalty = given
    reward = Composite([p for p, _ in pairs], penalty=penalty)
    got = reward._combine([s for _, s in pairs])
    low, high = reward.bounds
    assert low - 1e-9 <= got.reward <= high + 1e-9
    total, failed = np.float64(0), False
    for part, score in pairs:
        total += np.float64(part.weight) * score.reward
        limit_met = score.reward >= 0 if part.reward.bounds[1] <= 0 else score.reward > 0.5
        failed |= part.gate and not (limit_met if score.passed is None else score.passed)
    assert got.reward == pytest.approx(penalty if failed else float(total))
    said = [s.passed for _, s in pairs if s.passed is not None]
    assert got.passed is (None if not said else not failed and False not in said)


def test_bounds_digest_traceback_and_close():
    known, unknown = Fixed(bounds=(0.0, 1.0), code_digest="a"), Fixed(first_traceback="where")
    assert Composite([Part("a", known, -2.0), Part("b", known)]).bounds == (-2.0, 1.0)
    assert Composite([Part("a", known, gate=True)], penalty=-3.0).bounds == (-3.0, 1.0)
    both = Composite([Part("a", known), Part("b", unknown)])
    assert both.bounds is None
    assert both.first_traceback == "where"
    assert len(both.code_digest) == 16
    assert Composite([Part("a", known)]).code_digest == "a"
    assert Composite([Part("b", unknown)]).code_digest == ""
    both.close()
    both.close()
    assert known.closed == unknown.closed == 2


@pytest.fixture
def build(make_config, tmp_path, monkeypatch):
    (tmp_path / "composite_rewards.py").write_text(
        "from retrain.rewards.match import Match\n"
        "def tail(response, reference): return {'reward': 0.25, 'other': 3}\n"
        "def plugin(config, renderer): return Match()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(*parts, **reward):
        config = make_config(reward={"type": "composite", "parts": list(parts), **reward})
        made.append(composite.build(config, None))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def test_any_reward_and_any_constraint_can_be_a_part(build, score_all):
    reward = build(
        {"type": "math", "weight": 2.0},
        {"type": "match"},
        {"type": "custom", "name": "tail", "module": "composite_rewards", "function": "tail"},
        {"type": "composite_rewards.plugin", "name": "mine", "weight": 0.5},
        {"type": "length", "unit": "characters", "max": 12, "gate": True, "weight": 0.0},
        {"type": "penalize_text_containing", "name": "hedge", "texts": ["maybe"]},
        penalty=-1.0,
    )
    fine, wrong, long = score_all(reward, "5", r"\boxed{5.0}", r"maybe 6", r"maybe \boxed{5}")
    assert dict(fine.parts) == {
        "math": 1, "match": 0, "tail": 0.25, "tail/other": 3, "mine": 0, "length": 1, "hedge": 0,
    }  # fmt: skip
    assert (fine.reward, fine.passed) == (2.25, False)  # match and the plug-in decide as well
    assert (wrong.reward, wrong.passed) == (0.25 - 1.0, False)
    assert (long.reward, long.passed) == (-1.0, False)
    assert long.parts["length"] == 0.0
    assert long.parts["match"] == 1.0
    assert reward.bounds is None


@pytest.mark.parametrize(
    ("parts", "error", "said"),
    [
        ([], ConfigError, "has no parts"),
        ([{"type": "mth"}], ConfigError, r"reward.parts\[0\] \(mth\).*did you mean 'math'"),
        ([{"type": "lenght"}], ConfigError, "did you mean 'length'"),
        ([{"type": "composite"}], ConfigError, "no reward or constraint"),
        ([{"type": "routed"}], ConfigError, "no reward or constraint"),
        (
            [{"type": "match"}, {"type": "custom"}],
            ConfigError,
            r"reward.parts\[1\] \(custom\) needs a module",
        ),
        (
            [{"type": "custom", "module": "nowhere"}],
            ConfigError,
            r"parts\[0\].*module = 'nowhere'.*no module",
        ),
        ([{"type": "match", "pattern": "a"}], ConfigError, "pattern does nothing with type = 'match'"),
        ([{"type": "format", "boxed": True, "max": 3}], ConfigError, "max does nothing.*tags, boxed"),
        ([{"type": "regex", "pattern": "("}], ConfigError, "is no pattern"),
        ([{"type": "nowhere.at_all"}], PluginError, r"parts\[0\].*'nowhere'"),
    ],
)
def test_a_part_that_cannot_be_is_refused(build, parts, error, said):
    with pytest.raises(error, match=said) as caught:
        build(*parts)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [{"type": "overlong"}, {"type": "match", "name": "overlong"}])
def test_two_parts_overlong_are_refused(make_config, part):
    reward = {"type": "composite", "parts": [{"type": "length", "max": 9}, part]}
    composite.build(make_config(reward=reward), None).close()
    with pytest.raises(ConfigError, match=r'part overlong.*training\.truncated = "soft"'):
        composite.build(make_config(reward=reward, training={"truncated": "soft"}), None)


def test_parts_made_before_a_mistake_are_closed(build, monkeypatch):
    from retrain.rewards.sandbox import Sandbox

    closed = []
    close = Sandbox.close
    monkeypatch.setattr(Sandbox, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(ConfigError, match="limits nothing"):
        build({"type": "math"}, {"type": "length"})
    assert len(closed) == 1


def test_the_example_in_the_documentation_scores(score_all, make_config):
    page = (ROOT / "docs" / "rewards-and-data.md").read_text(encoding="utf-8")
    (block,) = [b.partition("\n```")[0] for b in page.split("```toml\n")[1:] if "[[reward.parts]]" in b]
    config = make_config(**tomllib.loads(block))
    reward = composite.build(config, None)
    try:
        right, wrong = score_all(
            reward, "5", r"<think>2 + 3</think> \boxed{\frac{10}{2}}", r"<think>2 + 3</think> \boxed{6}"
        )
        bare = score_all(reward, "5", r"\boxed{5}")[0]
        assert right.passed is True
        assert wrong.passed is False
        assert bare.passed is False
        assert right.reward > wrong.reward > bare.reward
        assert bare.reward == config.reward.penalty
        assert all(math.isfinite(v) for v in right.parts.values())
    finally:
        reward.close()
