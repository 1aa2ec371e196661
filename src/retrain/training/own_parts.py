"""Environments, engines and backends of the user's own: made, and held to their protocols while a run goes on.

What they raise ends the run with a checkpoint and one line that names the plug-in, file and line; what they return is
checked where it arrives. Built-in ones pass through untouched.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrain import plugins
from retrain.config.schema import Config
from retrain.errors import (
    ConfigError,
    EngineError,
    LearnerError,
    OutOfMemory,
    PluginError,
    RetrainError,
    RunError,
    is_out_of_memory,
)
from retrain.protocols import Backend, Engine, Environment, Renderer, Sizer, State, Stateful
from retrain.tracking import layout
from retrain.types import (
    AdapterWeights,
    Capabilities,
    Completion,
    FloatArray,
    IntArray,
    OptimStep,
    RemoteWeights,
    Rollout,
    Sampled,
    Sampling,
    SharedWeights,
    StepReport,
    Task,
    TrainBatch,
    Weights,
)

log = logging.getLogger("retrain")

_ROUNDING = 1e-3
"""Nats by which a sampled token's logprob may lie above 0, and its entropy below."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""What a full or broken disk says while a checkpoint is written: no mistake of the plug-in's."""


def make_environment(config: Config, renderer: Renderer) -> Environment:
    """The environment that ``environment.provider`` names: one question, one answer where it is empty."""
    name = config.environment.provider or "single_turn"
    made = plugins.make("environment", name, config, renderer)
    if not plugins.is_own("environment", name):
        return made
    _check_async("environment", name, made, "attempt(self, task, n, engine, sampling)")
    return _OwnEnvironment(name, made)


def make_engine(config: Config, renderer: Renderer) -> Engine:
    """The sampler that ``inference.engine`` names."""
    name = config.inference.engine
    made = plugins.make("engine", name, config, renderer)
    if not plugins.is_own("engine", name):
        return made
    _check_async("engine", name, made, "generate(self, prompt_ids, n, sampling)")
    return (_RememberingEngine if isinstance(made, Stateful) else _OwnEngine)(name, made, renderer)


def make_backend(config: Config, renderer: Renderer) -> Backend:
    """The learner that ``backend.backend`` names; ConfigError when it says that it cannot do what is asked for."""
    name = config.backend.backend
    made = plugins.make("backend", name, config, renderer)
    if not plugins.is_own("backend", name):
        return made
    with _named("backend", name, LearnerError):
        capabilities = made.capabilities
    _check_capabilities(config, name, capabilities)
    return (_SnapshotBackend if callable(getattr(made, "snapshot", None)) else _OwnBackend)(name, made)


def make_sizer(config: Config) -> Sizer | None:
    """What chooses each step's batch size; None where it is ``training.batch_size``."""
    if not config.backpressure.enabled:
        return None
    name = config.backpressure.controller
    made = plugins.make("backpressure", name, config)
    if not plugins.is_own("backpressure", name):
        return made
    return _OwnSizer(name, made, config.backpressure.max_batch_size)


def _check_capabilities(config: Config, name: str, capabilities: object) -> None:
    if not isinstance(capabilities, Capabilities):
        raise ConfigError(
            f"backend {name!r}: its capabilities are a {type(capabilities).__name__}.",
            fix="return Capabilities from retrain.types.",
        )
    algorithm = config.algorithm
    if not capabilities.loop:
        raise ConfigError(
            f"backend {name!r} says that it does not take part in this training loop.", fix="use another backend."
        )
    if not capabilities.token_advantages and (algorithm.algorithm_mode or algorithm.transform_mode != "none"):
        raise ConfigError(
            f"backend {name!r} takes one advantage per rollout, not one per token.",
            fix='write algorithm.transform_mode = "none", or use another backend.',
        )
    if config.resume.from_ and not capabilities.resume:
        raise ConfigError(f"backend {name!r} cannot be resumed.", fix="start a new run with another --log-dir.")


def _check_async(kind: str, name: str, made: object, signature: str) -> None:
    method = signature.partition("(")[0]
    function = getattr(made, method)
    if inspect.isfunction(getattr(function, "__func__", function)) and not inspect.iscoroutinefunction(function):
        raise PluginError(f"{kind} {name!r}: its {method} is not async.", fix=f"write async def {signature}.")


class _named:
    """Turns what user code raises into one line that names the plug-in; RetrainErrors pass, also out of a task group,
    and so does an OSError with an errno of ``passes``."""

    def __init__(
        self, kind: str, name: str, error: type[RetrainError], passes: Sequence[int] | set[int] = ()
    ) -> None:
        self._kind, self._name, self._error, self._passes = kind, name, error, passes

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        inner: Any = error
        while isinstance(inner, ExceptionGroup):
            inner = cast("Any", inner).exceptions[0]
        if isinstance(inner, RetrainError):
            if inner is not error:
                raise inner
        elif isinstance(inner, OSError) and inner.errno in self._passes:
            return
        elif isinstance(inner, Exception) and is_out_of_memory(inner):
            raise OutOfMemory(
                plugins.raised(self._kind, self._name, inner), fix="lower training.batch_size or training.max_tokens."
            ) from None
        elif isinstance(inner, (Exception, SystemExit)):
            raise self._error(
                plugins.raised(self._kind, self._name, inner), fix=f"correct the {self._kind}."
            ) from error

    async def awaited(self, given: object) -> Any:
        """What ``given`` comes to; EngineError where it is nothing to await."""
        if not inspect.isawaitable(given):
            raise self._error(
                f"{self._kind} {self._name!r} returned a {type(given).__name__}, nothing to await.",
                fix="write async def.",
            )
        return await given


def _listed(given: object, n: int, what: type, kind: str, name: str) -> list[Any]:
    """``given`` as a list of ``n`` values of type ``what``; EngineError when it is anything else."""
    values: list[object] | None = list(cast("Any", given)) if isinstance(given, (list, tuple)) else None
    if values is None or len(values) != n or not all(isinstance(v, what) for v in values):
        got = f"a {type(cast('object', given)).__name__}" if values is None else f"{len(values)} values"
        raise EngineError(
            f"{kind} {name!r} returned {got}, not {n} of type {what.__name__}.",
            fix=f"return a list with one {what.__name__} from retrain.types for each.",
        )
    return values


def _wrong_tokens(ids_T: IntArray, logprobs_T: FloatArray, vocabulary: int) -> str:
    """What is wrong with sampled tokens, "" for nothing; ``vocabulary`` 0 where its size is not known."""
    ids, logprobs = np.asarray(ids_T), np.asarray(logprobs_T)
    for what, array, kinds in (("token ids", ids, "iu"), ("logprobs", logprobs, "f")):
        if array.ndim != 1 or array.dtype.kind not in kinds:
            return f"{what} as an array of {array.dtype} with {array.ndim} axes"
    low, high, most = int(ids.min()), int(ids.max()), float(logprobs.max())
    if low < 0 or (vocabulary and high >= vocabulary):
        return f"token id {low if low < 0 else high}, outside the vocabulary of {vocabulary or '?'} tokens"
    return f"a logprob of {most:g}, above 0" if most > _ROUNDING else ""


class _OwnEnvironment:
    def __init__(self, name: str, inner: Any) -> None:
        self._name, self._inner = name, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def attempt(self, task: Task, n: int, engine: Engine, sampling: Sampling) -> list[Rollout]:
        with (named := _named("environment", self._name, EngineError)):
            given = await named.awaited(self._inner.attempt(task, n, engine, sampling))
        rollouts: list[Rollout] = _listed(given, n, Rollout, "environment", self._name)
        first = sampling.noise.member
        for place, rollout in enumerate(rollouts):
            if rollout.member != first + place or rollout.task_id != task.id:
                raise EngineError(
                    f"environment {self._name!r} returned member {rollout.member} of {rollout.task_id!r} as member "
                    f"{first + place} of {task.id!r}.",
                    fix="keep the task's id, and number members from sampling.noise.member on.",
                )
            if wrong := _wrong_rollout(rollout):
                raise EngineError(
                    f"environment {self._name!r} returned a rollout of {task.id!r} with {wrong}.",
                    fix="return what retrain.types.Rollout describes.",
                )
        return rollouts


def _wrong_rollout(rollout: Rollout) -> str:
    """What is wrong with a rollout of one's own environment, "" for nothing."""
    texts: dict[str, object] = {"text": rollout.text, "error": rollout.error}
    for field, value in texts.items():
        if not isinstance(value, str):
            return f"{field} = {value!r}, not a text"
    if rollout.stop not in ("stop", "length", "error"):
        return f"stop = {rollout.stop!r}, not one of stop, length, error"
    if rollout.stop == "error":
        return ""
    sampled_T = np.asarray(rollout.sampled_T)
    if sampled_T[0]:
        return "a sampled first token, which no prompt comes before"
    ids_T, logprobs_T = np.asarray(rollout.token_ids_T), np.asarray(rollout.logprobs_T)
    return _wrong_tokens(ids_T, logprobs_T[sampled_T], 0)


class _OwnEngine:
    def __init__(self, name: str, inner: Any, renderer: Renderer) -> None:
        self._name, self._inner = name, inner
        self._tokens: int = getattr(renderer, "vocab_size", 0)
        self._vocabulary = 0
        self._version: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, weights: Weights) -> None:
        with _named("engine", self._name, EngineError):
            self._inner.load(weights)
        self._version = weights.version
        # A model may know more ids than its tokenizer, and then samples them.
        model = getattr(getattr(weights, "policy", None), "model", None)
        self._vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or self._tokens

    async def generate(self, prompt_ids: IntArray, n: int, sampling: Sampling) -> list[Completion]:
        with (named := _named("engine", self._name, EngineError)):
            given = await named.awaited(self._inner.generate(prompt_ids, n, sampling))
        completions: list[Completion] = _listed(given, n, Completion, "engine", self._name)
        longest = max((len(c.token_ids_T) for c in completions), default=0)
        if longest > sampling.max_tokens:
            raise EngineError(
                f"engine {self._name!r} returned {longest} tokens where at most {sampling.max_tokens} were asked for.",
                fix="stop at sampling.max_tokens.",
            )
        for completion in completions:
            if wrong := self._wrong(completion):
                raise EngineError(
                    f"engine {self._name!r} returned {wrong}.",
                    fix="return what retrain.types.Completion describes.",
                )
        return completions

    def _wrong(self, completion: Completion) -> str:
        if completion.stop not in ("stop", "length"):
            return f"stop = {completion.stop!r}, not 'stop' or 'length'"
        if self._version is not None and completion.weights_version != self._version:
            return f"weights_version = {completion.weights_version!r} where version {self._version} was loaded"
        return _wrong_tokens(completion.token_ids_T, completion.logprobs_T, self._vocabulary)

    def release(self) -> None:
        release = getattr(self._inner, "release", None)
        if release is not None:
            with _named("engine", self._name, EngineError):
                release()

    def close(self) -> None:
        _close("engine", self._name, self._inner)


class _RememberingEngine(_OwnEngine):
    def state_dict(self) -> State:
        with _named("engine", self._name, EngineError):
            return self._inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        with _named("engine", self._name, EngineError):
            self._inner.load_state_dict(state)


class _OwnBackend:
    def __init__(self, name: str, inner: Any) -> None:
        self._name, self._inner = name, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    def facts(self) -> dict[str, str]:
        with _named("backend", self._name, LearnerError):
            return {str(key): str(value) for key, value in dict(self._inner.facts()).items()}

    def publish(self) -> Weights:
        with _named("backend", self._name, LearnerError):
            weights = self._inner.publish()
        return self._typed(weights, (SharedWeights, AdapterWeights, RemoteWeights), "publish", "Weights")

    def train_step(self, batch: TrainBatch, optim: OptimStep) -> StepReport:
        with _named("backend", self._name, LearnerError):
            report = self._inner.train_step(batch, optim)
        return _checked(self._name, self._typed(report, (StepReport,), "train_step", "a StepReport"))

    def save(self, directory: Path) -> None:
        self._write(self._inner.save, directory)

    def _write(self, write: Callable[[Path], object], directory: Path) -> None:
        """Have a checkpoint written; LearnerError where it holds no adapter."""
        with _named("backend", self._name, LearnerError, passes=_DISK):
            write(directory)
        adapter = directory / layout.ADAPTER
        if not adapter.is_dir() or not any(adapter.iterdir()):
            raise LearnerError(
                f"backend {self._name!r}: its save wrote no {layout.ADAPTER}/ into the checkpoint.",
                fix=f"write the adapter, in PEFT's format, into directory / {layout.ADAPTER!r}.",
            )

    def restore(self, directory: Any) -> None:
        with _named("backend", self._name, LearnerError):
            self._inner.restore(directory)

    def close(self) -> None:
        _close("backend", self._name, self._inner)

    def _typed(self, value: Any, wanted: Sequence[type], method: str, what: str) -> Any:
        if not isinstance(value, tuple(wanted)):
            raise LearnerError(
                f"backend {self._name!r}: its {method} returned a {type(value).__name__}.",
                fix=f"return {what} from retrain.types.",
            )
        return value


class _SnapshotBackend(_OwnBackend):
    def snapshot(self) -> Callable[[Path], None]:
        with _named("backend", self._name, LearnerError):
            write = self._inner.snapshot()
        if not callable(write):
            raise LearnerError(
                f"backend {self._name!r}: its snapshot returned a {type(write).__name__}.",
                fix="return a function that writes the copy into the directory it is given.",
            )
        return lambda directory: self._write(write, directory)


def _close(kind: str, name: str, part: Any) -> None:
    """Close a part; what it raises costs no run that has ended, and hides no error of one that has not."""
    try:
        part.close()
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises
        log.warning("%s This was while it was closed, and changes no result.", plugins.raised(kind, name, error))


def _checked(name: str, report: StepReport) -> StepReport:
    """The report with Python's own numbers; LearnerError for a field that holds something else than its type."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(report):
        given: Any = getattr(report, field.name)
        wanted, allowed = _PLAIN[str(field.type)]
        values[field.name] = given
        if given is None and wanted is float:
            continue
        # Of a bool Python makes a number without a word.
        if not isinstance(given, allowed) or (isinstance(given, bool) and wanted is not bool):
            raise LearnerError(
                f"backend {name!r}: its train_step reported {field.name} = {given!r}, not a value of type {field.type}.",
                fix="report what retrain.types.StepReport describes.",
            )
        values[field.name] = wanted(given)
        if wanted is float and not math.isfinite(values[field.name]):
            raise LearnerError(
                f"backend {name!r}: its train_step reported {field.name} = {given}.",
                fix="report None, and in update_skipped why the weights were not changed.",
            )
    return dataclasses.replace(report, **values)


_PLAIN: dict[str, tuple[type, tuple[type, ...]]] = {
    "str": (str, (str,)),
    "bool": (bool, (bool, np.bool_)),
    "int": (int, (numbers.Integral,)),
    "float | None": (float, (numbers.Real,)),
}
"""Types of a report's fields: what each becomes, and what it may come as."""


class _OwnSizer:
    def __init__(self, name: str, inner: Any, most: int) -> None:
        self._name, self._inner, self._most = name, inner, most

    def next(self) -> int:
        return self._size("next", 1)

    def out_of_memory(self, batch_size: int) -> int:
        return self._size("out_of_memory", 0, batch_size)

    def observe(self, seen: Sampled) -> dict[str, Any]:
        with self._named():
            metrics = dict(self._inner.observe(seen))
        wrong = next((key for key in metrics if not str(key).startswith("bp_")), None)
        if wrong is not None:
            raise RunError(
                f"backpressure {self._name!r}: its observe returned the metric {wrong!r}.",
                fix="begin the names of its metrics with bp_.",
            )
        return metrics

    def state_dict(self) -> State:
        with self._named():
            return self._inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        with self._named():
            self._inner.load_state_dict(state)

    def _named(self) -> _named:
        return _named("backpressure", self._name, RunError)

    def _size(self, method: str, least: int, *arguments: int) -> int:
        with self._named():
            size = cast("object", getattr(self._inner, method)(*arguments))
        most = arguments[0] - 1 if arguments else self._most
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or not least <= size <= most:
            raise RunError(
                f"backpressure {self._name!r}: its {method} returned {size!r}, not a whole number from {least} to {most}.",
                fix="return a number of tasks.",
            )
        return int(cast("int", size))
