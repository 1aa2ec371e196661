"""Environments, engines and backends of the user's own: made, and held to their protocols while a run goes on.

What they raise ends the run with a checkpoint and one line that names the plug-in, file and line; what they return is
checked where it arrives. Built-in ones pass through untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from retrain import plugins
from retrain.config.schema import Config
from retrain.errors import ConfigError, EngineError, LearnerError, RetrainError
from retrain.protocols import Backend, Engine, Environment, Renderer, State, Stateful
from retrain.types import (
    AdapterWeights,
    Capabilities,
    Completion,
    IntArray,
    OptimStep,
    RemoteWeights,
    Rollout,
    Sampling,
    SharedWeights,
    StepReport,
    Task,
    TrainBatch,
    Weights,
)


def make_environment(config: Config, renderer: Renderer) -> Environment:
    """The environment that ``environment.provider`` names: one question, one answer where it is empty."""
    name = config.environment.provider or "single_turn"
    made = plugins.make("environment", name, config, renderer)
    return _OwnEnvironment(name, made) if plugins.is_own("environment", name) else made


def make_engine(config: Config, renderer: Renderer) -> Engine:
    """The sampler that ``inference.engine`` names."""
    name = config.inference.engine
    made = plugins.make("engine", name, config, renderer)
    if not plugins.is_own("engine", name):
        return made
    return (_RememberingEngine if isinstance(made, Stateful) else _OwnEngine)(name, made)


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


class _named:
    """Turns what user code raises into one line that names the plug-in; RetrainErrors pass."""

    def __init__(self, kind: str, name: str, error: type[RetrainError]) -> None:
        self._kind, self._name, self._error = kind, name, error

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, (Exception, SystemExit)) and not isinstance(error, RetrainError):
            raise self._error(
                plugins.raised(self._kind, self._name, error), fix=f"correct the {self._kind}."
            ) from error


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


class _OwnEnvironment:
    def __init__(self, name: str, inner: Any) -> None:
        self._name, self._inner = name, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def attempt(self, task: Task, n: int, engine: Engine, sampling: Sampling) -> list[Rollout]:
        with _named("environment", self._name, EngineError):
            given = await self._inner.attempt(task, n, engine, sampling)
        rollouts: list[Rollout] = _listed(given, n, Rollout, "environment", self._name)
        first = sampling.noise.member
        for place, rollout in enumerate(rollouts):
            if rollout.member != first + place or rollout.task_id != task.id:
                raise EngineError(
                    f"environment {self._name!r} returned member {rollout.member} of {rollout.task_id!r} as member "
                    f"{first + place} of {task.id!r}.",
                    fix="keep the task's id, and number members from sampling.noise.member on.",
                )
        return rollouts


class _OwnEngine:
    def __init__(self, name: str, inner: Any) -> None:
        self._name, self._inner = name, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, weights: Weights) -> None:
        with _named("engine", self._name, EngineError):
            self._inner.load(weights)

    async def generate(self, prompt_ids: IntArray, n: int, sampling: Sampling) -> list[Completion]:
        with _named("engine", self._name, EngineError):
            given = await self._inner.generate(prompt_ids, n, sampling)
        completions: list[Completion] = _listed(given, n, Completion, "engine", self._name)
        longest = max((len(c.token_ids_T) for c in completions), default=0)
        if longest > sampling.max_tokens:
            raise EngineError(
                f"engine {self._name!r} returned {longest} tokens where at most {sampling.max_tokens} were asked for.",
                fix="stop at sampling.max_tokens.",
            )
        return completions

    def release(self) -> None:
        release = getattr(self._inner, "release", None)
        if release is not None:
            with _named("engine", self._name, EngineError):
                release()

    def close(self) -> None:
        with _named("engine", self._name, EngineError):
            self._inner.close()


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
        return self._typed(report, (StepReport,), "train_step", "a StepReport")

    def save(self, directory: Any) -> None:
        with _named("backend", self._name, LearnerError):
            self._inner.save(directory)

    def restore(self, directory: Any) -> None:
        with _named("backend", self._name, LearnerError):
            self._inner.restore(directory)

    def close(self) -> None:
        with _named("backend", self._name, LearnerError):
            self._inner.close()

    def _typed(self, value: Any, wanted: Sequence[type], method: str, what: str) -> Any:
        if not isinstance(value, tuple(wanted)):
            raise LearnerError(
                f"backend {self._name!r}: its {method} returned a {type(value).__name__}.",
                fix=f"return {what} from retrain.types.",
            )
        return value


class _SnapshotBackend(_OwnBackend):
    def snapshot(self) -> Any:
        with _named("backend", self._name, LearnerError):
            return self._inner.snapshot()
