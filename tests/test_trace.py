"""The length trace: its distribution, that it depends on nothing but its key, and what a group of it looks like."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain import plugins
from retrain.algorithms.credit import has_signal
from retrain.engines.noise import uniforms
from retrain.environments.single_turn import SingleTurn
from retrain.errors import PluginError, RetrainError, UsageError
from retrain.fakes import FakeBackend, FakeEngine, FakeRenderer
from retrain.trace import (
    CoinReward,
    Flat,
    Lognormal,
    Recorded,
    TracedEnvironment,
    TracedTasks,
    coin,
    longest_of,
    parse,
)
from retrain.types import NoiseKey, Rollout, Sampling, ScoredGroup

SAMPLING = Sampling(1.0, 1.0, 4, (0,), ("7",), True, NoiseKey(seed=3, step=2, task=0))


def attempt(environment, task, n, sampling=SAMPLING, *, member=0):
    engine = FakeEngine()
    engine.load(FakeBackend(positions=64).publish())
    noise = replace(sampling.noise, task=task.draw, member=member)
    return asyncio.run(environment.attempt(task, n, engine, replace(sampling, noise=noise)))


@pytest.mark.parametrize(("scale", "seed"), [(1.0, 0), (1.0, 7), (0.1, 0)])
def test_the_lognormal_has_the_median_and_the_95th_percentile_that_were_asked_for(scale, seed):
    trace = Lognormal(median=700, p95=2048, cap=10**6, seed=seed, scale=scale)
    lengths = np.array([trace(d, m) for d in range(1500) for m in range(8)])
    # 12,000 draws: standard errors are 0.75 % of the median and 1.3 % of the 95th percentile.
    assert np.median(lengths) == pytest.approx(700 * scale, rel=0.03)
    assert np.quantile(lengths, 0.95) == pytest.approx(2048 * scale, rel=0.05)
    assert lengths.min() >= 1


def test_the_cap_holds_and_is_met():
    trace = parse("lognormal:median=100,p95=300,cap=400,scale=0.5")
    lengths = [trace(d, 0) for d in range(2000)]
    assert max(lengths) == 200 == longest_of(trace, 1, 1)
    assert parse("lognormal:median=100,p95=300").longest == 600


@given(st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 2**31))
def test_a_length_depends_on_draw_member_and_seed_alone(draw, member, seed):
    assert Lognormal(seed=seed)(draw, member) == Lognormal(seed=seed)(draw, member)


def test_lengths_of_members_draws_and_seeds_are_unrelated():
    streams = [
        [Lognormal(seed=0)(d, 0) for d in range(4000)],
        [Lognormal(seed=0)(d, 1) for d in range(4000)],
        [Lognormal(seed=0)(d + 1, 0) for d in range(4000)],
        [Lognormal(seed=1)(d, 0) for d in range(4000)],
    ]
    correlation = np.corrcoef(np.log(streams)) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


def test_known_lengths_stay_as_they_are():
    # Peers store results under this trace: another sequence would be another experiment.
    trace = Lognormal()
    assert [[trace(d, m) for m in range(4)] for d in range(2)] == [
        [363, 865, 1040, 808],
        [659, 591, 680, 438],
    ]


def test_texts_name_traces(tmp_path):
    file = tmp_path / "a, b.jsonl"
    file.write_text("3\n\n5\n8\n")
    assert parse("lognormal:median=700,p95=2048,cap=4096") == Lognormal(700, 2048, 4096)
    assert parse("lognormal") == Lognormal()
    assert parse("flat:128") == Flat(128)
    assert parse("flat:length=128,scale=0.5") == Flat(64)
    assert parse(f"file:{file},group=2") == Recorded((3, 5, 8), group=2)
    recorded = parse(f"file:{file},group=2")
    assert [recorded(d, m) for d in range(3) for m in range(2)] == [3, 5, 8, 3, 5, 8]


def test_a_function_of_ones_own_is_a_trace(tmp_path):
    (tmp_path / "own_lengths.py").write_text(
        "def twice(draw, member):\n    return 2 * draw + member + 1\n"
        "def nothing(draw, member):\n    return 1 - draw\n"
        "def broken(draw, member):\n    return 1 // 0\n"
        "def unary(draw):\n    return 1\n"
    )
    plugins.add_search_paths([tmp_path])
    assert parse("own_lengths:twice")(3, 1) == 8
    assert longest_of(parse("own_lengths:twice"), draws=3, group_size=2) == 6
    with pytest.raises(PluginError, match=r"returned 0 for draw 1, member 2"):
        parse("own_lengths:nothing")(1, 2)
    with pytest.raises(PluginError, match=r"ZeroDivisionError.*own_lengths.py:6"):
        parse("own_lengths.broken")
    with pytest.raises(PluginError, match="takes 1 positional argument but 2"):
        parse("own_lengths:unary")
    with pytest.raises(PluginError, match="is not installed"):
        parse("no_such_lengths:twice")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lognormal:median=x", "median = 'x' is not a number"),
        ("lognormal:median=nan", "not finite"),
        ("lognormal:median=900,p95=800", "p95 = 800 must be above median = 900"),
        ("lognormal:mode=3", "'mode=3' is not one of its settings"),
        ("lognormal:cap=1.5", "not a whole number"),
        ("lognormal:seed=1,seed=2", "given twice"),
        ("lognormal:scale=0", "scale = 0"),
        ("flat:0", "at least 1"),
        ("flat:0,scale=0.5", "at least 1"),
        ("flat:-3", "'-3' is not one of its settings"),
        ("lognormal:p95=1e308", "p95 = 1e+308 is more than 2147483648 tokens"),
        ("lognormal:median=1e300,p95=1e308", "p95 = 1e+308 is more than"),
        ("lognormal:scale=1e308", "scale = 1e+308 must be above 0 and at most 1e+06"),
        (f"lognormal:cap={10**400}", "cap must be a number of tokens up to 2**31"),
        (f"lognormal:seed={2**63}", "seed must fit into 64 bits"),
        ("flat:2,scale=1e308", "scale = 1e+308"),
        ("flat:2000000000,scale=1e6", "more than 2147483648 tokens"),
        (f"flat:{10**400},scale=2", "more than 2147483648 tokens"),
        ("file:/no/such/file", "cannot be read"),
        ("file:", "no file is named"),
        ("file: ,group=2", "no file is named"),
        ("normal", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_wrong_text_is_one_line_with_a_fix(text, part):
    with pytest.raises(RetrainError) as caught:
        parse(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_the_largest_lengths_that_may_be_asked_for_can_be_computed():
    for text in ("lognormal:median=1,p95=2147483648,scale=1e6", "lognormal:median=2147483647,p95=2147483648"):
        trace = parse(text)
        assert all(1 <= trace(d, m) <= trace.longest for d in range(200) for m in range(8))


def test_a_wrong_line_of_a_file_is_named(tmp_path):
    file = tmp_path / "lengths"
    for text, part in (
        ("4\nfive\n", ":2: 'five'"),
        ("0\n", ":1: '0'"),
        ("true\n", ":1:"),
        ("4\n" + "9" * 5000 + "\n", ":2: '999"),
        ("1" + "0" * 400 + "\n", ":1: '1000"),
        ("[" * 100000 + "\n", ":1:"),
        ("\n", "is empty"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=part):
            parse(f"file:{file}")


def test_completions_have_the_forced_lengths_and_ignore_every_end():
    trace = Lognormal(median=8, p95=30, cap=60)
    environment = TracedEnvironment(FakeRenderer(), trace)
    tasks = TracedTasks(5, vocab_size=40).take(12)
    seen_end = 0
    for task in tasks:
        rollouts = attempt(environment, task, 4)
        assert [r.num_sampled for r in rollouts] == [trace(task.draw, m) for m in range(4)]
        for r in rollouts:
            assert r.stop == "length"
            assert not r.error
            np.testing.assert_array_equal(r.token_ids_T[:5], task.info["prompt_ids"])
            seen_end += bool((r.token_ids_T[5:-1] == 0).any())
    assert seen_end  # an end token was sampled somewhere and did not end


def test_a_member_is_what_a_plain_environment_samples_under_the_same_noise():
    """One request per member instead of one per group: same tokens, same assembly."""
    renderer = FakeRenderer()
    task = TracedTasks(9, renderer=renderer).take(3)[2]
    plain = attempt(SingleTurn(renderer), task, 3, replace(SAMPLING, max_tokens=6, stop_ids=(), stop=()))
    traced = attempt(TracedEnvironment(renderer, Flat(6)), task, 3)
    for a, b in zip(plain, traced, strict=True):
        for name in ("token_ids_T", "sampled_T", "logprobs_T", "entropies_T"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for name in ("task_id", "member", "text", "stop", "weights_version", "error"):
            assert getattr(a, name) == getattr(b, name)
    # Members 1.. alone are the same members.
    assert [
        r.token_ids_T.tolist() for r in attempt(TracedEnvironment(renderer, Flat(6)), task, 2, member=1)
    ] == [r.token_ids_T.tolist() for r in traced[1:]]
    assert not np.array_equal(uniforms(SAMPLING.noise, 2, 6)[0], uniforms(SAMPLING.noise, 2, 6)[1])


def test_without_a_renderer_texts_are_empty_and_a_task_needs_ids():
    ids, words = TracedTasks(5, vocab_size=40).take(1)[0], TracedTasks(5, renderer=FakeRenderer()).take(1)[0]
    assert attempt(TracedEnvironment(None, Flat(3)), ids, 1)[0].text == ""
    assert "no renderer" in attempt(TracedEnvironment(None, Flat(3)), words, 1)[0].error


@pytest.mark.parametrize("group_size", [2, 3, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_every_second_group_trains_and_coins_are_fair(group_size, seed):
    reward, tasks = CoinReward(seed), TracedTasks(4, vocab_size=40).take(1000)
    sides: list[float] = []
    for task in tasks:
        rollouts = [
            Rollout(
                task.id,
                m,
                np.zeros(2, np.int32),
                np.array([False, True]),
                np.zeros(2, np.float32),
                None,
                "",
                "length",
                0,
            )
            for m in range(group_size)
        ]
        scores = asyncio.run(reward.score(task, rollouts))
        trains = has_signal(ScoredGroup(task, tuple(rollouts), tuple(scores)))
        assert trains == ((task.draw + seed) % 2 == 0)
        assert [s.reward for s in scores] == [coin(task.draw, m, seed) for m in range(group_size)]
        sides += [s.reward for s in scores]
    # Groups that do not train count as one coin, so the variance is at most that of 1,000 coins.
    assert abs(np.mean(sides) - 0.5) < 5 * 0.5 / np.sqrt(1000)


def test_a_broken_rollout_stays_an_error():
    environment = TracedEnvironment(None, Flat(3))
    task = TracedTasks(5, renderer=FakeRenderer()).take(1)[0]
    scores = asyncio.run(CoinReward().score(task, attempt(environment, task, 2)))
    assert all(s.error for s in scores)


def test_prompts_have_exactly_the_length_and_differ_by_draw():
    renderer = FakeRenderer()
    for tasks in (TracedTasks(37, vocab_size=40), TracedTasks(37, renderer=renderer)):
        made = tasks.take(3)
        ids = [t.info.get("prompt_ids", renderer.encode(t.messages)) for t in made]
        assert {len(i) for i in ids} == {37}
        assert len({i.tobytes() for i in ids}) == 3
        assert [t.draw for t in made] == [0, 1, 2]
        state = tasks.state_dict()
        again = tasks.take(1)[0]
        tasks.load_state_dict(state)
        assert tasks.take(1)[0].messages == again.messages
        assert tasks.take(1)[0].draw == 4
    with pytest.raises(UsageError, match="0 tokens"):
        TracedTasks(0, vocab_size=4)


class Templated(FakeRenderer):
    """Ten tokens of template, and three digits a token, as some tokenizers have them."""

    def encode(self, messages):
        return np.zeros(10 + -(-len(messages[0].content) // 3), dtype=np.int32)


def test_prompts_meet_a_length_behind_a_template_and_a_merging_tokenizer():
    for tokens in (11, 12, 100, 257):
        assert (
            len(Templated().encode(TracedTasks(tokens, renderer=Templated()).take(1)[0].messages)) == tokens
        )
    with pytest.raises(UsageError, match="the template alone has about 10"):
        TracedTasks(9, renderer=Templated()).take(1)
