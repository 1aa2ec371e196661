"""What a campaign will take, told before its first run: runs, time, tokens, memory of the runs at once, and whether they fit."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from retrain import cards, estimate, machine, preflight
from retrain.campaign import plan, ray_cluster, tune
from retrain.campaign.plan import Plan, PlannedRun
from retrain.campaign.sight import Sight, describe, sight
from retrain.cards import Device
from retrain.config import campaigns
from retrain.config.schema import Campaign, Config
from retrain.errors import ConfigError, ModelError
from retrain.estimate import Estimate, Interval

_START = Interval(3.0, 15.0)
"""Seconds of a processor from the start of a run's process to its first step, without its weights: mostly the import of torch,
transformers and peft. Measured at 2.5 GHz: 4 until the configuration is checked, 8 with the tiny model built."""
_BUSY = 1.25
"""From so many times as long on, it is said that other programs use the processors."""
_READ = (5e9, 2e8)
"""Bytes a second at which weights come from memory or from a disk."""
_SHORT = 0.2
"""Share of max_tokens that answers have at least on average, as in an estimate."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of the runs at once on one device, in bytes: ``certain`` cannot be avoided by a run, ``peak`` is expected of it,
    ``device`` is what there is. ``together`` runs share a device, of which ``fit`` run for certain and ``easily`` do so at
    their peak."""

    certain: int
    peak: int
    device: int
    together: int
    fit: int
    easily: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """``steps`` of each of ``runs``, and ``trials`` of ``trial_steps`` before them. ``workers`` at once on ``devices`` (the
    number of GPUs; 0: the CPU), ``threads`` each. ``wall`` seconds of all, ``spent`` seconds of all runs one after the other,
    ``tokens`` sampled; None where the device's speed, or the model, is unknown. ``estimates`` by condition.
    ``start`` seconds that each process takes until its first step, with those that start beside it; they are in the others.
    ``announced`` is worth knowing, ``unknown`` stays open."""

    conditions: int
    seeds: int
    runs: int
    steps: int
    trials: int
    trial_steps: int
    launcher: Literal["serial", "processes", "ray"]
    workers: int
    devices: int
    device: Device
    threads: int
    wall: Interval | None
    spent: Interval | None
    start: Interval | None
    tokens: Interval
    room: Room | None
    sight: Sight
    estimates: dict[str, Estimate]
    announced: tuple[str, ...]
    unknown: tuple[str, ...]


def forecast(planned: Plan, device: Device | None = None) -> Forecast:
    """What the campaign will take on this machine, or on cards like ``device``. Loads no model and reads no data; ConfigError
    for a pilot that says nothing."""
    config, campaign = planned.loaded.config, planned.campaign
    how = campaigns.launcher(campaign)
    trials = tune.planned_trials(planned) if campaigns.tuned(campaign)[1] else ()
    gpus = _gpus(config, device)
    on = device or _weakest(config, gpus)
    made, unknown = _estimates(planned, on)
    count = _workers(planned, gpus, made)
    threads = campaign.threads or max(1, int(machine.usable_processors()) // count)
    if on.kind == "cpu":
        made, unknown = _estimates(planned, _with_threads(on, threads))
    room = _room(planned, made, count, gpus) if how != "ray" else None
    crowd = _crowd(count, threads, gpus, on)
    waiting = 1.0 if device is not None else max(1.0, count / max(1.0, machine.usable_processors()))
    starts = _starts(made, waiting, max(waiting, crowd) if on.kind == "cpu" else waiting)
    spent, wall = _times(made, trials, planned.runs, count, campaign.stagger_seconds, crowd, starts)
    if how == "ray":
        unknown.append("How many runs go at once: the Ray cluster decides by its free devices.")
        if made and not _is_here(campaign):
            unknown.append(f"The devices of the Ray cluster: time and memory are those of {on.name} here.")
    return Forecast(
        conditions=len(planned.conditions),
        seeds=len(planned.seeds),
        runs=len(planned.runs),
        steps=campaign.max_steps,
        trials=len(trials),
        trial_steps=trials[0].config.training.max_steps if trials else 0,
        launcher=how,
        workers=count,
        devices=gpus,
        device=on,
        threads=threads,
        wall=None if how == "ray" and not campaign.max_workers else wall,
        spent=spent,
        start=_widest(starts.values()) if spent is not None else None,
        tokens=_tokens([*trials, *planned.runs]),
        room=room,
        sight=sight(planned),
        estimates=made,
        announced=(
            *_announced(planned, room, count, threads, gpus, on),
            *([] if device is not None or on.kind != "cpu" or how == "ray" else _busy(count * threads)),
        ),
        unknown=tuple(unknown),
    )


def workers(planned: Plan) -> int:
    """How many runs go at once: what the configuration says, or one for each visible device (CPU: each core), as far as
    their memory suffices."""
    config = planned.loaded.config
    gpus = _gpus(config, None)
    if gpus or planned.campaign.max_workers or campaigns.launcher(planned.campaign) != "processes":
        return _workers(planned, gpus, {})
    made, _ = _estimates(planned, cards.present("cpu", speed=False))
    return _workers(planned, gpus, made)


def _workers(planned: Plan, gpus: int, made: dict[str, Estimate]) -> int:
    config, campaign = planned.loaded.config, planned.campaign
    how = campaigns.launcher(campaign)
    trials = len(planned.conditions) * len(campaigns.tuned(campaign)[1]) * len(campaign.tune.seeds)
    most = max(1, len(planned.runs), trials)
    if how == "serial" or campaign.max_workers:
        return min(plan.workers(config), most)
    count = gpus or max(1, int(machine.usable_processors()))
    if not gpus and how == "processes" and made:
        peak = max(each.memory.peak for each in made.values())
        count = max(1, min(count, next(iter(made.values())).device.bytes // peak))
    return min(count, most)


def _gpus(config: Config, device: Device | None) -> int:
    """GPUs that runs are dealt out to; 0: they use the CPU. Of a named card as many as there are runs at once."""
    campaign = config.campaign
    if device is not None:
        return max(1, campaign.max_workers if campaign else 1) if device.kind == "cuda" else 0
    return 0 if config.backend.devices == "cpu" else len(cards.visible())


def _is_here(campaign: Campaign) -> bool:
    """Do the runs use the devices of this machine?"""
    return campaigns.launcher(campaign) != "ray" or ray_cluster.is_own(campaign.ray_address)


def _weakest(config: Config, gpus: int) -> Device:
    """The device with the least memory of those that runs may be given."""
    if not gpus or campaigns.launcher(config.campaign or Campaign()) == "serial":
        return cards.present(config.backend.devices)
    return min((cards.present(f"gpu:{i}") for i in range(gpus)), key=lambda one: one.bytes)


def _with_threads(device: Device, threads: int) -> Device:
    """The CPU as a run of so many threads has it; its figures are for those that a run alone would have."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    alone = int(stated) if stated.isdecimal() and int(stated) else max(1, int(machine.usable_processors()))
    return replace(device, flops_fp32=device.flops_fp32 * threads / alone)


def _estimates(planned: Plan, device: Device) -> tuple[dict[str, Estimate], list[str]]:
    """An estimate of a run of each condition, and why there is none."""
    toml = planned.loaded.path
    made: dict[str, Estimate] = {}
    for run in planned.runs[: len(planned.conditions)]:
        if run.config.backend.backend != "local":
            return {}, [f"Time and memory: they are those of backend {run.config.backend.backend!r}."]
        try:
            model = estimate.model_of(run.config, toml.parent if toml else None)
        except ModelError as error:
            return {}, [f"Time and memory: {error.message}"]
        made[run.condition] = estimate.estimate(run.config, model, device)
    if any(each.seconds is None for each in made.values()):
        return made, [f"Time: there is no figure for {device.name}: {device.note or 'its speed is unknown'}."]
    return made, []


def _room(planned: Plan, made: dict[str, Estimate], count: int, gpus: int) -> Room | None:
    if not made:
        return None
    certain = max(each.memory.certain for each in made.values())
    peak = max(each.memory.peak for each in made.values())
    device = next(iter(made.values())).device
    together = -(-count // gpus) if gpus else count
    size = device.bytes + device.swap
    return Room(certain, peak, device.bytes, together, size // certain, device.bytes // peak)


def _crowd(count: int, threads: int, gpus: int, device: Device) -> float:
    """How many times as long a run takes at most because others use its device or its cores."""
    if device.kind == "cuda":
        return max(1.0, -(-count // gpus) if gpus else count)
    return max(1.0, count * threads / max(1.0, machine.usable_processors()))


def _starts(made: Mapping[str, Estimate], least: float, most: float) -> dict[str, Interval]:
    """Seconds until the first step of a process of each condition, where ``least`` to ``most`` threads want each processor."""
    found: dict[str, Interval] = {}
    for label, each in made.items():
        weights = each.memory.kept["weights"]
        found[label] = Interval(_START.low * least + weights / _READ[0], _START.high * most + weights / _READ[1])
    return found


def _widest(spans: Iterable[Interval]) -> Interval | None:
    known = list(spans)
    return Interval(min(s.low for s in known), max(s.high for s in known)) if known else None


def _busy(wanted: int) -> list[str]:
    """What other programs on this machine's processors do to the times of runs with ``wanted`` threads in all."""
    if not hasattr(os, "getloadavg"):
        return []
    load, processors = os.getloadavg()[0], max(1.0, machine.usable_processors())
    times = (load + wanted) / max(processors, wanted)
    if times < _BUSY:
        return []
    return [
        f"Other programs use the processors now (load {load:.1f} on {processors:g}): the times are those of an idle machine, and "
        f"about {times:.1f} times as long while it stays so."
    ]


def _times(
    made: dict[str, Estimate],
    trials: Sequence[PlannedRun],
    runs: Sequence[PlannedRun],
    count: int,
    stagger: float,
    crowd: float,
    starts: Mapping[str, Interval],
) -> tuple[Interval | None, Interval | None]:
    """Seconds of all runs one after the other, and on the clock with ``count`` at once."""
    both = [*trials, *runs]
    spans = [_span(made[run.condition], run) if run.condition in made else None for run in both]
    known = [(span, starts[run.condition]) for span, run in zip(spans, both, strict=True) if span is not None]
    if len(known) < len(both):
        return None, None
    spent = Interval(0.0, 0.0)
    for span, start in known:
        spent = spent + span + start
    ends: list[float] = []
    for low in (True, False):
        times = [span.low + start.low if low else span.high * crowd + start.high for span, start in known]
        first = _makespan(times[: len(trials)], count, stagger)
        ends.append(first + _makespan(times[len(trials) :], count, stagger))
    return spent, Interval(ends[0], ends[1])


def _span(made: Estimate, run: PlannedRun) -> Interval | None:
    """Seconds of one run from its first step to its end."""
    steps = run.config.training.max_steps
    step = made.step_seconds
    if step is None:
        return None
    return step.times(steps) + (made.evaluation or Interval(0.0, 0.0)).times(estimate.evaluations_of(run.config))


def _makespan(times: Sequence[float], count: int, stagger: float) -> float:
    """When the last of ``times`` ends, each started as soon as one of ``count`` places is free and ``stagger`` after the
    one before it."""
    free = [0.0] * count
    begun, end = -stagger, 0.0
    for time in times:
        begun = max(heapq.heappop(free), begun + stagger)
        heapq.heappush(free, begun + time)
        end = max(end, begun + time)
    return end


def _tokens(runs: Sequence[PlannedRun]) -> Interval:
    """Tokens sampled by training and evaluations, from short answers to the longest."""
    most = 0.0
    for run in runs:
        training, section = run.config.training, run.config.eval
        rollouts = training.max_steps * training.batch_size * training.group_size
        if section.source:
            answers = estimate.evaluations_of(run.config) * section.examples * section.samples
            most += answers * (section.max_tokens or training.max_tokens)
        most += rollouts * training.max_tokens
    return Interval(_SHORT * most, most)


def refuse_unfit(planned: Plan, told: Forecast) -> None:
    """ConfigError where answers do not fit the model's positions, or a run alone, or those that share a device, cannot fit on
    it; of the devices of a cluster of others it is not known."""
    for run in planned.runs[: len(planned.conditions)]:
        if run.condition in told.estimates:
            made = told.estimates[run.condition]
            try:
                preflight.check_room(run.config, made.model)
                if _is_here(planned.campaign):
                    preflight.refuse_unfit(run.config, made)
            except ConfigError as error:
                raise ConfigError(f"condition {run.condition}: {error.message}", fix=error.fix) from error
    if not _is_here(planned.campaign):
        return
    room = told.room
    if room is None or told.device.guessed or room.together <= room.fit:
        return
    most = room.fit * max(1, told.devices)
    place = planned.loaded.where("campaign", "max_workers")
    where = f"{place}: " if place else ""
    raise ConfigError(
        f"{where}{told.workers} runs at once do not fit: {room.together} of them share {told.device.name} with "
        f"{preflight.gib(room.device)}, and each needs at least {preflight.gib(room.certain)}.",
        fix=f"set campaign.max_workers to at most {most}"
        + (", or leave it at 0." if told.launcher == "processes" else "."),
    )


def _announced(
    planned: Plan, room: Room | None, count: int, threads: int, gpus: int, device: Device
) -> list[str]:
    """What is worth knowing about the runs at once."""
    found: list[str] = []
    processors = machine.usable_processors()
    how = campaigns.launcher(planned.campaign)
    if how == "ray":
        return [f"{device.note}."] if device.guessed and _is_here(planned.campaign) else []
    if gpus and count > gpus and how == "processes":
        found.append(
            f"{count} runs at once share {gpus} GPU{'s' * (gpus > 1)}: each has a part of its time and memory."
        )
    if not gpus and count * threads > processors:
        found.append(f"{count} runs of {threads} threads on {processors:g} processors wait for each other.")
    if room is not None and room.easily < room.together <= room.fit:
        found.append(
            f"{room.together} runs on {device.name} are expected to need {preflight.gib(room.peak * room.together)} of "
            f"{preflight.gib(room.device)} where all answers reach training.max_tokens: one may run out. Fewer at once are "
            "safer (campaign.max_workers); a run that fails is resumed by --resume."
        )
    wanted = gpus or int(processors)
    if not planned.campaign.max_workers and how == "processes" and count < min(wanted, len(planned.runs)):
        found.append(f"{count} runs at once, not {wanted}: more do not fit the memory.")
    if device.guessed:
        found.append(f"{device.note}.")
    return found


def lines(told: Forecast, config: Config) -> list[str]:
    """The forecast in sentences."""
    at_once = "one after the other" if told.workers == 1 else f"{told.workers} at once"
    if told.launcher == "ray":
        at_once = "on Ray"
    found = [
        f"{told.conditions} conditions x {told.seeds} seeds = {told.runs} runs of {told.steps:,} steps, {at_once}, "
        f"{told.threads} thread{'s' * (told.threads > 1)} each."
    ]
    if told.trials:
        found.append(
            f"Before them {told.trials} trials of {told.trial_steps:,} step{'s' * (told.trial_steps > 1)}."
        )
    tokens = f"{_count(told.tokens.low)} to {_count(told.tokens.high)} sampled tokens"
    if told.spent is None:
        found.append(f"At most {_count(told.tokens.high)} sampled tokens.")
    else:
        hours = f"{_hours(told.spent, told)}, {tokens}"
        clock = ""
        if told.wall is not None:
            low, middle, high = map(duration, (told.wall.low, told.wall.middle, told.wall.high))
            clock = f"{low} to {high} (middle {middle}), "
        found.append(f"Estimated: {clock}{hours}.")
    if told.start is not None:
        processes, beside = told.runs + told.trials, f" with {told.workers} at once" if told.workers > 1 else ""
        found.append(
            f"In it each of {processes} processes takes {duration(told.start.low)} to {duration(told.start.high)} to start"
            f"{beside} (imports, weights), before its first step."
        )
    if told.room is not None:
        found.append(
            f"Memory: a run needs about {preflight.gib(told.room.peak)} of {preflight.gib(told.room.device)} on "
            f"{told.device.name}; {told.room.together} at once there."
        )
    return [*found, *told.announced, *describe(told.sight, config), *told.unknown]


def _hours(spent: Interval, told: Forecast) -> str:
    factor, what = (told.threads, "CPU-hours") if told.device.kind == "cpu" else (1, "GPU-hours")
    return f"{spent.low * factor / 3600:.3g} to {spent.high * factor / 3600:.3g} {what}"


def _count(value: float) -> str:
    for unit, scale in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time in the unit that reads best."""
    for unit, scale in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.2g} s"


def record(told: Forecast) -> dict[str, Any]:
    """The forecast as JSON can hold it; null where something is not known."""
    seen = told.sight
    return {
        "conditions": told.conditions, "seeds": told.seeds, "runs": told.runs, "steps": told.steps, "trials": told.trials,
        "trial_steps": told.trial_steps, "launcher": told.launcher, "workers": told.workers, "devices": told.devices,
        "device": told.device.name, "threads": told.threads, "wall": _ends(told.wall), "one_after_the_other": _ends(told.spent),
        "start": _ends(told.start),
        "tokens": {"low": round(told.tokens.low), "high": round(told.tokens.high)},
        "room": None if told.room is None else asdict(told.room),
        "sees": {
            "comparisons": seen.comparisons, "level": seen.level, "deviations": _finite(seen.deviations),
            "deviation": None if seen.deviation is None else seen.deviation.value,
            "deviation_from": None if seen.deviation is None else seen.deviation.source,
            "deviation_low": None if seen.deviation is None else _finite(seen.deviation.low),
            "deviation_high": None if seen.deviation is None else _finite(seen.deviation.high),
            "difference": _finite(seen.difference), "equivalence": seen.equivalence, "equivalence_at": seen.equivalence_at,
            "seeds_needed": seen.seeds_needed, "shortfalls": list(seen.shortfalls),
        },
        "announced": list(told.announced), "unknown": list(told.unknown),
    }  # fmt: skip


def _ends(span: Interval | None) -> dict[str, float] | None:
    if span is None:
        return None
    return {
        "low": float(f"{span.low:.3g}"),
        "middle": float(f"{span.middle:.3g}"),
        "high": float(f"{span.high:.3g}"),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
