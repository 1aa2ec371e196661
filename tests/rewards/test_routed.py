"""What a run uses: every source by its own reward, and the punishment of length after what is correct is decided."""

from __future__ import annotations

import pytest

from retrain import plugins
from retrain.errors import ConfigError, PluginError
from retrain.rewards import routed
from retrain.rewards.match import Match
from retrain.rewards.math import Math
from retrain.rewards.routed import Punished, Routed
from retrain.types import Score


class Fixed:
    bounds = (0.0, 1.0)

    def __init__(self, *scores: Score):
        self.scores, self.closed = list(scores), 0

    async def score(self, task, rollouts_G):
        return list(self.scores)

    def close(self):
        self.closed += 1


@pytest.fixture
def build(make_config):
    made = []

    def make(**sections):
        made.append(plugins.load("reward", "routed")(make_config(**sections), None))
        return made[-1]

    yield make
    for reward in made:
        for _ in range(2):
            getattr(reward, "close", lambda: None)()


def test_one_reward_for_all_is_that_reward_itself(build):
    assert isinstance(build(), Match)
    assert isinstance(build(reward={"type": "math"}), Math)


MIXTURE = [
    {"source": "arithmetic"},
    {"source": "gsm8k", "name": "words", "reward": "math"},
    {"source": "math", "reward": "math"},
]


def test_a_source_is_scored_by_the_reward_it_names(build, score_all):
    reward = build(
        data={"source": "mixture", "mixture": MIXTURE},
        eval={"suites": [{"source": "math", "name": "hard", "reward": "math"}]},
    )
    passed = {
        label: score_all(reward, "5", r"\boxed{5.0}", source=label)[0].passed
        for label in ("arithmetic", "words", "math", "hard", "elsewhere")
    }
    assert passed == {"arithmetic": False, "words": True, "math": True, "hard": True, "elsewhere": False}
    assert reward.bounds == (0.0, 1.0)
    assert len(reward.code_digest) == 16
    assert reward.first_traceback == ""
    assert len(reward._all) == 2


def test_all_are_closed_once():
    a, b = Fixed(), Fixed()
    Routed(a, {"x": b, "y": b, "z": a}).close()
    assert (a.closed, b.closed) == (1, 1)


@pytest.mark.parametrize(
    ("sections", "error", "said"),
    [
        (
            {"data": {"source": "mixture", "mixture": [{"source": "gsm8k", "reward": "custom"}]}},
            ConfigError,
            r"data.mixture \(gsm8k\): reward = 'custom' cannot",
        ),
        (
            {"data": {"source": "gsm8k"}, "eval": {"suites": [{"source": "gsm8k", "reward": "math"}]}},
            ConfigError,
            "data.source and eval.suites call a source 'gsm8k' each, with the rewards 'match' and 'math'",
        ),
        (
            {
                "data": {"source": "mixture", "mixture": MIXTURE},
                "eval": {"suites": [{"source": "gsm8k", "name": "words"}]},
            },
            ConfigError,
            "data.mixture and eval.suites call a source 'words'",
        ),
        ({"reward": {"type": "nowhere.at_all"}}, PluginError, "'nowhere'"),
        (
            {"training": {"truncated": "soft", "soft_tokens": 33}},
            ConfigError,
            "training.soft_tokens = 33 is more than training.max_tokens = 32",
        ),
    ],
)
def test_what_cannot_be_routed_is_refused(build, sections, error, said):
    with pytest.raises(error, match=said) as caught:
        build(**sections)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_a_reward_of_ones_own_by_its_dotted_path(build, score_all, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "from retrain.types import Score\n"
        "class Own:\n"
        "    async def score(self, task, rollouts_G): return [Score(0.75) for _ in rollouts_G]\n"
        "def build(config, renderer): return Own()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (got,) = score_all(build(reward={"type": "own_rewards.build"}), "5", "x")
    assert got.reward == 0.75
    mixture = [{"source": "gsm8k", "reward": "own_rewards:build"}]
    reward = build(data={"source": "mixture", "mixture": mixture})
    assert score_all(reward, "5", "x", source="gsm8k")[0].reward == 0.75
    assert reward.bounds is None
    reward.close()


class Wide(Fixed):
    bounds = (-1.0, 2.0)


class Silent(Fixed):
    bounds = None


@pytest.mark.parametrize(
    ("training", "bounds"),
    [
        ([Fixed()], (0.0, 1.0)),
        ([Fixed(), Wide()], (-1.0, 2.0)),
        ([Silent(), Wide()], (-1.0, 2.0)),
        ([Silent()], None),
    ],
)
def test_bounds_are_what_is_known_of_training_rewards(training, bounds):
    assert Routed(Wide(), {"held out": Wide()}, training).bounds == bounds


def test_a_default_that_only_evaluations_use_has_no_say_in_the_bounds(build):
    parts = {"type": "composite", "parts": [{"type": "match", "weight": 2.0}]}
    own = {"source": "mixture", "mixture": [{"source": "gsm8k", "reward": "math"}]}
    assert build(data=own, reward=parts, eval={"source": "arithmetic"}).bounds == (0.0, 1.0)
    mixed = {"source": "mixture", "mixture": [*own["mixture"], {"source": "arithmetic"}]}
    assert build(data=mixed, reward=parts).bounds == (0.0, 2.0)
    suites = [{"source": "gsm8k", "name": "words", "reward": "math"}]
    assert build(reward=parts, eval={"suites": suites}).bounds == (0.0, 2.0)


def test_the_soft_punishment_is_a_part_and_comes_after_what_is_correct(build, score_all, make_rollout):
    reward = build(training={"truncated": "soft", "max_tokens": 20, "soft_tokens": 10})
    texts = [r"\boxed{5}", r"\boxed{5}", r"\boxed{5}", "no"]
    rollouts = [make_rollout(t, tokens=n) for t, n in zip(texts, (10, 15, 20, 20), strict=True)]
    got = score_all(reward, "5", *rollouts, make_rollout("", error="it broke"))
    assert [s.reward for s in got[:4]] == pytest.approx([1.0, 0.5, 0.0, -1.0])
    assert [s.passed for s in got[:4]] == [True, True, True, False]
    assert [dict(s.parts) for s in got[:4]] == [{"overlong": v} for v in (0.0, -0.5, -1.0, -1.0)]
    assert got[4].error == "it broke"
    assert reward.bounds == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("score", "correct_at", "passed"),
    [
        (Score(0.6), None, True),
        (Score(0.5), None, False),
        (Score(3.0), None, None),
        (Score(-0.1), None, None),
        (Score(3.0), 2.0, True),
        (Score(2.0), 2.0, False),
        (Score(0.0, passed=True), 2.0, True),
    ],
)
def test_what_is_correct_is_decided_before(score_all, make_rollout, score, correct_at, passed):
    from retrain.algorithms.credit import correct

    reward = Punished(Fixed(score), max_tokens=10, cache=10, correct_at=correct_at)
    (got,) = score_all(reward, "5", make_rollout("x", tokens=10))
    assert got.reward == score.reward - 1.0
    assert got.passed is passed is correct(score, correct_at)


def test_errors_are_not_punished(score_all):
    reward = Punished(Fixed(Score.failed("no")), max_tokens=10, cache=10, correct_at=None)
    assert score_all(reward, "5", "x")[0].error == "no"
    assert routed.bounds_of(reward) == (-1.0, 1.0)
