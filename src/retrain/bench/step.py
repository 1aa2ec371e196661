"""A configuration's training step, timed on a length trace and set against the device's roofline.

The real loop runs with the real model, engine, learner and credit; tasks, environment and reward come from the trace,
nothing is evaluated or saved, and the records go to a temporary folder that is gone at the end.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrain import plugins, preflight
from retrain import trace as traces
from retrain.algorithms import credit
from retrain.bench.roof import DeviceRoof, roof_of
from retrain.config.load import LoadedConfig
from retrain.config.schema import Config
from retrain.errors import UsageError
from retrain.protocols import Backend, Renderer, Sizer, State
from retrain.roofline import Floor, Row, Work, decode, floor, learn, prefill
from retrain.tracking.rollouts import RolloutStore
from retrain.tracking.run_log import RunLog
from retrain.training.build import facts, sampling_of
from retrain.training.checkpoint import Checkpoints
from retrain.training.loop import Parts, train
from retrain.training.own_parts import make_backend, make_engine
from retrain.training.rollout import EventLoop
from retrain.types import CreditedGroup

Progress = Callable[[int, int], None]
"""Called after every step with the number of steps done and of all, the warm-up included."""

PROMPT_TOKENS = 128
"""Tokens of a prompt where nothing is said and the model's context has room."""

_TOTAL = 2048


@dataclass(frozen=True, slots=True)
class Settings:
    """What a measurement varies besides the configuration. ``trace`` is a text for ``trace.parse``, "" for a log-normal of
    median 700 and 95th percentile 2,048 that is scaled to ``training.max_tokens``; ``prompt_tokens`` 0 for the default."""

    steps: int = 3
    warmup: int = 1
    trace: str = ""
    prompt_tokens: int = 0


@dataclass(slots=True)
class _Step:
    """One step as the loop reported it: seconds of its wall clock, of processors and of its record, and its work."""

    wall: float
    cpu: float
    log: float
    metrics: Mapping[str, Any]
    engine: Mapping[str, float]
    learner: Mapping[str, float]
    prompts: list[int]
    rows: list[tuple[int, int]]
    trained: list[Row]
    groups_trained: int


@dataclass(slots=True)
class _Log:
    """The run's log around a real one: keeps when each step ended, what it did and what engine and learner counted."""

    inner: RunLog
    engine: Any
    backend: Any
    total: int
    progress: Progress
    keep_silent: bool
    steps: list[_Step] = field(default_factory=list[_Step])
    _ended: float = field(default_factory=time.perf_counter)
    _cpu: float = field(default_factory=time.process_time)
    _seen: tuple[dict[str, float], dict[str, float]] = field(default_factory=lambda: ({}, {}))

    def step(self, step: int, metrics: Mapping[str, Any], groups_P: Sequence[CreditedGroup]) -> None:
        """Record a step as every run does, and its time."""
        began = time.perf_counter()
        self.inner.step(step, metrics, groups_P)
        ended = time.perf_counter()
        seen = (_timings(self.engine), _timings(self.backend))
        engine, learner = (
            {k: v - before.get(k, 0.0) for k, v in now.items()}
            for now, before in zip(seen, self._seen, strict=True)
        )
        cpu = time.process_time()
        made = _Step(
            ended - self._ended, cpu - self._cpu, ended - began, dict(metrics), engine, learner, [], [], [], 0
        )
        for group in groups_P:
            self._add(made, group)
        self.steps.append(made)
        self.progress(len(self.steps), self.total)
        self._seen, self._ended, self._cpu = seen, time.perf_counter(), time.process_time()

    def _add(self, made: _Step, group: CreditedGroup) -> None:
        trains = self.keep_silent or not group.skipped
        made.groups_trained += trains
        for i, rollout in enumerate(group.scored.rollouts_G):
            prompt = int(np.argmax(rollout.sampled_T))
            if i == 0:
                made.prompts.append(prompt)
            made.rows.append((prompt, rollout.num_sampled))
            if trains:
                tokens = len(rollout.token_ids_T)
                made.trained.append(Row(tokens, rollout.num_sampled, prompt if i else 0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _NoCheckpoints(Checkpoints):
    """Saves nothing."""

    def save(
        self, step: int, backend: Backend, state: State, *, accuracy: float | None, selected_on: str
    ) -> None:
        """Nothing: a measurement leaves nothing behind."""


def _timings(part: Any) -> dict[str, float]:
    return {str(k): float(v) for k, v in dict(getattr(part, "timings", None) or {}).items()}


@dataclass(frozen=True, slots=True)
class Bench:
    """A run's parts on a trace: what measures runs the loop on them and reads ``log``. ``policy`` and ``watch`` are None
    where the learner is elsewhere."""

    config: Config
    parts: Parts
    log: Any
    policy: Any
    watch: Any
    trace: str
    prompt_tokens: int

    def run(self, stop: threading.Event | None = None) -> None:
        """The loop, to its last step or until ``stop``."""
        train(self.config, self.parts, stop or threading.Event())

    def facts(self) -> dict[str, Any]:
        """What a record says of what was measured and with what."""
        training = self.config.training
        return {
            "model": self.config.model.model,
            "weights": dict(self.parts.backend.facts()),
            "settings": {
                "trace": self.trace, "prompt_tokens": self.prompt_tokens, "group_size": training.group_size,
                "max_tokens": training.max_tokens, "lora_rank": self.config.model.lora_rank,
                "updates_per_batch": training.updates_per_batch,
            },
            "versions": facts(),
        }  # fmt: skip


def configured(loaded: LoadedConfig) -> Config:
    """The configuration as it is measured, its plug-ins found."""
    config = _with(_anchored(loaded), "lora", init_from="")
    plugins.add_search_paths(loaded.search_paths)
    preflight.check_plugins(config)
    return config


@contextlib.contextmanager
def opened(
    config: Config, settings: Settings, *, steps: int, tasks: int, progress: Progress, sizer: Sizer | None = None
) -> Generator[Bench]:
    """Make the parts of a run of ``steps`` steps over ``tasks`` tasks in all, and close them at the end."""
    with ExitStack() as stack:
        renderer: Any = plugins.load("renderer", "chat")(
            config.model.model, revision=config.model.revision, template_args=config.data.template_args
        )
        trace, named = _trace(config, settings)
        config, prompt_tokens = _sized(config, settings, renderer, trace, steps, tasks)
        algorithm, schedule = credit.build(config, renderer), credit.build_schedule(config)
        events = EventLoop()
        stack.callback(events.close)
        backend: Any = make_backend(config, renderer)
        stack.callback(backend.close)
        engine: Any = make_engine(config, renderer)
        stack.callback(engine.close)
        policy = getattr(backend, "policy", None)
        watch: Any = None
        if policy is not None:
            from retrain import peaks

            watch = peaks.MemoryWatch(policy.device)
            backend.train_step = watch.learning(backend.train_step)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retrain-bench-")))
        inner = RunLog(
            folder,
            renderer,
            [],
            generations=config.logging.generations,
            store=RolloutStore(folder) if config.logging.rollouts else None,
            alarms=False,
        )
        stack.callback(inner.close)
        log = _Log(
            inner, engine, backend, config.training.max_steps, progress,
            keep_silent=config.loss.kl != 0 or config.loss.entropy != 0,
        )  # fmt: skip
        parts = Parts(
            backend=backend,
            engine=engine,
            environment=traces.TracedEnvironment(renderer, trace),
            reward=traces.CoinReward(),
            tasks=traces.TracedTasks(prompt_tokens, vocab_size=_vocabulary(renderer, policy)),
            algorithm=algorithm,
            schedule=schedule,
            sampling=sampling_of(config, renderer, temperature=config.training.temperature),
            evaluator=None,
            checkpoints=_NoCheckpoints(folder, keep=1),
            log=cast(Any, log),
            events=events,
            sizer=sizer,
        )
        yield Bench(config, parts, log, policy, watch, named, prompt_tokens)


def measure(loaded: LoadedConfig, settings: Settings, *, progress: Progress) -> dict[str, Any]:
    """Run the warm-up and the steps; a JSON-serialisable record. RetrainError as a run raises it."""
    config = configured(loaded)
    total = settings.warmup + settings.steps
    tasks = total * config.training.batch_size
    with opened(config, settings, steps=total, tasks=tasks, progress=progress) as bench:
        bench.run()
        memory = bench.watch.record() if bench.watch is not None else None
        roof = roof_of(bench.config, bench.policy)
        steps = bench.log.steps[settings.warmup :]
        updates = bench.config.training.updates_per_batch
        told = bench.facts()
        record = {
            "model": told["model"],
            "weights": told["weights"],
            "settings": {
                "steps": settings.steps, "warmup": settings.warmup, "batch_size": bench.config.training.batch_size,
                **told["settings"],
            },
            "work": _work(steps),
            **_times(steps, updates),
            "peaks": roof and roof.measured,
            "roofline": roof and _against(steps, roof, updates),
            "memory": memory,
            "versions": told["versions"],
        }  # fmt: skip
        record["slowest"] = slowest(record)
        return record


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _anchored(loaded: LoadedConfig) -> Config:
    """A model folder is looked for beside the TOML first, as in a run."""
    config, name = loaded.config, loaded.config.model.model
    with contextlib.suppress(OSError, RuntimeError):
        beside = (loaded.path.parent if loaded.path else Path.cwd()) / Path(name).expanduser()
        if not name.startswith("retrain/") and beside.exists():
            return _with(config, "model", model=str(beside.resolve()))
    return config


def _trace(config: Config, settings: Settings) -> tuple[traces.Trace, str]:
    if settings.trace:
        return traces.parse(settings.trace), settings.trace
    cap = min(2 * _TOTAL, max(_TOTAL, config.training.max_tokens))
    text = (
        f"lognormal:median=700,p95={_TOTAL},cap={cap},scale={min(1.0, config.training.max_tokens / _TOTAL):g}"
    )
    return traces.parse(text), text


def _sized(
    config: Config, settings: Settings, renderer: Any, trace: traces.Trace, total: int, tasks: int
) -> tuple[Config, int]:
    """The configuration with the measurement's steps and lengths, and the tokens of a prompt; UsageError when these do not
    fit into the model's context."""
    training = config.training
    longest = traces.longest_of(trace, tasks, training.group_size)
    context = getattr(renderer, "context_length", None)
    prompt = settings.prompt_tokens or max(
        1, min(PROMPT_TOKENS, (context or 2 * PROMPT_TOKENS + longest) - longest)
    )
    if context and prompt + longest > context:
        raise UsageError(
            f"a prompt of {prompt} and a completion of {longest} tokens exceed the model's context of {context}.",
            fix=_shorter(settings, context, longest),
        )
    seed = max(0, training.seed)
    config = _with(
        config, "training", max_steps=total, max_tokens=longest, save_every=0, seed=seed, min_signal=0.0,
        # Every completion of a trace is cut at its length.
        truncated="score", stop=(),
    )  # fmt: skip
    return config, prompt


def _shorter(settings: Settings, context: int, longest: int) -> str:
    """What makes room in the context."""
    room = context - (settings.prompt_tokens or 1)
    if room < 1:
        return f"lower --prompt-tokens to at most {max(1, context - longest)}."
    completion = (
        f"give a --trace of at most {room} tokens (its cap, scale or length)"
        if settings.trace
        else f"set --max-tokens to at most {room}"
    )
    if settings.prompt_tokens and longest < context:
        return f"lower --prompt-tokens to at most {context - longest}, or {completion}."
    return f"{completion}."


def _vocabulary(renderer: Renderer, policy: Any) -> int:
    size = int(getattr(renderer, "vocab_size", 0))
    return min(size or 256, int(policy.model.config.vocab_size)) if policy is not None else size or 256


def _work(steps: Sequence[_Step]) -> dict[str, float]:
    """Means per step."""

    def mean(values: Sequence[int]) -> float:
        return sum(values) / len(values)

    return {
        "groups": mean([len(s.prompts) for s in steps]),
        "groups_trained": mean([s.groups_trained for s in steps]),
        "rollouts": mean([len(s.rows) for s in steps]),
        "prompt_tokens": mean([sum(s.prompts) for s in steps]),
        "sampled_tokens": mean([sum(n for _, n in s.rows) for s in steps]),
        "trained_tokens": mean([sum(r.tokens for r in s.trained) for s in steps]),
        "trained_sampled_tokens": mean([sum(r.sampled for r in s.trained) for s in steps]),
    }


_ENGINE = ("prefill", "decode", "draw")
_LEARNER = ("forward", "head", "backward", "optimizer")


def _seconds(step: _Step) -> dict[str, float | None]:
    """Where one step's wall clock went. Sampling's and learning's own parts are None where they are not told."""
    m = step.metrics
    sync, sample, score, train_ = (
        float(m.get(f"{name}_time_s") or 0.0) for name in ("sync", "sample", "score", "train")
    )
    known = [m.get("credit_time_s"), m.get("pack_time_s")]
    between = (
        sum(float(k) for k in known if k is not None)
        if None not in known
        else max(0.0, float(m["step_time_s"]) - sync - sample - score - train_)
    )
    parts = sync + sample + score + between + train_ + step.log
    return {
        "step": step.wall,
        "sync": sync,
        "sample": sample,
        **{name: step.engine.get(name) for name in _ENGINE},
        "score": score,
        "credit_and_pack": between,
        "learn": train_,
        **{name: step.learner.get(name) for name in _LEARNER},
        "log": step.log,
        "other": max(0.0, step.wall - parts),
    }


def _times(steps: Sequence[_Step], updates: int) -> dict[str, Any]:
    each = [_seconds(step) for step in steps]
    mean: dict[str, float | None] = {}
    for name in each[0]:
        values = [row[name] for row in each]
        mean[name] = None if None in values else sum(cast("list[float]", values)) / len(values)
    work = _work(steps)
    rows = work["rollouts"]
    tokens = {
        "step": (work["sampled_tokens"], ["step"]),
        "sample": (work["sampled_tokens"], ["sample"]),
        "prefill": (work["prompt_tokens"], ["prefill"]),
        "decode": (work["sampled_tokens"] - rows, ["decode", "draw"]),
        "learn": (work["trained_tokens"] * updates, ["learn"]),
    }
    step = cast(float, mean["step"])
    model = sum(mean[name] or 0.0 for name in ("sync", "sample", "learn"))
    return {
        "seconds": mean,
        "seconds_each": each,
        "cpu_seconds": sum(s.cpu for s in steps) / len(steps),
        "tokens_per_second": {name: _rate(n, _sum(mean, of)) for name, (n, of) in tokens.items()},
        "non_model_share": max(0.0, step - model) / step,
    }


def _sum(seconds: Mapping[str, float | None], names: Sequence[str]) -> float | None:
    found = [seconds[name] for name in names]
    return None if found[0] is None else sum(value or 0.0 for value in found)


def _rate(count: float, seconds: float | None) -> float | None:
    return count / seconds if seconds else None


def _against(steps: Sequence[_Step], roof: DeviceRoof, updates: int) -> dict[str, Any]:
    """Each phase's floor over all steps, and the share of it that was reached."""
    shape, itemsize, adapter = roof.shape, roof.itemsize, roof.adapter
    sampling: Any = {"kv_itemsize": roof.kv_itemsize, "adapter": roof.sampled_adapter}
    needed: dict[str, list[Work]] = {name: [] for name in ("prefill", "decode", "learn", "learn_whole_rows")}
    for step in steps:
        needed["prefill"].append(prefill(shape, step.prompts, itemsize, **sampling))
        prompts, lengths = [p for p, _ in step.rows], [n for _, n in step.rows]
        needed["decode"] += decode(shape, prompts, lengths, itemsize, **sampling)
        whole = [Row(r.tokens, r.sampled) for r in step.trained]
        needed["learn"] += [learn(shape, step.trained, itemsize, adapter=adapter)] * updates
        needed["learn_whole_rows"] += [learn(shape, whole, itemsize, adapter=adapter)] * updates
    needed["sample"] = needed["prefill"] + needed["decode"]
    each = [_seconds(step) for step in steps]
    taken = {
        "prefill": ["prefill"], "decode": ["decode", "draw"], "sample": ["sample"], "learn": ["learn"],
        "learn_whole_rows": ["learn"],
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, of in taken.items():
        values = [_sum(row, of) for row in each]
        seconds = None if None in values else sum(cast("list[float]", values))
        found[name] = _row(floor(needed[name], roof.peaks), seconds, len(steps))
    return found


def _row(least: Floor, seconds: float | None, steps: int) -> dict[str, Any]:
    """Per step: work, floor and share."""
    return {
        "flops": least.work.flops / steps,
        "bytes": least.work.bytes / steps,
        "floor_s": least.seconds / steps,
        "seconds": None if seconds is None else seconds / steps,
        "share": least.share(seconds) if seconds else None,
        "bound": least.bound,
    }


_NAMES = {
    "sync": "handing the weights over", "sample": "sampling", "prefill": "prefill", "decode": "decoding", "score": "scoring",
    "credit_and_pack": "credit and packing", "learn": "learning", "log": "the records", "other": "what lies between",
}  # fmt: skip


def slowest(record: Mapping[str, Any]) -> str:
    """A sentence on what takes most of a step, and how far from the device's roof it is."""
    seconds: dict[str, Any] = dict(record["seconds"])
    split = seconds["prefill"] is not None and seconds["decode"] is not None
    if split:
        seconds["decode"] = sum(float(seconds[n] or 0.0) for n in ("decode", "draw"))
    parts = [n for n in _NAMES if n not in (("sample",) if split else ("prefill", "decode"))]
    name = max(parts, key=lambda n: seconds[n] or 0.0)
    share = (seconds[name] or 0.0) / seconds["step"]
    told = "decoding and drawing" if name == "decode" and seconds["draw"] else _NAMES[name]
    text = f"Slowest: {told}, {share:.0%} of the step"
    rows: Mapping[str, Any] = record["roofline"] or {}
    row = rows.get(name)
    if row is None or row["share"] is None:
        return f"{text}."
    limit = "its arithmetic" if row["bound"] == "compute" else "its memory bandwidth"
    return f"{text}, at {row['share']:.0%} of what this device allows by {limit}."
