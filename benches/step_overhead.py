"""What a training step costs besides its model: every part around the sampler and the learner, timed one by one.

Engine and learner are stand-ins that answer at once, so what is left of a step of ``training/loop.py`` is the
step's overhead: requests and their text, scoring by ``match``, credit with the regex detector and SEPA, statistics,
packing, metrics, the log with rollouts and generations, the state and a checkpoint of 66 million parameters (a
Qwen3-4B adapter of rank 32 with both of AdamW's moments: 793 MB).

    python benches/step_overhead.py --out step_overhead.json

The share is stated against three model times: two computed (FLOPs over a rate that is written down) and, with
``--model-seconds``, one that was measured elsewhere. Needs torch for a checkpoint's tensors only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retrain.algorithms import credit
from retrain.algorithms.credit import credit_step
from retrain.algorithms.statistics import step_stats
from retrain.config.schema import Config
from retrain.environments.single_turn import build as single_turn
from retrain.fakes import FakeBackend
from retrain.renderer import ChatRenderer, load_renderer
from retrain.rewards.match import Match
from retrain.sinks import ConsoleSink
from retrain.tracking.rollouts import RolloutStore
from retrain.tracking.run_log import RunLog
from retrain.training import loop
from retrain.training.batch import pack
from retrain.training.build import sampling_of
from retrain.training.checkpoint import Checkpoints
from retrain.training.loop import Parts
from retrain.training.metrics import learner_metrics, rollout_metrics
from retrain.training.rollout import Collected, EventLoop
from retrain.types import Completion, Message, ScoredGroup, StepReport, Task

GROUP = 8
LORA_PARAMETERS = 66_060_288
"""Qwen3-4B, rank 32, all linear layers."""

MODELS: dict[str, dict[str, Any]] = {
    "medium on a CPU": {
        "what": "hidden 512, 8 layers, vocabulary 151,936, float32 at the 177 GFLOP/s of one thread",
        "parameters": 103_000_000,
        "sample_flops": 177e9,
        "learn_flops": 177e9,
    },
    "Qwen3-4B on an H200": {
        "what": "10.9k tokens/s sampled, 21.5k tokens/s learned (the realistic column of the roofline)",
        "tokens_per_s": (10_900.0, 21_500.0),
    },
}

SENTENCES = (
    "We are told that the train covers {a} kilometres in {b} hours, so its speed is {a}/{b} kilometres per hour.",
    "Wait, let me check that again: {a} + {b} = {c}, and {c} - {a} = {b}, as it should.",
    "Let $x$ be the number of red marbles; then $x + {a} = {c}$, which gives $x = {b}$.",
    "\n\nNext, multiply both sides by {b} and collect the terms in $y^2$.",
    "Since {a} is not divisible by {b}, the quotient has a remainder, and we write it as a fraction.",
    "The area of the triangle is $\\frac{{1}}{{2}} \\cdot {a} \\cdot {b}$ square units.",
    "Notice that {c} = {a} + {b} holds for every pair in the list \u2013 we\u2019ve seen it twice.",
    "Each of the {a} boxes holds {b} pencils, and {c} of them are blue.",
    "Substituting back gives {a} = {c} - {b}, which is the first equation once more.",
    "So far we have {a}, {b} and {c}.\n",
    "By symmetry the same is true for the other side of the square, whose length is {b}.",
    "Therefore the probability is {a} out of {c}, or about 0.{b}.",
)
"""Two in twelve hold phrases of strategy: about five in a thousand tokens."""


def answer(renderer: ChatRenderer, number: int, tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """``tokens`` ids of a made-up solution that ends in a box and the end token."""
    draw = np.random.default_rng(number)
    tail = renderer.encode_text(f" The answer is \\boxed{{{number % 4}}}.").tolist() + list(renderer.stop_ids[:1])
    ids: list[int] = []
    while len(ids) < tokens:
        a, b = draw.integers(2, 9999, size=2).tolist()
        ids += renderer.encode_text(SENTENCES[draw.integers(len(SENTENCES))].format(a=a, b=b, c=a + b) + " ").tolist()
    return np.array(ids[: tokens - len(tail)] + tail, dtype=np.int32)


class Instant:
    """An engine that hands out prepared completions."""

    def __init__(self, renderer: ChatRenderer, tokens: int, stock: int) -> None:
        draw = np.random.default_rng(0)
        self._ready = []
        for number in range(stock):
            ids = answer(renderer, number, tokens)
            logprobs = -draw.exponential(0.4, size=len(ids)).astype(np.float32)
            entropies = draw.exponential(0.5, size=len(ids)).astype(np.float32)
            self._ready.append(Completion(ids, logprobs, entropies, "stop", 0))
        self._next = 0

    def load(self, weights: Any) -> None:
        """Nothing to load."""

    async def generate(self, prompt_ids: Any, n: int, sampling: Any) -> list[Completion]:
        """The next ``n`` of the stock."""
        self._next += n
        return [self._ready[(self._next - n + i) % len(self._ready)] for i in range(n)]

    def close(self) -> None:
        """Nothing to stop."""


class Silent(FakeBackend):
    """A learner that answers at once and saves files of a real adapter's size."""

    def train_step(self, batch: Any, optim: Any) -> StepReport:
        """A report and no work."""
        return StepReport(0.1, False, 0.5, False, 1.0, 1.0, 1.0, 0.0, "", 4)

    def prepare(self) -> None:
        """Make the tensors once."""
        import torch

        made = torch.randn(LORA_PARAMETERS // 252 * 252).reshape(252, -1)
        self._adapter = {f"layer.{i}": row for i, row in enumerate(made.clone())}
        self._moments = {f"layer.{i}.{m}": row.clone() for i, row in enumerate(made) for m in ("exp_avg", "exp_avg_sq")}

    def snapshot(self) -> Callable[[Path], None]:
        """Adapter and two moments, float32, copied as the local learner does."""
        adapter = {name: tensor.to("cpu", copy=True) for name, tensor in self._adapter.items()}
        moments = {name: tensor.to("cpu", copy=True) for name, tensor in self._moments.items()}

        def write(directory: Path) -> None:
            from safetensors.torch import save_file

            (directory / "adapter").mkdir()
            save_file(adapter, directory / "adapter" / "adapter_model.safetensors")
            save_file(moments, directory / "optimizer.safetensors")

        return write


class Tasks:
    """Endless arithmetic-like tasks whose reference one answer in four meets."""

    def __init__(self) -> None:
        self._draw = 0

    def __len__(self) -> int:
        return 1000

    def take(self, n: int) -> list[Task]:
        """The next ``n``."""
        self._draw += n
        question = (Message("user", "A train covers some kilometres in some hours. How fast is it? " * 4),)
        return [Task(f"bench/train/{d}", question, str(d % 4), "bench", d) for d in range(self._draw - n, self._draw)]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"draw": self._draw}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        self._draw = int(state["draw"])


def configuration(rollouts: int, tokens: int, transform: str) -> Config:
    """The step's settings: SEPA fully on, so that every part of credit runs."""
    return Config.model_validate(
        {
            "algorithm": {"advantage_mode": "maxrl", "transform_mode": transform},
            "training": {
                "seed": 1, "max_steps": 10**6, "batch_size": rollouts // GROUP, "group_size": GROUP,
                "max_tokens": tokens, "save_every": 0,
            },
            "data": {"source": "arithmetic"},
            "reward": {"type": "match"},
            "sepa": {"steps": 1, "delay_steps": 0, "correct_rate_gate": 0.0},
        }
    )  # fmt: skip


@contextlib.contextmanager
def parts_in(run: Path, config: Config, renderer: ChatRenderer, tokens: int) -> Iterator[Parts]:
    """A run with stand-ins for engine and learner; everything else is the product's."""
    log = RunLog(run, renderer, [ConsoleSink(total_steps=0, plain=True)], generations=8, store=RolloutStore(run))
    events = EventLoop()
    rollouts = config.training.batch_size * GROUP
    try:
        yield Parts(
            backend=Silent(), engine=Instant(renderer, tokens, rollouts), environment=single_turn(config, renderer),
            reward=Match(), tasks=Tasks(), algorithm=credit.build(config, renderer),
            schedule=credit.build_schedule(config), sampling=sampling_of(config, renderer, temperature=1.0),
            evaluator=None, checkpoints=Checkpoints(run, keep=1), log=log, events=events,
        )  # fmt: skip
    finally:
        log.close()
        events.close()


def timed(work: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Seconds of each call: the fastest, the median, and the fastest in processor time (of every thread): where others
    use the machine, that says more."""
    took: list[float] = []
    busy: list[float] = []
    for _ in range(rounds):
        started, used = time.perf_counter(), time.process_time()
        work()
        took.append(time.perf_counter() - started)
        busy.append(time.process_time() - used)
    return {"min_s": min(took), "median_s": statistics.median(took), "min_cpu_s": min(busy)}


def groups_of(parts: Parts, config: Config, count: int) -> tuple[ScoredGroup, ...]:
    """So many scored groups, one after the other: nothing is gained by the loop's concurrency here."""
    made: list[ScoredGroup] = []
    for task in parts.tasks.take(count):
        rollouts = asyncio.run(parts.environment.attempt(task, GROUP, parts.engine, parts.sampling))
        made.append(ScoredGroup(task, tuple(rollouts), tuple(asyncio.run(parts.reward.score(task, rollouts)))))
    return tuple(made)


def single_parts(parts: Parts, config: Config, rounds: int) -> dict[str, dict[str, float]]:
    """Each part of a step by itself."""
    training = config.training
    found: dict[str, dict[str, float]] = {}
    tasks = parts.tasks.take(training.batch_size)

    async def sampled() -> list[Any]:
        return [await parts.environment.attempt(t, GROUP, parts.engine, parts.sampling) for t in tasks]

    got = asyncio.run(sampled())

    async def judged() -> list[Any]:
        return [await parts.reward.score(t, r) for t, r in zip(tasks, got, strict=True)]

    found["requests and text"] = timed(lambda: asyncio.run(sampled()), rounds)
    found["score (match)"] = timed(lambda: asyncio.run(judged()), rounds)
    scored = groups_of(parts, config, training.batch_size)
    found["credit"] = timed(lambda: credit_step(scored, parts.algorithm, 0.5), rounds)
    credited = credit_step(scored, parts.algorithm, 0.5)
    found["statistics"] = timed(lambda: step_stats(credited, parts.algorithm), rounds)
    found["pack"] = timed(lambda: pack(credited, temperature=1.0, fixed_tokens=1), rounds)
    batch = pack(credited, temperature=1.0, fixed_tokens=1)
    report = parts.backend.train_step(batch, None)  # type: ignore[arg-type]
    collected = Collected(scored, 1.0, 0.1)

    def metrics() -> dict[str, Any]:
        stats = step_stats(credited, parts.algorithm)
        return {**rollout_metrics(collected), **stats.metrics, **learner_metrics(batch, [report])}

    values = metrics()
    found["metrics"] = timed(lambda: (rollout_metrics(collected), learner_metrics(batch, [report])), rounds)
    found["log"] = timed(lambda: parts.log.step(0, values, credited), rounds)
    found["log sync"] = timed(parts.log.sync, rounds)
    found["state"] = timed(lambda: loop._state(parts), rounds)  # pyright: ignore[reportPrivateUsage]
    return found


def million(renderer: ChatRenderer, run: Path, rounds: int) -> dict[str, Any]:
    """Credit and pack of a million tokens, by transform."""
    found: dict[str, Any] = {}
    for transform in ("none", "gtpo", "gtpo_sepa", "gtpo_hicra", "entropy_mask"):
        config = configuration(1024, 1024, transform)
        with parts_in(run / transform, config, renderer, 1024) as parts:
            scored = groups_of(parts, config, 1024 // GROUP)

            def work(scored: Any = scored, parts: Parts = parts) -> None:
                pack(credit_step(scored, parts.algorithm, 0.5), temperature=1.0, fixed_tokens=1)

            found[transform] = timed(work, rounds)
            found["tokens"] = sum(r.num_sampled for g in scored for r in g.rollouts_G)
    return found


def model_seconds(tokens: int, measured: float | None) -> dict[str, dict[str, Any]]:
    """Seconds of sampler and learner for so many tokens: 2 P FLOPs a token to sample, 4 P to learn (forward, and the
    gradient with respect to the activations of a frozen model)."""
    found: dict[str, dict[str, Any]] = {}
    for name, facts in MODELS.items():
        if "tokens_per_s" in facts:
            sample, learn = (tokens / rate for rate in facts["tokens_per_s"])
        else:
            sample = 2.0 * facts["parameters"] * tokens / facts["sample_flops"]
            learn = 4.0 * facts["parameters"] * tokens / facts["learn_flops"]
        found[name] = {"what": facts["what"], "seconds": sample + learn}
    if measured is not None:
        found["measured"] = {"what": "--model-seconds", "seconds": measured}
    return found


def checkpoint(parts: Parts, rounds: int) -> dict[str, dict[str, float]]:
    """A checkpoint of a real adapter's size: how long its bytes take, and how long the loop waits for it."""
    backend = parts.backend
    assert isinstance(backend, Silent)
    backend.prepare()
    state = loop._state(parts)  # pyright: ignore[reportPrivateUsage]
    numbers = iter(range(1, 1000))

    def write() -> None:
        parts.checkpoints.save(next(numbers), backend, state, accuracy=None, selected_on="")

    found: dict[str, dict[str, float]] = {}
    waited, took = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        write()
        waited.append(time.perf_counter() - started)
        parts.checkpoints.wait()
        took.append(time.perf_counter() - started)
    for name, seconds in (("checkpoint, what the loop waits", waited), ("checkpoint, until it counts", took)):
        found[name] = {"min_s": min(seconds), "median_s": statistics.median(seconds)}
    return found


def checkpoint_share(waited: float | None, save_every: int) -> dict[str, Any]:
    """How the copy that the loop waits for is spread over the steps; None where none was measured."""
    return {
        "what": "overhead_s = step.median_s + per_step_s; per_step_s = waited_s / save_every",
        "waited_s": waited, "save_every": save_every, "per_step_s": None if waited is None else waited / save_every,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Where this was measured."""
    names = ("numpy", "torch", "transformers", "tokenizers", "safetensors")
    versions = {name: importlib.metadata.version(name) for name in names}
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "python": platform.python_version(), **versions,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transform", default="gtpo_sepa")
    parser.add_argument("--tokenizer", default="", help="folder of a tokenizer; default: Qwen3 in ../shared, else tiny")
    parser.add_argument("--model-seconds", type=float, help="measured seconds of sampler and learner for one step")
    parser.add_argument("--save-every", type=int, default=20, help="steps that share one checkpoint")
    parser.add_argument("--skip", nargs="*", default=[], choices=["checkpoint", "million"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    shared = Path(os.environ.get("RETRAIN_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "tokenizers" / "qwen3"
    tokenizer = options.tokenizer or (str(shared) if shared.is_dir() else "retrain/tiny")
    renderer = load_renderer(tokenizer)
    config = configuration(options.rollouts, options.tokens, options.transform)
    tokens = options.rollouts * options.tokens
    result: dict[str, Any] = {
        "rollouts": options.rollouts, "tokens": options.tokens, "transform": options.transform,
        "tokenizer": "qwen3" if "qwen3" in tokenizer else tokenizer, "machine": machine(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with parts_in(Path(folder) / "run", config, renderer, options.tokens) as parts:
            steps = timed(lambda: loop._step(config, parts), options.rounds)  # pyright: ignore[reportPrivateUsage]
            result["step"] = steps
            result["parts"] = single_parts(parts, config, options.rounds)
            if "checkpoint" not in options.skip:
                result["parts"] |= checkpoint(parts, min(3, options.rounds))
        if "million" not in options.skip:
            result["million"] = million(renderer, Path(folder), options.rounds)
    waited = result["parts"].get("checkpoint, what the loop waits", {}).get("median_s")
    saved = (waited or 0.0) / options.save_every
    result["checkpoint_in_overhead"] = checkpoint_share(waited, options.save_every)
    # The first step of a run reads new tokens and templates; the median is of the others.
    result["overhead_s"] = steps["median_s"] + saved
    result["share"] = {
        name: {**facts, "share": result["overhead_s"] / (result["overhead_s"] + facts["seconds"])}
        for name, facts in model_seconds(tokens, options.model_seconds).items()
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    threading.current_thread().name = "bench"
    main()
