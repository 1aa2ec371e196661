"""The parts of a run that need no model, for the commands that look before a run: made as ``training/build.py`` makes
them. Leaves out: learner, sampler, trackers, and every file of a run directory."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass

from retrain import machine, plugins
from retrain.algorithms import credit
from retrain.algorithms.credit import Algorithm
from retrain.algorithms.sepa import SepaSchedule
from retrain.config.own import named_plugins
from retrain.config.schema import Config
from retrain.environments.mixture import training_tasks
from retrain.errors import ConfigError, PluginError
from retrain.protocols import Environment, Renderer, Reward, TaskSource
from retrain.training.build import evaluator
from retrain.training.own_parts import make_environment
from retrain.types import Task

log = logging.getLogger("retrain")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of besides its model. ``tasks`` are all training tasks, ``source`` deals them out, and
    ``held_out`` are those of evaluations."""

    renderer: Renderer
    tasks: tuple[Task, ...]
    source: TaskSource
    held_out: tuple[Task, ...]
    environment: Environment
    reward: Reward
    algorithm: Algorithm
    schedule: SepaSchedule


@contextlib.contextmanager
def parts(config: Config, *, model_follows: bool = False) -> Generator[Parts]:
    """Make the parts and close them at the end; errors are those that the run would raise. ``model_follows``: this process
    will load the model as well."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_torch())
        renderer = load_renderer(config, model_follows=model_follows)
        tasks, source = training_tasks(config)
        held_out = evaluator(config, renderer)
        reward = plugins.load("reward", "routed")(config, renderer)
        stack.callback(close, reward)
        yield Parts(
            renderer=renderer,
            tasks=tuple(tasks),
            source=source,
            held_out=tuple(held_out.tasks) if held_out else (),
            environment=make_environment(config, renderer),
            reward=reward,
            algorithm=credit.build(config, renderer),
            schedule=credit.build_schedule(config),
        )


def load_renderer(config: Config, *, model_follows: bool = False) -> Renderer:
    """The run's tokenizer and chat template; in a ``without_torch`` block without torch, where nothing else may want it."""
    light = _light.get()
    hidden = contextlib.nullcontext()
    if light is not None and not model_follows and _torch_is_idle(config):
        light.used, hidden = True, _torch_hidden()
    with hidden:
        return plugins.load("renderer", "chat")(
            config.model.model, revision=config.model.revision, template_args=config.data.template_args
        )


def close(part: object) -> None:
    """Close a part that can be closed."""
    if (end := getattr(part, "close", None)) is not None:
        end()


def check_trackers(config: Config) -> str:
    """Names of the trackers that the run would start; PluginError for one that is not installed, ConfigError where wandb
    would refuse. None is started."""
    wanted = [*config.logging.trackers, *(["wandb"] if config.logging.wandb_project else [])]
    for name in wanted:
        if not plugins.is_own("sink", name) and importlib.util.find_spec(name) is None:
            raise PluginError(f"tracker {name!r} is not installed.", fix=f'pip install "retrain[{name}]".')
    refusal = machine.ask_wandb() if "wandb" in wanted else ""
    if refusal:
        raise ConfigError(
            f"tracker 'wandb' would not start: {refusal}.",
            fix="run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline and upload later.",
        )
    if refusal is None:
        log.warning("wandb gives no answer: whether it is logged in is not known.")
    return ", ".join(dict.fromkeys(wanted))


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def held_warnings() -> Generator[list[str]]:
    """What the package warns of meanwhile, instead of on stderr."""
    handler = _Warnings()
    before, propagate = log.handlers[:], log.propagate
    log.handlers[:], log.propagate = [handler], False
    try:
        yield handler.lines
    finally:
        log.handlers[:], log.propagate = before, propagate


def _torch_is_idle(config: Config) -> bool:
    """Nothing in this process but the tokenizer could ask transformers for torch, and neither is loaded yet."""
    if "transformers" in sys.modules or "torch" in sys.modules:
        return False
    own = named_plugins(config) or (config.reward.type == "custom" and not config.reward.isolate)
    return not own and config.planning.detector == "regex"


class _Light:
    """A ``without_torch`` block; ``used`` once a tokenizer was loaded so."""

    used = False


_light: ContextVar[_Light | None] = ContextVar("light", default=None)


@contextlib.contextmanager
def without_torch() -> Generator[None]:
    """Inside, a tokenizer is loaded without torch; at the end transformers, half imported for that, is forgotten, so that
    this process can still run a model. What was loaded stays usable."""
    if _light.get() is not None:
        yield
        return
    light = _Light()
    token = _light.set(light)
    try:
        yield
    finally:
        _light.reset(token)
        if light.used:
            for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
                del sys.modules[name]
            # The next import adds its own.
            logging.getLogger("transformers").handlers.clear()


@contextlib.contextmanager
def _torch_hidden() -> Generator[None]:
    """transformers imports torch wherever it is installed, which takes seconds; its tokenizers work without."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] - what Python's import calls absent
    try:
        yield
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before
