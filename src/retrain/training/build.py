"""The one constructor: turns a configuration into the parts of a run. Cheap parts are made first, so that a
wrong path or reward is found before a model loads."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import subprocess
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from retrain import __version__, plugins
from retrain.adapter_settings import check_start_adapter
from retrain.algorithms import credit
from retrain.config import names
from retrain.config.own import named_plugins
from retrain.config.schema import Config
from retrain.config.tables import suites, training_rewards
from retrain.environments.mixture import table_tasks, training_tasks
from retrain.environments.sources import TaskCursor, digest_of, load_tasks
from retrain.errors import ConfigError, DataError
from retrain.protocols import Renderer, Sink
from retrain.tracking import layout
from retrain.tracking.rollouts import RolloutStore
from retrain.tracking.run_log import RunLog
from retrain.training.checkpoint import Checkpoints
from retrain.training.evaluate import Evaluator, Suites
from retrain.training.loop import Parts
from retrain.training.own_parts import make_backend, make_engine, make_environment, make_sizer
from retrain.training.rollout import EventLoop
from retrain.types import NoiseKey, Sampling, Task

log = logging.getLogger("retrain")

Check = Callable[[Renderer, Sequence[Task], Sequence[Task]], None]

_VERSIONED = (
    "torch", "transformers", "peft", "numpy", "safetensors", "tokenizers",
    "bitsandbytes", "flash-attn", "datasets", "reasoning-gym", "math-verify",
)  # fmt: skip


def facts() -> dict[str, Any]:
    """Versions and machine of this start, without importing any of the packages."""
    found: dict[str, Any] = {
        "retrain": __version__,
        "python": platform.python_version(),
        "machine": _processor(),
    }
    for package in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["code"] = _code()
    found["git"] = _git()
    return found


def _code() -> str:
    """Digest of the package's own source files: says whether two runs ran the same code, committed or not."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return f"{platform.machine()} {platform.processor()}".strip()


def _git() -> str:
    """Commit of the package's own checkout, "" for an installed copy."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "src"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def sampling_of(config: Config, renderer: Renderer, *, temperature: float) -> Sampling:
    """Every sampling setting of a request, stated; the noise key is filled in per step and task."""
    training = config.training
    return Sampling(
        temperature=temperature,
        top_p=training.top_p,
        max_tokens=training.max_tokens,
        stop_ids=tuple(renderer.stop_ids),
        stop=tuple(training.stop),
        want_entropy=config.algorithm.uncertainty_kind == "shannon_entropy"
        # Asked of one's own engine too, which leaves out what it does not know.
        or config.inference.engine not in names.LATER["engine"],
        noise=NoiseKey(0, 0, 0),
    )


def evaluator(config: Config, renderer: Renderer) -> Evaluator | Suites | None:
    """The held-out tasks of [eval] and of its suites, None when there are none to run."""
    main = _main_evaluator(config, renderer) if config.eval.source else None
    further = tuple(
        _evaluator_of(
            config, renderer, table_tasks(table, table.split, config.data, "eval.suites"),
            examples=table.examples, samples=table.samples, temperature=table.temperature or config.eval.temperature,
            name=table.label, prefix=f"eval/{table.label}",
        )
        for table in suites(config)
    )  # fmt: skip
    return Suites(main, further) if further else main


def _main_evaluator(config: Config, renderer: Renderer) -> Evaluator:
    section = config.eval
    data = config.data.model_copy(
        update={
            "source": section.source,
            "path": section.path or (config.data.path if section.source == config.data.source else ""),
            "split": section.split,
            "levels": section.levels or config.data.levels,
        }
    )
    try:
        held_out = load_tasks(data, section.split)
    except DataError as error:
        # The sources know one section; these tasks come from the other.
        raise DataError(
            error.message.replace("data.", "eval."), fix=error.fix.replace("data.", "eval.")
        ) from error
    return _evaluator_of(
        config, renderer, held_out,
        examples=section.examples, samples=section.samples, temperature=section.temperature,
        name=f"{section.source}/{section.split}", prefix="eval", skip=section.skip,
    )  # fmt: skip


def _evaluator_of(
    config: Config, renderer: Renderer, held_out: Sequence[Task],
    *, examples: int, samples: int, temperature: float | None, name: str, prefix: str, skip: int = 0,
) -> Evaluator:  # fmt: skip
    if skip >= len(held_out):
        raise DataError(
            f"eval.skip = {skip} passes over all {len(held_out)} held-out tasks.", fix="lower it, or name another eval.split."
        )
    # A seeded draw, not the first ones: a file's first rows are rarely a fair sample of it.
    chosen = TaskCursor(held_out, seed=config.eval.seed, shuffle=True).take(
        min(skip + (examples or len(held_out)), len(held_out))
    )[skip:]
    sampling = sampling_of(config, renderer, temperature=temperature or config.training.temperature)
    return Evaluator(
        tasks=tuple(chosen),
        samples=samples,
        sampling=replace(sampling, want_entropy=False, max_tokens=config.eval.max_tokens or sampling.max_tokens),
        seed=config.eval.seed,
        correct_at=config.reward.correct_at,
        name=name,
        prefix=prefix,
    )


@contextlib.contextmanager
def build(config: Config, run_dir: Path, *, clear: bool, plain: bool, check: Check) -> Generator[Parts]:
    """Make every part of a run, in the order in which they can fail cheaply; close them all at the end.

    ``check`` sees renderer, training tasks and held-out tasks before a model loads, and may refuse them.
    """
    with contextlib.ExitStack() as stack:
        check_start_adapter(config)
        log.info("Loading tokenizer for %s ...", config.model.model)
        renderer = plugins.load("renderer", "chat")(
            config.model.model, revision=config.model.revision, template_args=config.data.template_args
        )
        log.info("Loading dataset...")
        tasks, task_source = training_tasks(config)
        log.info("Loaded %d examples", len(tasks))
        held_out = evaluator(config, renderer)
        check(renderer, tasks, held_out.tasks if held_out else ())
        trackers = _start_trackers(config, run_dir, stack)
        events = EventLoop()
        stack.callback(events.close)
        reward = plugins.load("reward", "routed")(config, renderer)
        _close_with(stack, reward)
        check_bounds(config, getattr(reward, "bounds", None))
        environment = make_environment(config, renderer)
        algorithm = credit.build(config, renderer)
        schedule = credit.build_schedule(config)
        sizer = make_sizer(config)
        backend = make_backend(config, renderer)
        stack.callback(backend.close)
        engine = make_engine(config, renderer)
        stack.callback(engine.close)
        if clear:
            # Only now, when everything could be made: a mistake must not cost the run that stands here.
            layout.clear(run_dir)
        layout.forget_trackers(run_dir)
        log.info("Ready (backend=%s, engine=%s).", config.backend.backend, config.inference.engine)
        sinks: list[Sink] = [
            plugins.load("sink", "console")(total_steps=config.training.max_steps, plain=plain),
            *trackers,
        ]
        run_log = RunLog(
            run_dir,
            renderer,
            sinks,
            generations=config.logging.generations,
            store=RolloutStore(
                run_dir, limit_mb=config.logging.rollouts_mb, temperature=config.training.temperature
            )
            if config.logging.rollouts
            else None,
            judge=partial(credit.correct, correct_at=algorithm.correct_at),
        )
        stack.callback(run_log.close)
        yield Parts(
            backend=backend,
            engine=engine,
            environment=environment,
            reward=reward,
            tasks=task_source,
            algorithm=algorithm,
            schedule=schedule,
            sizer=sizer,
            sampling=sampling_of(config, renderer, temperature=config.training.temperature),
            evaluator=held_out,
            checkpoints=Checkpoints(run_dir, keep=config.training.keep_checkpoints),
            log=run_log,
            events=events,
            facts={
                **facts(),
                "tokenizer": renderer.fingerprint,
                "schedule_steps": str(config.training.max_steps)
                if config.training.lr_schedule != "constant"
                else "",
                "train_tasks": digest_of(tasks),
                "eval_tasks": digest_of(held_out.tasks) if held_out else "",
                "reward_code": getattr(reward, "code_digest", ""),
                "plugins": ", ".join(map(" ".join, plugins.digests(named_plugins(config)).items())),
                "planning": getattr(algorithm.detector, "fingerprint", ""),
                **backend.facts(),
            },
        )


def check_bounds(config: Config, bounds: tuple[float, float] | None) -> None:
    """ConfigError when rewards of training tasks are known to leave the range that the advantage is derived for."""
    maxrl = config.algorithm.advantage_mode == "maxrl" and not config.algorithm.algorithm_mode
    if maxrl and bounds is not None and not (bounds[0] >= 0 and bounds[1] <= 1):
        composite = "composite" in training_rewards(config)
        raise ConfigError(
            f'algorithm.advantage_mode = "maxrl" is derived for rewards in [0, 1]; these lie in '
            f"[{bounds[0]:g}, {bounds[1]:g}].",
            fix='write advantage_mode = "grpo", or '
            + (
                "change the weights of reward.parts and reward.penalty."
                if composite
                else "use another reward."
            ),
        )


def _start_trackers(config: Config, run_dir: Path, stack: contextlib.ExitStack) -> list[Sink]:
    """Start every tracker before a model loads; those of a run that is replaced come back if this one fails."""
    layout.put_trackers_back(run_dir)
    if not config.resume.from_:
        layout.set_trackers_aside(run_dir)
    stack.callback(layout.put_trackers_back, run_dir)
    wanted = [*config.logging.trackers, *(["wandb"] if config.logging.wandb_project else [])]
    started: list[Sink] = []
    for name in dict.fromkeys(wanted):
        started.append(plugins.make("sink", name, config, run_dir))
        stack.callback(_close_sink, started[-1])
    return started


def _close_sink(sink: Sink) -> None:
    """Close a sink, perhaps for the second time: the run's log closes those of a run that began, and warns."""
    try:
        sink.close()
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises
        log.debug("%s failed to close: %s", type(sink).__name__, error)


def _close_with(stack: contextlib.ExitStack, part: Any) -> None:
    close = getattr(part, "close", None)
    if close is not None:
        stack.callback(close)
