"""Writes a run directory: metrics, per-step and per-rollout records, compact rollouts, status and heartbeat.

Its state is the length of every file, so that a resumed run is cut back to exactly what its checkpoint knew.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrain.errors import ResumeError
from retrain.protocols import Renderer, Sink, State
from retrain.tracking import layout, rollouts
from retrain.tracking.heartbeat import Phase, Pulse, alarm_record
from retrain.tracking.vitals import Watch, is_evaluation, number
from retrain.types import CreditedGroup, FloatArray, Rollout, Score

log = logging.getLogger("retrain")

_STREAMS = (layout.METRICS, layout.STEPS, layout.GENERATIONS)


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace ``path`` by ``text`` in one step: a reader sees the old or the new file, never a part.

    ``durable`` waits for the disk; a heartbeat need not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)


def to_json(value: Mapping[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null, which every reader can parse."""

    def clean(item: object) -> object:
        if isinstance(item, Mapping):
            return {str(k): clean(v) for k, v in cast("Mapping[str, object]", item).items()}
        if isinstance(item, list | tuple):
            return [clean(v) for v in cast("Sequence[object]", item)]
        plain = cast("object", item.item() if isinstance(item, np.generic) else item)
        return None if isinstance(plain, float) and not math.isfinite(plain) else plain

    try:
        # Most records hold nothing to clean, and thousands of numbers.
        return _encode(value)
    except (TypeError, ValueError):
        return _encode(clean(value))


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class RunLog:
    """The writer of one run directory, and the fan-out to sinks."""

    def __init__(
        self,
        directory: Path,
        renderer: Renderer,
        sinks: Sequence[Sink],
        *,
        generations: int,
        store: rollouts.RolloutStore | None,
        judge: Callable[[Score], bool | None] | None = None,
        alarms: bool = True,
    ) -> None:
        """``generations`` rollouts of a step are written as text. ``judge`` says whether a score counts as correct in
        this run, None where that is unknown; without it, what scores say themselves. Without ``alarms`` no metric is
        watched: what nothing learns from, such as a measurement on invented answers, cannot be healthy or ill."""
        self.directory = directory
        self._renderer = renderer
        self._sinks = list(sinks)
        self._generations = generations
        self._store = store
        self._judge = judge or _told
        (directory / "emergence").mkdir(parents=True, exist_ok=True)
        self._files = {name: (directory / name).open("ab") for name in _STREAMS}
        self._facts: dict[str, Any] = {}
        self._pulse = Pulse(directory / layout.HEARTBEAT, memory=self._device_memory)
        self._watch = Watch() if alarms else Watch(())
        self._alarms = 0
        self._spent_s = 0.0
        self.latest: dict[str, Any] = {}
        """The newest value of every metric of this start."""

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write run.json with the facts of this start (versions, device, git) and status running, and begin to beat."""
        self._facts = {**facts, "host": platform.node(), "started": time.time()}
        self.status("running", step=None)
        told = {key: self._facts.get(key) for key in ("host", "started", "max_steps")}
        self._pulse.start({"pid": os.getpid(), **told, "alarms": self._alarms})
        self._tell("follow", self._pulse.look)

    def status(self, status: str, *, step: int | None) -> None:
        """Replace run.json: status, process id, heartbeat (seconds since the epoch), completed steps."""
        if step is not None:
            self._facts["step"] = step
        here = {"pid": os.getpid(), "heartbeat": time.time(), "spent_s": round(self._spent_s, 3)}
        facts = {**self._facts, "status": status, **here}
        write_atomically(self.directory / layout.RUN, json.dumps(facts, indent=2) + "\n", durable=False)
        if status != "running":
            self._pulse.stop()
            self._tell("ended", status)

    def follow(self, engine: object, counters: object) -> None:
        """Whose counts the heartbeat shows: see ``Pulse.follow``."""
        self._pulse.follow(engine, counters)

    def phase(self, name: Phase, *, of: int = 0) -> None:
        """The run begins to do something else; ``of`` is the number of rollouts that this will take, if it is known."""
        self._pulse.phase(name, of=of)

    def collecting(self, name: str) -> None:
        """The event loop samples or scores: a phase of its own in a step, a part of an evaluation otherwise."""
        if self._pulse.name in ("sampling", "scoring"):
            self._pulse.phase("scoring" if name == "scoring" else "sampling")

    def _device_memory(self) -> dict[str, Any]:
        """Memory besides the process's own, from the first sink that knows of some."""
        for sink in self._sinks:
            if ask := getattr(sink, "device_memory", None):
                return ask()
        return {}

    def step(self, step: int, metrics: Mapping[str, Any], groups_P: Sequence[CreditedGroup]) -> None:
        """Record one training step everywhere and beat the heart."""
        self.phase("saving")
        self._append(layout.METRICS, {"step": step, **metrics})
        self._append(layout.STEPS, {"step": step, "tasks": [_task_record(g) for g in groups_P]})
        shown = self._write_generations(step, groups_P, str(metrics.get("uncertainty_kind", "")))
        if self._store is not None:
            self._store.write(step, groups_P, metrics)
        if shown:
            self._tell("generations", step, shown)
        self._to_sinks(step, metrics)
        self._raise_alarms(step, metrics)
        self._spent_s += _seconds(metrics)
        self.status("running", step=step + 1)

    def _raise_alarms(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Say once per episode what has left its healthy range, on the console, in events.log and with the heartbeat."""
        raised = self._watch.observe({"step": step, **metrics})
        self._alarms += len(raised)
        for alarm in raised:
            log.warning("alarm: %s", alarm.line)
            self._tell("alarm", alarm)
        if raised:
            self._pulse.note(alarms=self._alarms, alarm=alarm_record(raised[-1]))
        self._pulse.note(ill=self._watch.ill)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record one evaluation after ``step`` completed steps."""
        self.phase("saving")
        self._append(layout.METRICS, {"step": step, **metrics})
        self._spent_s += _seconds(metrics)
        self._pulse.note(evaluation=_shown_evaluation(step, metrics))
        self._to_sinks(step, metrics)
        self._raise_alarms(step, metrics)

    def _to_sinks(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.latest |= metrics
        self._tell("log", step, metrics)

    def _tell(self, method: str, *arguments: Any, to: Sequence[Sink] | None = None) -> None:
        """Call a method of every sink (or of those in ``to``) that has it; one that fails is off from then on."""
        for sink in [s for s in self._sinks if to is None or s in to]:
            try:
                if method == "log" or hasattr(sink, method):
                    getattr(sink, method)(*arguments)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a tracker that fails late must not end a training run
                log.warning("%s failed and is off for the rest of the run: %s", type(sink).__name__, error)
                self._sinks.remove(sink)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(to_json(record).encode() + b"\n")
        self._files[name].flush()

    def _write_generations(
        self, step: int, groups_P: Sequence[CreditedGroup], uncertainty_kind: str
    ) -> list[dict[str, Any]]:
        """Write the first rollouts of a step as text, with the credit of every sampled token; returns the rows."""
        members = [(group, i) for group in groups_P for i in range(len(group.scored.rollouts_G))]
        rows: list[dict[str, Any]] = []
        for group, i in members[: self._generations]:
            scored = group.scored
            rollout, score = scored.rollouts_G[i], scored.scores_G[i]
            first = int(np.argmax(rollout.sampled_T)) if rollout.sampled_T.any() else len(rollout.token_ids_T)
            advantages = group.advantages_G_T[i][rollout.sampled_T]
            rows.append(
                {
                    "step": step,
                    "task": scored.task.id,
                    "member": rollout.member,
                    "prompt": self._renderer.decode(rollout.token_ids_T[:first]),
                    "completion": rollout.text,
                    "reference": scored.task.reference,
                    "reward": score.reward,
                    "correct": None if rollout.stop == "error" else self._judge(score),
                    "parts": dict(score.parts),
                    "stop": rollout.stop,
                    "error": rollout.error or score.error,
                    "tokens": rollout.num_sampled,
                    "planning_tokens": int(group.planning_G_T[i].sum()),
                    "advantage_mean": float(advantages.mean()) if len(advantages) else 0.0,
                    "skipped": group.skipped,
                    "weights_version": rollout.weights_version,
                    "credit": {
                        "uncertainty_kind": uncertainty_kind,
                        "texts": self._texts(rollout),
                        "advantages": _rounded(advantages),
                        "uncertainty": _rounded(group.uncertainty_G_T[i][rollout.sampled_T]),
                        "planning": group.planning_G_T[i][rollout.sampled_T].astype(int).tolist(),
                        "logprobs": _rounded(rollout.logprobs_T[rollout.sampled_T]),
                    },
                }
            )
            self._append(layout.GENERATIONS, rows[-1])
        return rows

    def _texts(self, rollout: Rollout) -> list[str]:
        """What each sampled token reads as; each unbroken run of them is decoded by itself, as for planning."""
        texts: list[str] = []
        edges = np.flatnonzero(np.diff(rollout.sampled_T, prepend=False, append=False))
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            text, offsets = self._renderer.offsets(rollout.token_ids_T[start:end])
            texts += [text[a:b] for a, b in offsets]
        return texts

    def sync(self) -> None:
        """Wait until every stream is on disk: a checkpoint must not know more than the files hold."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def state_dict(self) -> State:
        """The length of every stream, in bytes."""
        return {"bytes": {name: file.tell() for name, file in self._files.items()}}

    def load_state_dict(self, state: State) -> None:
        """Cut every stream back to its stored length, ResumeError when one is shorter, and tell sinks that replay;
        rollouts of later steps go with ``cut_rollouts``."""
        for name, length in state["bytes"].items():
            path = self.directory / name
            if path.stat().st_size < length:
                raise ResumeError(
                    f"{path} has fewer bytes than its checkpoint knows ({path.stat().st_size} of {length}).",
                    fix="restore the file from a copy, or start a new run.",
                )
            self._files[name].close()
            with path.open("r+b") as file:
                file.truncate(length)
            self._files[name] = path.open("ab")
        self._recall()
        self._replay()

    def _recall(self) -> None:
        """Bring the watch to where it stood: an episode that goes on is not said again."""
        for row in _rows(self.directory / layout.METRICS):
            raised = self._watch.observe(row)
            self._alarms += len(raised)
            self._spent_s += _seconds(row)
            if raised:
                self._pulse.note(alarm=alarm_record(raised[-1]))
            if is_evaluation(row):
                self._pulse.note(evaluation=_shown_evaluation(row["step"], row))
        self._pulse.note(ill=self._watch.ill)

    def _replay(self) -> None:
        """Hand everything up to the checkpoint once more to sinks that ask for it: they know what they hold."""
        asking = [sink for sink in self._sinks if getattr(sink, "replays", False)]
        if not asking:
            return
        generations: dict[int, list[dict[str, Any]]] = {}
        for row in _rows(self.directory / layout.GENERATIONS):
            generations.setdefault(row["step"], []).append(row)
        for row in _rows(self.directory / layout.METRICS):
            step = row.pop("step")
            shown = [] if any(key.startswith("eval/") for key in row) else generations.pop(step, [])
            if shown:
                self._tell("generations", step, shown, to=asking)
            self._tell("log", step, row, to=asking)

    def cut_rollouts(self, step: int) -> None:
        """Delete stored rollouts of 0-based steps from ``step`` on."""
        rollouts.cut(self.directory, step)

    def close(self) -> None:
        """Close files and sinks; safe to call twice."""
        self._pulse.stop()
        for name, file in self._files.items():
            try:
                # What is still buffered may find a full disk, which must not hide the first error.
                file.close()
            except OSError as error:
                log.warning("The end of %s could not be written: %s", name, error.strerror or error)
        for sink in self._sinks:
            try:
                sink.close()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - as in _to_sinks
                log.warning("%s failed to close: %s", type(sink).__name__, error)
        self._sinks = []


def _seconds(row: Mapping[str, Any]) -> float:
    """What a step or an evaluation took."""
    return number(row, "eval/time_s" if is_evaluation(row) else "step_time_s") or 0.0


def _shown_evaluation(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a status says about the last evaluation."""
    keys = ("accuracy", "accuracy_low", "accuracy_high", "mean_reward", "source")
    return {"step": step, **{key: metrics.get(f"eval/{key}") for key in keys}}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _told(score: Score) -> bool | None:
    return score.passed


def _rounded(values: FloatArray) -> list[float]:
    """Six significant digits: what a reader of single tokens needs, in half the bytes."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _task_record(group: CreditedGroup) -> dict[str, Any]:
    """What became of one task: trained, or dropped and why."""
    scored = group.scored
    valid = scored.valid_G
    return {
        "task": scored.task.id,
        "draw": scored.task.draw,
        "outcome": "dropped" if group.skipped else "trained",
        "why": group.skipped,
        "rewards": [None if s.error else s.reward for s in scored.scores_G],
        "lengths": [r.num_sampled for r in scored.rollouts_G],
        "errors": [
            r.error or s.error
            for r, s, v in zip(scored.rollouts_G, scored.scores_G, valid, strict=True)
            if not v
        ],
    }
