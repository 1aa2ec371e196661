"""Load, preflight, build, loop: what the command line and ``run()`` call."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import platform
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from retrain import plugins, preflight
from retrain.config.load import LoadedConfig, dump_toml, load
from retrain.config.schema import Config
from retrain.config.squeezes import is_squeeze
from retrain.errors import ConfigError, RetrainError, RunError, UsageError
from retrain.sinks import ConsoleHandler
from retrain.tracking import layout
from retrain.tracking.heartbeat import Pulse
from retrain.tracking.run_log import write_atomically
from retrain.training.build import build
from retrain.training.loop import Parts, train
from retrain.types import RunResult, Task

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None

log = logging.getLogger("retrain")

_LOCK_TRIES = 5
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
"""What a full or closed disk says. Any other OSError (a lost connection, a time-out) is not about writing."""


async def run(
    config: Config | Mapping[str, Any] | str | Path, *, overwrite: bool = False, fork: bool = False
) -> RunResult:
    """Train as ``config`` says (a Config, a nested mapping, or the path of a TOML file).

    The loop itself is plain and runs in a thread, so that other coroutines go on. Errors are RetrainError.
    """
    loaded = load(config)
    stop = threading.Event()
    try:
        return await asyncio.to_thread(execute, loaded, overwrite=overwrite, fork=fork, plain=True, stop=stop)
    except asyncio.CancelledError:
        stop.set()
        raise


def execute(
    loaded: LoadedConfig,
    *,
    overwrite: bool = False,
    fork: bool = False,
    debug: bool = False,
    plain: bool = False,
    stop: threading.Event | None = None,
    for_campaign: bool = False,
) -> RunResult:
    """Run one training run to its end; ``stop`` ends it cleanly after the present step. ``for_campaign``: its campaign starts
    it; without that a run of a campaign is left alone."""
    config = loaded.config
    if is_squeeze(config):
        raise UsageError("this configuration is a squeeze, and no training run.", fix="retrain squeeze CONFIG.")
    stop = stop or threading.Event()
    place = preflight.choose_directory(config, overwrite=overwrite, fork=fork)
    if place.how != "new" and not for_campaign:
        _refuse_part_of_campaign(place.directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_trace(place.directory))
        preflight.check_writable(place.directory, "logging.log_dir")
        # Made absolute, so that the recorded configuration finds the same plug-ins from any folder.
        config = preflight.anchored(config, loaded.path)
        config = _with(config, "plugins", search_paths=tuple(str(p.resolve()) for p in loaded.search_paths))
        plugins.add_search_paths(loaded.search_paths)
        preflight.check_plugins(config)
        if config.backend.adapter_path:
            preflight.check_writable(Path(config.backend.adapter_path), "backend.adapter_path")
        stack.enter_context(_locked(place.directory))
        stack.enter_context(_logging(place.directory, debug=debug, resuming=place.how == "resume"))
        begun = stack.enter_context(_starting(place.directory, config.training.max_steps))
        if place.note:
            log.info(place.note)
        for line in loaded.announcements:
            log.info(line)
        config = _with(config, "logging", log_dir=str(place.directory))
        return _run(config, place, origins=origins_of(loaded), plain=plain, stop=stop, begun=begun)


def _refuse_part_of_campaign(directory: Path) -> None:
    """By itself a run would go on with other threads than its campaign's others and outside its account of costs, and could
    take steps that were not declared."""
    campaign = layout.campaign_of(directory)
    if campaign is not None:
        raise ConfigError(
            f"{directory} is a run of the campaign {campaign}, which goes on with it as with its others.",
            fix=f"retrain --resume {campaign}. To go on with this run alone, copy its folder to another place and resume that.",
        )


def origins_of(loaded: LoadedConfig) -> dict[str, str]:
    """Where each value that is no default came from: ``{"training.lr": "retrain.toml:12"}``."""
    return {
        key: o.where or "a mapping"
        for key, o in sorted(loaded.origins.items())
        if o.kind != "default" and key != "resume.from"
    }


def _origins_before(directory: Path) -> dict[str, str] | None:
    """What the first start of the run in ``directory`` recorded; None where it recorded none."""
    try:
        found = json.loads((directory / layout.RUN).read_text(encoding="utf-8")).get("origins")
    except (OSError, ValueError, AttributeError):
        return None
    return cast("dict[str, str]", found) if isinstance(found, dict) else None


def _run(
    config: Config,
    place: preflight.Place,
    *,
    origins: Mapping[str, str],
    plain: bool,
    stop: threading.Event,
    begun: Callable[[], None],
) -> RunResult:
    directory = place.directory
    start = 0
    if place.how == "resume":
        # A resume reads config.toml, which knows values and not where they were first written; flags are its own.
        known = _origins_before(directory)
        if known is not None:
            origins = known | {key: where for key, where in origins.items() if where.startswith("--")}
    before = load(directory / layout.CONFIG).config if place.how == "resume" else None
    if config.training.seed < 0:
        seed = secrets.randbelow(2**31) if before is None else before.training.seed
        config = _with(config, "training", seed=seed)
        log.info("training.seed = -1: the seed is %d (recorded in %s).", seed, layout.CONFIG)
    if before is not None:
        preflight.check_resume(before, config)

    def check(renderer: Any, tasks: Sequence[Task], held_out: Sequence[Task]) -> None:
        # By now the model's config.json is here, and its weights are not loaded yet.
        preflight.check_fit(config)
        preflight.check_lengths(config, renderer, (*tasks, *held_out), renderer.context_length)
        for line in preflight.advice(config, tasks, held_out, renderer.ignored_generation_settings):
            log.info("note: %s", line)

    with build(config, directory, clear=place.how == "overwrite", plain=plain, check=check) as parts:
        if before is not None:
            start = _restore(config, parts)
        write_atomically(directory / layout.CONFIG, dump_toml(_with(config, "resume", from_="")))
        begun()
        parts.log.begin(
            {
                "facts": parts.facts,
                "started_at_step": start,
                "max_steps": config.training.max_steps,
                "origins": dict(origins),
            }
        )
        status: Literal["done", "interrupted", "failed"] = "failed"
        try:
            status = train(config, parts, stop)
            _save_adapter(config, directory, parts)
        except OSError as error:
            status = "failed"
            if error.errno not in _UNWRITABLE:
                raise
            raise RunError(
                f"{error.filename or directory} cannot be written: {error.strerror or error}.",
                fix="make room or correct the permissions, then "
                + (
                    f"go on with: retrain --resume {directory}"
                    if any((directory / layout.CHECKPOINTS).glob("step_*"))
                    else "start it again: no checkpoint was written yet (training.save_every)."
                ),
            ) from error
        finally:
            # A full disk must not hide the first error.
            with contextlib.suppress(OSError):
                parts.log.status(status, step=parts.counters.step)
        return RunResult(status, parts.counters.step, str(directory), parts.log.latest)


def _restore(config: Config, parts: Parts) -> int:
    """Bring every part back to the newest intact checkpoint and say whether the rest will be byte-exact."""
    path, state = parts.checkpoints.newest()
    step = int(state["step"])
    preflight.check_steps(config, step)
    preflight.check_model(state["facts"], parts.facts)
    parts.backend.restore(path)
    for name, part in parts.stateful.items():
        part.load_state_dict(state[name])
    parts.log.cut_rollouts(step)
    parts.checkpoints.discard_after(step)
    log.info("Resuming %s after %d steps from %s.", parts.log.directory, step, path.name)
    reasons = preflight.inexact_on_resume(
        config, state["facts"], parts.facts,
        step=step, evaluated_at=parts.counters.evaluated_at, reward_errors=parts.counters.reward_errors,
    )  # fmt: skip
    if step >= config.training.max_steps:
        log.info("All %d steps are done: nothing is left to train. --max-steps N goes on to N.", step)
    parts.facts["inexact"] = reasons
    log.info("byte-exact: %s", "no, because " + "; ".join(reasons) + "." if reasons else "yes")
    return step


def _save_adapter(config: Config, directory: Path, parts: Parts) -> None:
    """Copy the adapter of the newest checkpoint to where the user wants the final one."""
    path, _ = parts.checkpoints.newest()
    if not (path / layout.ADAPTER).is_dir():
        raise RunError(
            f"{path} holds no {layout.ADAPTER}/: backend {config.backend.backend!r} wrote none.",
            fix=f"have its save write the adapter into directory / {layout.ADAPTER!r}.",
        )
    target = Path(config.backend.adapter_path) if config.backend.adapter_path else directory / layout.ADAPTER
    target.mkdir(parents=True, exist_ok=True)
    # File by file: the folder is the user's and may hold more than an adapter.
    for source in sorted((path / layout.ADAPTER).iterdir()):
        temporary = target / f".{source.name}.tmp"
        shutil.copyfile(source, temporary)
        temporary.replace(target / source.name)
    log.info("Adapter: %s", target)


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


@contextmanager
def _without_trace(directory: Path) -> Generator[None]:
    """Remove a directory that this run made where it is refused before it has begun."""
    is_new = not directory.exists()
    try:
        yield
    except RetrainError as error:
        if is_new and error.exit_code == 2:
            with contextlib.suppress(OSError):
                if {path.name for path in directory.iterdir()} <= {layout.LOCK, layout.EVENTS}:
                    for path in list(directory.iterdir()):
                        path.unlink()
                    directory.rmdir()
        raise


@contextmanager
def _starting(directory: Path, max_steps: int) -> Generator[Callable[[], None]]:
    """Beat while the run loads; it calls what this yields when its own heart begins. A start that comes to nothing
    leaves the file as it was."""
    path = directory / layout.HEARTBEAT
    before = path.read_bytes() if path.is_file() else None
    pulse = Pulse(path, memory=dict)
    has_begun = False

    def begun() -> None:
        nonlocal has_begun
        has_begun = True
        pulse.stop()

    pulse.start(
        {
            "pid": os.getpid(),
            "host": platform.node(),
            "started": time.time(),
            "max_steps": max_steps,
            "starting": True,
        }
    )
    try:
        yield begun
    finally:
        if not has_begun:
            pulse.stop()
            with contextlib.suppress(OSError):
                if before is not None and (directory / layout.RUN).exists():
                    path.write_bytes(before)
                else:
                    path.unlink()


@contextmanager
def _locked(directory: Path) -> Generator[None]:
    """Hold the run directory against other processes; ConfigError when one writes there already."""
    with (directory / layout.LOCK).open("a") as file:
        if fcntl is not None:
            for tries_left in reversed(range(_LOCK_TRIES)):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if tries_left:
                        # `retrain status` touches the lock for an instant to see whether a run lives.
                        time.sleep(0.05)
                        continue
                    raise ConfigError(
                        f"another process is writing the run in {directory}.",
                        fix="wait for it, stop it, or give another --log-dir.",
                    ) from error
        yield


class EventsFile(logging.FileHandler):
    """events.log, which a full disk leaves behind without a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that cannot be written; show any other failure."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def _logging(directory: Path, *, debug: bool, resuming: bool = False) -> Generator[None]:
    """Show the package's log on the console and keep all of it in events.log."""
    file = EventsFile(directory / layout.EVENTS, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = ConsoleHandler()
    console.setLevel(logging.DEBUG if debug else logging.INFO)
    handlers: Sequence[logging.Handler] = (file, console)
    before, log.propagate = log.propagate, False
    log.setLevel(logging.DEBUG)
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except RetrainError as error:
        if resuming and error.exit_code == 2:
            # A mistake in a command is no event of the run that it was about.
            log.debug("Not resumed: %s", str(error).replace("\n", " "))
        else:
            log.debug("%s", error, exc_info=error)
        raise
    except Exception as error:
        log.debug("bug: %s", error, exc_info=error)
        raise
    finally:
        log.propagate = before
        for handler in handlers:
            log.removeHandler(handler)
            # What events.log still buffered may find a full disk, which must not hide the first error.
            with contextlib.suppress(OSError):
                handler.close()
