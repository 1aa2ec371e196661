"""Continuous batching: whoever joins, leaves, waits, is parked or goes on from a parked row samples what it would alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from retrain.backends import local
from retrain.engines import torch_engine
from retrain.errors import EngineError
from retrain.memory import MemoryPlan
from retrain.renderer import load_renderer
from retrain.types import NoiseKey, Sampling

torch.set_num_threads(1)

PLAN = MemoryPlan(100_000, 1000, 8192, 1024, False)


def sampling(**changes):
    return replace(Sampling(1.0, 1.0, 24, (1,), (), True, NoiseKey(7, 3, 0)), **changes)


def same(a, b, atol=1e-5):
    np.testing.assert_array_equal(a.token_ids_T, b.token_ids_T)
    np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=atol)
    np.testing.assert_allclose(a.entropies_T, b.entropies_T, atol=10 * atol)
    assert a.stop == b.stop


@pytest.fixture(scope="module")
def backend(make_config, random_model):
    config = make_config(model={"model": str(random_model(scale=1.5, heads=4, kv_heads=2)), "lora_rank": 4})
    made = local.build(config, load_renderer(config.model.model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.policy.adapter.items():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    made._version += 1
    return made


@pytest.fixture
def fresh(backend, make_config):
    """A maker of loaded engines over one backend."""
    made = []

    def make(plan=PLAN, static=None, **inference):
        config = make_config(inference=inference)
        engine = torch_engine.build(config, load_renderer("retrain/tiny"))
        engine._plan, engine.static = plan, static
        engine.load(backend.publish())
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def generate(engine, requests):
    async def go():
        return await asyncio.gather(*(engine.generate(np.asarray(p, np.int32), n, s) for p, n, s in requests))

    return asyncio.run(go())


def requests(count, *, seed=0, lengths=(3, 40), tokens=(1, 40), n=2):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(2, 250, int(rng.integers(*lengths))).tolist(),
            n,
            sampling(max_tokens=int(rng.integers(*tokens)), noise=NoiseKey(7, 3, i), temperature=(0.8, 1.0)[i % 2]),
        )
        for i in range(count)
    ]  # fmt: skip


def conversation(engine, prompt, turns, draw, *, extended=True, answer=(40, 41, 42), tokens=12):
    """Turns that answer at once: every completion and the tokens of the answer make the next prompt."""

    async def go():
        ids, position, got = np.asarray(prompt, np.int32), 0, []
        for turn in range(turns):
            asked = sampling(
                max_tokens=tokens + draw % 3, stop_ids=(), noise=NoiseKey(7, 3, draw, position=position),
                extended=extended and turn + 1 < turns,
            )  # fmt: skip
            [completion] = await engine.generate(ids, 1, asked)
            got.append(completion)
            position += len(completion.token_ids_T)
            ids = np.concatenate([ids, completion.token_ids_T, np.asarray(answer, np.int32)])
        return got

    return go()


def talk(engine, count=5, turns=3, **how):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(2, 250, 20 + 3 * i).tolist() for i in range(count)]

    async def go():
        return await asyncio.gather(
            *(conversation(engine, p, turns, i, **how) for i, p in enumerate(prompts))
        )

    return [c for row in asyncio.run(go()) for c in row]


@pytest.mark.parametrize("static", [False, True])
def test_rows_join_and_leave_a_running_batch_and_sample_what_they_would_alone(fresh, static):
    engine, alone = fresh(static=static), fresh()
    asked = requests(9)
    late = requests(4, seed=5)

    async def go():
        async def then(first, second):
            one = await engine.generate(np.asarray(first[0], np.int32), first[1], first[2])
            return one, await engine.generate(np.asarray(second[0], np.int32), second[1], second[2])

        pairs = [then(a, b) for a, b in zip(asked, late, strict=False)]
        rest = [engine.generate(np.asarray(p, np.int32), n, s) for p, n, s in asked[len(late) :]]
        return await asyncio.gather(*pairs), await asyncio.gather(*rest)

    async def all_at_once():
        got = asyncio.ensure_future(go())
        return await got

    pairs, rest = asyncio.run(all_at_once())
    together = [*(a for a, _ in pairs), *rest, *(b for _, b in pairs)]
    steps = engine.timings["decode_steps"]
    for group, request in zip(together, [*asked, *late], strict=True):
        for a, b in zip(group, generate(alone, [request])[0], strict=True):
            same(a, b)
    assert engine.timings["decode_tokens"] == alone.timings["decode_tokens"]
    assert steps < 0.5 * alone.timings["decode_steps"]


def test_a_request_joins_while_others_are_sampled(fresh):
    engine = fresh()
    order = []

    async def ask(name, tokens, then=None):
        await engine.generate(
            np.array([5, 9, 30], np.int32),
            1,
            sampling(max_tokens=tokens, stop_ids=(), noise=NoiseKey(7, 3, tokens)),
        )
        order.append(name)
        if then:
            await then

    async def go():
        await asyncio.gather(ask("long", 60), ask("short", 5, ask("joined", 6)))

    asyncio.run(go())
    assert order == ["short", "joined", "long"]
    # The long row alone decides the number of steps: the joined one rode along.
    assert engine.timings["decode_steps"] == 59


@pytest.mark.parametrize("static", [False, True])
def test_a_small_bound_makes_requests_wait_and_changes_no_sample(fresh, static):
    asked = requests(7, n=3)
    free = generate(fresh(), asked)
    tight = fresh(plan=replace(PLAN, kv_tokens=4 * 128), static=static)
    for a, b in zip(free, generate(tight, asked), strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    backend_layers, bytes_a_token = 2, 2 * 2 * 32 * 4
    assert 0 < tight.kv_peak <= 4 * 128 * backend_layers * bytes_a_token


def test_a_request_beyond_the_bound_is_sampled_on_its_own(fresh):
    engine = fresh(plan=replace(PLAN, kv_tokens=8, sample_rows=1))
    asked = requests(2, n=2)
    for a, b in zip(generate(fresh(), asked), generate(engine, asked), strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)


def test_memory_is_given_back_when_nothing_is_sampled(fresh):
    engine = fresh()
    generate(engine, requests(4))
    assert engine.kv_bytes == 0
    assert engine.kv_peak > 0
    assert engine._batch is None
    assert (engine.asked, engine.finished) == (8, 8)


def test_a_group_and_equal_prompts_are_computed_once(fresh):
    engine = fresh()
    prompt = list(range(10, 30))
    together = generate(engine, [(prompt, 1, sampling(noise=NoiseKey(7, 3, 0, member=i))) for i in range(4)])
    assert engine.timings["prefill_tokens"] == 20
    group = generate(engine, [(prompt, 4, sampling())])[0]
    assert engine.timings["prefill_tokens"] == 40
    for [a], b in zip(together, group, strict=True):
        same(a, b)


def test_members_that_join_later_start_from_a_live_one(fresh):
    engine, free = fresh(max_rows=3), fresh()
    prompt = list(range(10, 40))
    asked = [(prompt, 8, sampling(stop_ids=(1, 7, 9, 30, 50, 70, 90)))]
    for a, b in zip(generate(engine, asked)[0], generate(free, asked)[0], strict=True):
        same(a, b)
    assert engine.timings["prefill_tokens"] < 3 * 30


def test_a_common_beginning_is_computed_once(fresh):
    system = np.random.default_rng(0).integers(2, 250, 100).tolist()
    asked = [([*system, 60 + i, *range(70, 75 + i)], 2, sampling(noise=NoiseKey(7, 3, i))) for i in range(4)]
    asked.append(([8, 9, 10], 2, sampling(noise=NoiseKey(7, 3, 9))))
    engine, plain = fresh(), fresh(prefix_caching=False)
    for a, b in zip(generate(engine, asked), generate(plain, asked), strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    rest = sum(len(p) - 100 for p, _, _ in asked[:4]) + 3
    assert engine.timings["prefill_tokens"] == 100 + rest
    assert plain.timings["prefill_tokens"] == 2 * (400 + rest)


def test_a_long_prompt_is_computed_in_pieces(fresh):
    asked = requests(5, lengths=(30, 90))
    pieces = fresh(plan=replace(PLAN, prefill_tokens=16))
    for a, b in zip(generate(fresh(), asked), generate(pieces, asked), strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)


@pytest.mark.parametrize("static", [False, True])
def test_a_later_turn_computes_only_what_is_new(fresh, static):
    parked, anew = fresh(static=static), fresh()
    for a, b in zip(talk(parked), talk(anew, extended=False), strict=True):
        same(a, b)
    prompts = sum(20 + 3 * i for i in range(5))
    # Every later turn: the last token of the turn before, whose keys were never needed, and the answer.
    assert parked.timings["prefill_tokens"] == prompts + 2 * 5 * 4
    assert anew.timings["prefill_tokens"] > 3 * prompts
    assert parked._parked.tokens == 0
    assert parked.kv_bytes == 0


def test_parked_rows_are_bounded_and_are_given_back_when_asked_and_with_their_weights(fresh, backend):
    engine = fresh(plan=replace(PLAN, kv_tokens=4 * 128))
    for a, b in zip(talk(engine, count=12), talk(fresh(), count=12, extended=False), strict=True):
        same(a, b)
    assert engine.kv_peak <= 4 * 128 * 2 * 2 * 2 * 32 * 4
    asked = [(list(range(10, 30)), 2, sampling(extended=True))]
    generate(engine, asked)
    assert engine.kv_bytes > 0
    # What the training loop calls before the learner runs.
    engine.release()
    assert engine.kv_bytes == engine._parked.tokens == 0
    [again] = generate(engine, asked)
    assert len(again) == 2
    assert engine.kv_bytes > 0
    engine.load(backend.publish())
    assert engine.kv_bytes == 0


def test_two_runs_of_conversations_are_byte_equal(fresh):
    runs = [talk(fresh(plan=replace(PLAN, kv_tokens=6 * 128)), count=9) for _ in range(3)]
    first = [(c.token_ids_T.tobytes(), c.logprobs_T.tobytes(), c.entropies_T.tobytes()) for c in runs[0]]
    for run in runs[1:]:
        assert first == [
            (c.token_ids_T.tobytes(), c.logprobs_T.tobytes(), c.entropies_T.tobytes()) for c in run
        ]


def test_what_a_batch_is_made_of_does_not_depend_on_when_turns_of_the_loop_come(fresh):
    """The second wave asks a few turns of the loop after the first, and the third after a result: steps stay the same."""
    counts = []
    for _ in range(3):
        engine = fresh()

        async def late(i, engine=engine):
            for _ in range(i):
                await asyncio.sleep(0)
            s = sampling(max_tokens=5 + i, stop_ids=(), noise=NoiseKey(7, 3, i))
            await engine.generate(np.array([5, 9, 30 + i], np.int32), 1, s)
            for _ in range(i):
                await asyncio.sleep(0)
            return await engine.generate(np.array([6, 9, 30 + i], np.int32), 1, s)

        async def go(late=late):
            return await asyncio.gather(*(late(i) for i in range(4)))

        got = asyncio.run(go())
        counts.append((engine.timings["decode_steps"], [c.logprobs_T.tobytes() for [c] in got]))
    assert counts[0] == counts[1] == counts[2]
    # Lengths 5..8 twice, each second one joining at the step after its first: no step is spent on one row's wait.
    assert counts[0][0] <= 2 * 8


def test_an_error_reaches_every_request_and_the_engine_goes_on(fresh):
    engine = fresh()

    async def go():
        good = [
            engine.generate(np.array([5, 9], np.int32), 2, sampling(noise=NoiseKey(7, 3, i)))
            for i in range(3)
        ]
        bad = engine.generate(np.array([10**6], np.int32), 1, sampling())
        return await asyncio.gather(*good, bad, return_exceptions=True)

    assert [type(e) for e in asyncio.run(go())] == [IndexError] * 4
    assert engine.kv_bytes == 0
    assert len(generate(engine, requests(1))[0]) == 2


def test_a_deadline_takes_its_rows_out_and_leaves_the_engine_usable(fresh, backend):
    engine = fresh()
    expected = generate(fresh(), requests(2))

    async def go():
        endless = engine.generate(np.array([5, 9], np.int32), 2, sampling(max_tokens=3000, stop_ids=()))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await endless
        return await asyncio.gather(
            *(engine.generate(np.asarray(p, np.int32), n, s) for p, n, s in requests(2))
        )

    for a, b in zip(asyncio.run(go()), expected, strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    assert engine.timings["decode_steps"] < 2900
    engine.load(backend.publish())
    assert engine.kv_bytes == 0


def test_weights_are_not_changed_under_rows_that_are_being_sampled(fresh, backend, monkeypatch):
    engine = fresh()
    monkeypatch.setattr(torch_engine, "_BUSY_S", 0.05)

    async def go():
        task = asyncio.ensure_future(
            engine.generate(np.array([5, 9], np.int32), 2, sampling(max_tokens=2000, stop_ids=()))
        )
        await asyncio.sleep(0.1)
        with pytest.raises(EngineError, match="while the engine was sampling"):
            engine.load(backend.publish())
        task.cancel()

    asyncio.run(go())


def test_closing_fails_what_is_being_sampled(fresh):
    engine = fresh()

    async def go():
        task = asyncio.ensure_future(
            engine.generate(np.array([5, 9], np.int32), 1, sampling(max_tokens=3000, stop_ids=()))
        )
        await asyncio.sleep(0.1)
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            await task
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(np.array([5, 9], np.int32), 1, sampling())

    asyncio.run(go())


def test_an_eight_bit_cache_stays_near(fresh, backend):
    exact, rough = fresh(), fresh(kv_cache_dtype="fp8")
    asked = [([5, 9, 30, 11], 16, sampling(max_tokens=30, stop_ids=()))]
    for turn in range(2):
        for a in generate(rough, asked)[0]:
            ids = np.array([*asked[0][0], *a.token_ids_T], np.int32)
            with backend.policy.mode("adapter"):
                scored = backend.policy.sequence_logprobs(ids).numpy()[len(asked[0][0]) - 1 :]
            gap = np.abs(scored - a.logprobs_T)
            assert gap[1:].mean() < 0.1
            if not turn:
                assert gap[0] < 1e-5  # drawn from the prompt's own pass, which reads nothing back
        asked = [(p * 5, n, s) for p, n, s in asked]
    generate(exact, asked)
    assert rough.kv_peak < 0.4 * exact.kv_peak


def test_top_p_and_stop_texts_hold_for_their_own_rows_only(fresh):
    asked = requests(6, tokens=(20, 30))
    mixed = [
        (p, n, replace(s, top_p=(1.0, 0.6)[i % 2], stop=((), ("a", "e"))[i % 3 == 0], want_entropy=True))
        for i, (p, n, s) in enumerate(asked)
    ]
    together, alone = generate(fresh(), mixed), fresh()
    for group, request in zip(together, mixed, strict=True):
        for a, b in zip(group, generate(alone, [request])[0], strict=True):
            same(a, b)
    assert any(c.stop == "stop" for c in together[0])
