"""The in-process sampler: the distribution it draws from, what it reports, and what it must not depend on."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from retrain.backends import local
from retrain.engines import torch_engine
from retrain.errors import EngineError, OutOfMemory
from retrain.renderer import load_renderer
from retrain.types import NoiseKey, Sampling

torch.set_num_threads(1)


def sampling(**changes):
    return replace(Sampling(1.0, 1.0, 24, (1,), (), True, NoiseKey(7, 3, 0)), **changes)


def pair(make_config, **sections):
    config = make_config(**sections)
    renderer = load_renderer(config.model.model)
    backend = local.build(config, renderer)
    engine = torch_engine.build(config, renderer)
    return config, renderer, backend, engine


def shake(backend, scale=0.05, seed=0):
    """Give the adapter weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in backend.policy.adapter.items():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    backend._version += 1


def generate(engine, requests):
    async def go():
        return await asyncio.gather(*(engine.generate(np.asarray(p, np.int32), n, s) for p, n, s in requests))

    return asyncio.run(go())


@pytest.fixture
def ready(make_config, random_model):
    model = str(random_model(scale=2.0))
    _, renderer, backend, engine = pair(make_config, model={"model": model, "lora_rank": 4})
    shake(backend)
    engine.load(backend.publish())
    yield backend, engine, renderer
    engine.close()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_and_entropies_equal_a_plain_float64_forward(ready, temperature):
    backend, engine, _ = ready
    prompt = [5, 9, 30, 11]
    got = generate(engine, [(prompt, 5, sampling(temperature=temperature))])[0]
    policy = backend.policy
    policy.model.set_attn_implementation("eager")  # the model's own pass, not the engine's
    for completion in got:
        ids = torch.tensor([[*prompt, *completion.token_ids_T]])
        with torch.no_grad(), policy.mode("adapter"):
            logits = policy.model(input_ids=ids, use_cache=False).logits[0].double() / temperature
        logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        picked = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1).numpy()
        np.testing.assert_allclose(completion.logprobs_T, picked, atol=2e-5)
        np.testing.assert_allclose(
            completion.entropies_T, -(logprobs.exp() * logprobs).sum(-1).numpy(), atol=1e-4
        )
        assert completion.weights_version == 1


def test_samples_do_not_depend_on_batching_order_or_prefill_sharing(ready, make_config):
    backend, engine, renderer = ready
    prompts = [[5, 9, 30], [8, 8, 8, 8, 20, 21], [4], [60, 61, 62, 63, 64, 65, 66]]
    requests = [(p, 3, sampling(noise=NoiseKey(7, 3, i))) for i, p in enumerate(prompts)]
    together = generate(engine, requests)
    backwards = generate(engine, requests[::-1])[::-1]
    alone = [generate(engine, [r])[0] for r in requests]
    member = generate(engine, [(prompts[1], 1, sampling(noise=NoiseKey(7, 3, 1, member=2)))])[0][0]
    np.testing.assert_array_equal(member.token_ids_T, together[1][2].token_ids_T)
    config = make_config(inference={"prefix_caching": False, "max_rows": 4})
    other = torch_engine.build(config, renderer)
    other.load(backend.publish())
    separate = generate(other, requests)
    other.close()
    for variant in (backwards, alone, separate):
        for group, same in zip(together, variant, strict=True):
            for a, b in zip(group, same, strict=True):
                np.testing.assert_array_equal(a.token_ids_T, b.token_ids_T)
                np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=1e-5)


def test_the_same_request_twice_is_byte_equal(ready):
    _, engine, _ = ready
    requests = [([5, 9, 30, i], 4, sampling(noise=NoiseKey(7, 3, i))) for i in range(5)]
    first, second = generate(engine, requests), generate(engine, requests)
    for a, b in zip((c for g in first for c in g), (c for g in second for c in g), strict=True):
        assert a.logprobs_T.tobytes() == b.logprobs_T.tobytes()


def test_a_position_offset_continues_the_same_noise(ready):
    _, engine, _ = ready
    whole = generate(engine, [([5, 9], 1, sampling(max_tokens=6, stop_ids=()))])[0][0]
    start, rest = whole.token_ids_T[:2], whole.token_ids_T[2:]
    again = generate(
        engine,
        [([5, 9, *start], 1, sampling(max_tokens=4, stop_ids=(), noise=NoiseKey(7, 3, 0, position=2)))],
    )[0][0]
    np.testing.assert_array_equal(rest, again.token_ids_T)


def test_stop_reasons(ready):
    _, engine, renderer = ready
    free = generate(engine, [([5, 9], 1, sampling(stop_ids=(), max_tokens=12))])[0][0]
    assert free.stop == "length"
    assert len(free.token_ids_T) == 12
    end = int(free.token_ids_T[4])
    first = int(np.argmax(free.token_ids_T == end))
    ended = generate(engine, [([5, 9], 1, sampling(stop_ids=(end,), max_tokens=12))])[0][0]
    assert ended.stop == "stop"
    assert ended.token_ids_T.tolist() == free.token_ids_T[: first + 1].tolist()
    text = renderer.decode(free.token_ids_T)
    word = next(c for c in text if c.isascii() and c.isprintable())
    texted = generate(engine, [([5, 9], 1, sampling(stop_ids=(), stop=(word,), max_tokens=12))])[0][0]
    assert texted.stop == "stop"
    assert word in renderer.decode(texted.token_ids_T)
    assert word not in renderer.decode(texted.token_ids_T[:-1])


def test_a_hostile_generation_config_changes_nothing(make_config, random_model):
    hostile = {"top_k": 2, "repetition_penalty": 1.5, "temperature": 0.1, "top_p": 0.3, "do_sample": True}
    outputs = []
    for generation in (None, hostile):
        model = str(random_model(scale=2.0, generation=generation))
        _, renderer, backend, engine = pair(make_config, model={"model": model})
        engine.load(backend.publish())
        got = generate(engine, [([5, 9, 30], 64, sampling(stop_ids=(), max_tokens=3))])[0]
        outputs.append(np.stack([c.token_ids_T for c in got]))
        if generation:
            assert renderer.ignored_generation_settings["top_k"] == 2
        engine.close()
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert len(set(outputs[1][:, 0].tolist())) > 2


def test_a_sampler_that_is_not_the_trained_policy_is_refused(ready):
    backend, engine, _ = ready
    shake(backend, seed=3)
    weights = backend.publish()
    stale = replace(weights, canary=replace(weights.canary, logprobs_T=weights.canary.logprobs_T + 0.05))
    with pytest.raises(EngineError, match="not the trained policy"):
        engine.load(stale)


def test_a_sampler_that_stands_still_while_the_learner_moves_is_refused(ready):
    backend, engine, _ = ready
    shake(backend, seed=3, scale=0.0501)
    # The hand-over is lost: the merged copies stay as they were, and the canary is scored loosely.
    engine._policy.merge = lambda: True
    weights = backend.publish()
    with pytest.raises(EngineError, match="did not move"):
        engine.load(replace(weights, canary=replace(weights.canary, tolerance=1e9)))


def test_merging_and_training_leave_the_base_untouched(ready):
    backend, engine, _ = ready
    before = backend.policy.base_checksum()
    shake(backend, seed=4)
    engine.load(backend.publish())
    generate(engine, [([5, 9], 2, sampling())])
    assert backend.policy.base_checksum() == before


def test_an_error_in_the_engine_thread_reaches_the_caller(ready):
    _, engine, _ = ready
    with pytest.raises(IndexError):
        generate(engine, [([10**6], 1, sampling())])


def test_a_loop_that_ends_in_its_first_turns_does_not_stop_the_engine(ready):
    _, engine, _ = ready
    prompt = np.array([5, 9], np.int32)

    async def broken():
        async def raises():
            raise ZeroDivisionError

        await asyncio.gather(engine.generate(prompt, 1, sampling()), raises())

    with pytest.raises(ZeroDivisionError):
        asyncio.run(broken())
    assert engine._starting  # that loop was to start the thread, and never will

    # A loop that is closed without a word: its futures are never cancelled.
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.generate(prompt, 1, sampling()))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    async def bounded():
        async with asyncio.timeout(20):
            return await engine.generate(prompt, 3, sampling())

    for _ in range(2):
        assert len(asyncio.run(bounded())) == 3
        assert (engine.asked, engine.finished) == (3, 3)
        assert not engine._starting
    assert not task.done()
    task._log_destroy_pending = False


def test_a_loop_that_closes_while_it_is_sampled_for_leaves_no_rows_behind(ready):
    _, engine, _ = ready
    prompt = np.array([5, 9], np.int32)
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.generate(prompt, 1, sampling(max_tokens=3000, stop_ids=())))
    while not engine.asked:
        loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    generate(engine, [([5, 9], 1, sampling())])
    engine._settle_down()
    assert engine.timings["decode_steps"] < 2900
    task._log_destroy_pending = False


def test_only_abandoned_requests_are_no_work(ready):
    _, engine, _ = ready

    async def go():
        task = asyncio.ensure_future(engine.generate(np.array([5, 9], np.int32), 1, sampling()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0.1)

    asyncio.run(go())
    assert not engine._running
    assert engine.timings["prefill_tokens"] == 0


def test_requests_survive_that_no_batch_can_be_made(ready, monkeypatch):
    _, engine, _ = ready

    def broken(*_):
        raise MemoryError

    async def go():
        async with asyncio.timeout(20):
            asked = [engine.generate(np.array([5, i], np.int32), 1, sampling()) for i in range(3)]
            return await asyncio.gather(*asked, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_new_batch", broken)
        assert [type(e) for e in asyncio.run(go())] == [OutOfMemory] * 3
    assert [len(g) for g in asyncio.run(go())] == [1, 1, 1]
