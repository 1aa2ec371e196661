"""A campaign from its configuration to its end: the design written down first, then every run that is not done yet."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import platform
import shutil
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from retrain import cards
from retrain.campaign import (
    beforehand,
    cautions,
    forecast,
    manifest,
    outcomes,
    plan,
    rank,
    ray_cluster,
    table,
    tune,
)
from retrain.campaign.launchers import Ended, Job, Launcher, Processes
from retrain.campaign.manifest import Manifest
from retrain.campaign.plan import Plan, PlannedRun
from retrain.config import campaigns
from retrain.config.load import LoadedConfig, Override, dump_toml, load
from retrain.config.schema import Campaign, Config
from retrain.errors import ConfigError, ResumeError, RetrainError, RunError
from retrain.preflight import check_writable, expanded
from retrain.tracking import layout
from retrain.tracking.read import RunRecord
from retrain.tracking.run_log import write_atomically

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None

log = logging.getLogger("retrain")

_FULL = 2**24
"""A disk with fewer bytes left is full: the next checkpoint does not fit."""

_CAMPAIGN = "campaign"

RESUMABLE = ("parallel", "max_workers", "stagger_seconds", "launcher", "ray_address", "seeds")
"""Settings of [campaign] that may differ when a campaign goes on: how its runs are started, and more seeds."""


@dataclass(frozen=True, slots=True)
class CampaignResult:
    """How a campaign ended: "failed" when any run did. ``counts`` are runs per state."""

    status: Literal["done", "interrupted", "failed"]
    directory: Path
    counts: dict[str, int]


def execute(
    loaded: LoadedConfig, *, plain: bool = False, stop: threading.Event | None = None
) -> CampaignResult:
    """Run the campaign that ``loaded`` describes, or go on with the one in ``resume.from``."""
    stop = stop or threading.Event()
    if loaded.config.resume.from_:
        directory = expanded(loaded.config.resume.from_, "resume.from").resolve()
        manifest.read(directory)
        with _locked(directory), _logging(directory):
            return _continue(directory, loaded, plain=plain, stop=stop)
    root = _root(loaded)
    check_writable(root, "logging.log_dir")
    planned = plan.plan(plan.anchored(loaded), name=_CAMPAIGN)
    if campaigns.launcher(planned.campaign) == "ray":
        ray_cluster.check(planned.campaign.ray_address)
    told = forecast.forecast(planned)
    forecast.refuse_unfit(planned, told)
    declared = plan.declare(planned, _CAMPAIGN, threads=told.threads, tune=tune.declared(planned))
    directory = _new_directory(root)
    planned = plan.plan(planned.loaded, name=directory.name)
    declared = replace(declared, declared=replace(declared.declared, name=directory.name))
    with _locked(directory), _logging(directory):
        for line in (*planned.announcements, *forecast.lines(told, loaded.config)):
            log.info(line)
        for line in beforehand.notes(planned):
            log.info("note: %s", line)
        write_atomically(directory / layout.CONFIG, dump_toml(_stored(planned.loaded.config)))
        manifest.write(directory, declared)
        return _run(directory, planned, declared, plain=plain, stop=stop)


def _root(loaded: LoadedConfig) -> Path:
    given = "log_dir" in loaded.config.logging.model_fields_set
    return expanded(loaded.config.logging.log_dir if given else "logs", "logging.log_dir").absolute()


def _new_directory(root: Path) -> Path:
    """Make the folder of a new campaign; another one may begin in the same second."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    name, number = f"{_CAMPAIGN}_{stamp}", 1
    while True:
        directory = root / (name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir()
        except FileExistsError:
            number += 1
        else:
            return directory


def _stored(config: Config) -> Config:
    """The configuration as the campaign's directory keeps it: it loads back from any folder."""
    campaign = config.campaign or Campaign()
    launcher = campaigns.launcher(campaign)
    campaign = campaign.model_copy(update={"launcher": launcher})
    resume = config.resume.model_copy(update={"from_": ""})
    return config.model_copy(update={"campaign": campaign, "resume": resume})


def stored(directory: Path, overrides: Sequence[Override] = ()) -> LoadedConfig:
    """The configuration of the campaign in ``directory``; ResumeError where ``overrides`` would change its design."""
    for override in overrides:
        key = ".".join(override.path)
        if key != "resume.from" and key not in {f"campaign.{name}" for name in RESUMABLE}:
            raise ResumeError(
                f"{override.flag or key}: a campaign that goes on keeps its design.",
                fix=f"only {', '.join(RESUMABLE)} may differ; start a new campaign for another design.",
            )
    return load(directory / layout.CONFIG, overrides)


def keeps(directory: Path, path: Path | None) -> bool:
    """Is the file ``path`` the configuration that the campaign in ``directory`` keeps?"""
    return path is not None and path.resolve() == (directory / layout.CONFIG).resolve()


def _continue(directory: Path, loaded: LoadedConfig, *, plain: bool, stop: threading.Event) -> CampaignResult:
    known = manifest.read(directory)
    own = keeps(directory, loaded.path)
    campaign = loaded.config.campaign or Campaign()
    seeds, declared = known.seeds, known.declared.seeds
    is_typed = loaded.origins["campaign.seeds"].kind in ("flag", "mapping")
    if campaign.seeds[: len(seeds)] != seeds and (campaign.seeds != declared or is_typed):
        raise ResumeError(
            f"{directory} has the seeds {', '.join(map(str, seeds))}: they stay, and others may only follow them.",
            fix="list them first.",
        )
    added = campaign.seeds != declared and len(campaign.seeds) > len(seeds)
    if added:
        known = replace(known, added=campaign.seeds[len(declared) :])
    planned = plan.plan(
        loaded if own else plan.anchored(loaded), name=directory.name, seeds=known.seeds, chosen=known.chosen
    )
    before = None
    if not own:
        with contextlib.suppress(RetrainError):
            before = stored(directory).config
    plan.check_unchanged(planned, known.declared, before)
    if not own:
        if known.added and not added:
            log.info("The added seeds %s stay.", ", ".join(map(str, known.added)))
        for line in planned.announcements:
            log.info(line)
    root = directory / layout.CAMPAIGN_RUNS
    if not all(is_done(root / run.name, run.config.training.max_steps) for run in planned.runs):
        _check_tasks(planned, known)
        forecast.refuse_unfit(planned, forecast.forecast(_without_pilot(planned)))
    if added:
        log.info("Seeds beyond the declared ones: what is said about them is exploratory.")
        manifest.write(directory, known)
    return _run(directory, planned, known, plain=plain, stop=stop)


def _check_tasks(planned: Plan, known: Manifest) -> None:
    """ResumeError where tasks that a remaining run would be judged by are not those that were declared."""
    fixed = known.declared
    plan.check_tasks(fixed.evaluation, plan.evaluation(planned.runs[0].config), "held-out tasks")
    if fixed.tune and not known.chosen:
        now = tune.declared(planned) or {}
        plan.check_tasks(fixed.tune.get("evaluation", {}), now.get("evaluation", {}), "tasks that trials choose on")


def _without_pilot(planned: Plan) -> Plan:
    """The same runs without the earlier campaign that the design was made from, which may be gone by now."""
    campaign = planned.campaign.model_copy(update={"pilot": ""})
    config = planned.loaded.config.model_copy(update={"campaign": campaign})
    return replace(planned, loaded=replace(planned.loaded, config=config))


def _run(
    directory: Path, planned: Plan, known: Manifest, *, plain: bool, stop: threading.Event
) -> CampaignResult:
    if known.declared.tune and not known.chosen:
        known = _choose(directory, planned, known, plain=plain, stop=stop)
        planned = plan.plan(planned.loaded, name=directory.name, seeds=known.seeds, chosen=known.chosen)
    if not stop.is_set():
        known = _train(directory, planned, known, plain=plain, stop=stop)
    counts = outcomes.counts(outcomes.gather(directory, known))
    status: Literal["done", "interrupted", "failed"] = "done"
    if stop.is_set() and set(counts) != {"done"}:
        status = "interrupted"
    elif set(counts) != {"done"}:
        status = "failed"
    return CampaignResult(status, directory, counts)


def _train(directory: Path, planned: Plan, known: Manifest, *, plain: bool, stop: threading.Event) -> Manifest:
    """The campaign's own runs; with [squeeze] also the rank analysis of the first that is done."""
    root, settings = directory / layout.CAMPAIGN_RUNS, planned.loaded.config.squeeze
    analysis, kept = None, known

    def keep(found: Mapping[str, Any]) -> None:
        # At once: a campaign that is killed later need not find it again.
        nonlocal kept
        kept = replace(known, squeeze=found)
        manifest.write(directory, kept)

    if settings is not None and known.squeeze is None:
        analysis = rank.Analysis(directory, settings, known.declared.threads, keep)
        first = analysis.begun_with()
        for run in sorted(planned.runs, key=lambda run: run.name != first):
            if is_done(root / run.name, run.config.training.max_steps):
                analysis.begin(root / run.name)
    try:
        run_all(root, planned.runs, planned, known, plain=plain, stop=stop, analysis=analysis)
        if analysis is not None:
            analysis.wait(stop)
            if not analysis.run and not stop.is_set():
                log.warning("No run is done, so there is no adapter for the rank analysis of [squeeze].")
    finally:
        if analysis is not None:
            analysis.stop()
    return kept


def _choose(
    directory: Path, planned: Plan, known: Manifest, *, plain: bool, stop: threading.Event
) -> Manifest:
    """Bring the trials to their end, unless ``stop`` comes first, and write down what each condition chose."""
    runs = tune.planned_trials(planned)
    log.info("Trials first: %d runs choose %s for each condition.", len(runs), (known.declared.tune or {})["field"])
    # A trial whose process did not live to say how it ended gets a second one; then it counts at its last evaluation. One
    # that was refused gets it when the campaign is gone on with.
    for again in (False, True):
        open_ = tune.unfinished(directory, known)
        ended = outcomes.processes(directory) if again else {}
        todo = [run for run in runs if run.name in open_ and not (again and _was_told(ended.get(run.name, ())))]
        if todo and not stop.is_set():
            run_all(directory / layout.CAMPAIGN_TRIALS, todo, planned, known, plain=plain, stop=stop)
    if stop.is_set():
        return known
    for line in tune.told(directory, known):
        log.warning(line)
    known = replace(known, chosen=tune.choose(tune.trials(directory, known)))
    manifest.write(directory, known)
    for label, value in known.chosen.items():
        log.info("%s chose %s.", label, value)
    for line in cautions.at_edge(known.declared, known.chosen):
        log.warning(line)
    return known


def _was_told(ended: outcomes.Ends) -> bool:
    """Did the newest process say itself why it ended: an error of its own, or a refusal?"""
    return bool(ended) and ended[-1].get("code") in (1, outcomes.REFUSED)


def run_all(
    root: Path,
    runs: Sequence[PlannedRun],
    planned: Plan,
    known: Manifest,
    *,
    plain: bool,
    stop: threading.Event,
    analysis: rank.Analysis | None = None,
) -> None:
    """Bring every run below ``root`` that is not done to its end, resuming what was begun. The first that is done is what
    ``analysis`` is of."""
    todo = [run for run in runs if not is_done(root / run.name, run.config.training.max_steps)]
    finished = len(runs) - len(todo)
    if finished:
        log.info("%d of %d runs are done already.", finished, len(runs))
    if not todo:
        return
    root.mkdir(parents=True, exist_ok=True)
    _check_space(root)
    jobs = [_job(root, run) for run in todo]
    waiting = {run.name for run in todo}
    launcher = _launcher(root.parent, planned, known)
    shown = table.view(root, runs, [run.name for run in runs if run.name not in waiting], plain=plain)
    reasons: list[str] = []

    def ended(end: Ended) -> None:
        _note(root.parent, end, shown)
        reasons.append(end.why.replace(end.job.name, "") if end.code == outcomes.REFUSED else "")
        _check_alike(root.parent, reasons, len(jobs))
        if end.code == 0 and analysis is not None:
            analysis.begin(end.job.directory)

    def tick() -> None:
        shown.tick()
        if analysis is not None:
            analysis.poll()

    try:
        launcher.run(jobs, stop=stop, begun=shown.begun, ended=ended, tick=tick)
    finally:
        shown.close()


_ALIKE = 4
"""So many runs refused alike, and none that was not, stand for all others: they go through every condition in turn."""


def _check_alike(directory: Path, reasons: Sequence[str], jobs: int) -> None:
    """RunError when the first runs of this start were all refused for one reason, which ``reasons`` holds for each that
    ended ("": it was not refused)."""
    if len(reasons) == _ALIKE < jobs and len(set(reasons)) == 1 and reasons[0]:
        raise RunError(
            f"the first {_ALIKE} runs were refused alike, so no further one is started: {reasons[0]}",
            fix=f"where that is a setting, correct it in a new campaign; else go on with: retrain --resume {directory}",
        )


def _job(root: Path, run: PlannedRun) -> Job:
    directory = root / run.name
    config = root / f"{run.name}.toml"
    write_atomically(config, dump_toml(plan.placed(run, directory)), durable=False)
    return Job(run.name, config, directory, root.parent / layout.CAMPAIGN_OUTPUT / f"{run.name}.txt")


def is_done(directory: Path, max_steps: int) -> bool:
    """Has the run in ``directory`` come to its end?"""
    if not layout.holds_run(directory):
        return False
    run = RunRecord(directory)
    return run.state == "done" and run.facts.get("step") == max_steps


def _launcher(directory: Path, planned: Plan, known: Manifest) -> Launcher:
    config, campaign = planned.loaded.config, planned.campaign
    on_cpu = config.backend.devices == "cpu"
    how = campaigns.launcher(campaign)
    if how == "ray":
        from retrain.campaign.ray_launcher import RayTasks

        return RayTasks(
            directory,
            threads=known.declared.threads,
            gpus=ray_cluster.gpus(config.backend.devices, campaign.ray_address),
            workers=campaign.max_workers,
            address=campaign.ray_address,
            stagger_s=campaign.stagger_seconds,
        )
    devices = [] if on_cpu else cards.visible()
    return Processes(
        workers=forecast.workers(planned),
        threads=known.declared.threads,
        devices=devices if how == "processes" else (),
        stagger_s=campaign.stagger_seconds if how == "processes" else 0.0,
    )


def _note(directory: Path, end: Ended, shown: table.View) -> None:
    """Keep what a process used: the cost of the campaign is their sum. RunError where the disk is full."""
    record: dict[str, Any] = {
        "name": end.job.name, "code": end.code, "seconds": round(end.seconds, 3), "cpu_s": end.cpu_s,
        "peak_bytes": end.peak_bytes, "time": time.time(), "why": end.why, "host": end.host or platform.node(),
        "step": RunRecord(end.job.directory).facts.get("step", 0),
    }  # fmt: skip
    path = directory / layout.CAMPAIGN_PROCESSES
    try:
        # A campaign that was killed may have left half a line.
        with path.open("a+b") as file:
            end_of_line = b"\n" if _is_torn(file) else b""
            file.write(end_of_line + json.dumps(record).encode() + b"\n")
    except OSError as error:
        log.warning("%s cannot be written: %s.", path, error.strerror or error)
    shown.ended(end)
    if end.code not in (0, 130) and shutil.disk_usage(directory).free < _FULL:
        raise RunError(
            f"{directory}: the disk is full, so no further run is started.",
            fix=f"make room, then go on with: retrain --resume {directory}",
        )


def _is_torn(file: IO[bytes]) -> bool:
    """Does the file end in the middle of a line?"""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    return size > 0 and file.read() != b"\n"


def _check_space(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < 2**28:
        raise ConfigError(f"{root}: only {free / 2**20:.0f} MB are free there.", fix="make room, or give another --log-dir.")


@contextmanager
def _locked(directory: Path) -> Generator[None]:
    """Hold the campaign against another process that would start the same runs."""
    try:
        file = (directory / layout.LOCK).open("a")
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written: {error.strerror or error}.",
            fix="make it writable: a campaign that goes on writes there. `retrain status` and `retrain report` read it as it is.",
        ) from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                    raise ConfigError(
                        f"another process is running the campaign in {directory}.", fix="wait for it, or stop it."
                    ) from error
                raise ConfigError(
                    f"{directory}: its file system gives no file locks: {error.strerror or error}.",
                    fix="mount it with locks, or give a logging.log_dir on another file system.",
                ) from error
        yield


@contextmanager
def _logging(directory: Path) -> Generator[None]:
    """Show the package's log on the console and keep it in the campaign's events.log."""
    from retrain.runner import EventsFile
    from retrain.sinks import ConsoleHandler

    file = EventsFile(directory / layout.EVENTS, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = ConsoleHandler()
    console.setLevel(logging.INFO)
    before, log.propagate = log.propagate, False
    log.setLevel(logging.DEBUG)
    for handler in (file, console):
        log.addHandler(handler)
    try:
        yield
    except RetrainError as error:
        log.debug("%s", error)
        raise
    except Exception as error:
        log.debug("bug: %s", error, exc_info=error)
        raise
    finally:
        log.propagate = before
        for handler in (file, console):
            log.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()
