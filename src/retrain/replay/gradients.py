"""The learner's part of a replay: the gradient of a step that begins with weights which are still there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from retrain import plugins
from retrain.config.schema import Config
from retrain.preflight import inexact_because
from retrain.replay.words import Words
from retrain.tracking import layout, rollouts
from retrain.tracking.read import RunRecord
from retrain.training.batch import pack
from retrain.training.build import facts as present_facts
from retrain.training.optim import optim_at
from retrain.training.recredit import credited


@dataclass(frozen=True, slots=True)
class Regradient:
    """A step's gradient, computed anew from its checkpoint. ``outcome`` is reproduced, differs, or why it was left out;
    ``reasons`` say what is not as it was where it differs."""

    step: int
    outcome: str
    stored_hash: str = ""
    hash: str = ""
    stored_norm: float | None = None
    norm: float | None = None
    reasons: tuple[str, ...] = ()


def regradients(run: RunRecord, config: Config, steps: Sequence[int]) -> list[Regradient]:
    """The first gradient of each step that has a stored hash, from the weights of its checkpoint.

    Loads the run's backend. Steps without weights to start from say so, and so do steps that begin at a checkpoint and
    have no hash; those with neither are left out. What counts is what there is: ``training.save_every``, which says what
    is hashed, may have been another one before a resume.
    """
    rows = {int(row["step"]): row for row in run.steps}
    there = {0, *rollouts.checkpointed(run.path)}
    wanted = [step for step in steps if step in there or rows.get(step, {}).get("gradient_hash")]
    if not any(rows.get(s, {}).get("gradient_hash") and s in there for s in wanted):
        return [_left_out(step, rows, there) for step in wanted]
    words = Words(config)
    recorded = cast("Mapping[str, Any]", run.facts.get("facts") or {})
    _same_threads(recorded)
    backend = plugins.load("backend", config.backend.backend)(config, words.renderer)
    try:
        facts = {**present_facts(), **backend.facts()}
        known = {key: value for key, value in recorded.items() if key in facts}
        reasons = tuple(inexact_because(config, known, {k: v for k, v in facts.items() if k in known}, 0))
        found: list[Regradient] = []
        for step in wanted:  # in order: step 0 needs the backend as it was made
            if step not in there or not rows.get(step, {}).get("gradient_hash"):
                found.append(_left_out(step, rows, there))
                continue
            if step:
                backend.restore(run.path / layout.CHECKPOINTS / layout.checkpoint_name(step))
            found.append(_regradient(run, config, backend, words, step, reasons, rows[step]))
        return found
    finally:
        backend.close()


def _same_threads(recorded: Mapping[str, Any]) -> None:
    # Sums over another number of threads round differently.
    threads = str(recorded.get("threads") or "")
    if threads.isdecimal():
        import torch

        torch.set_num_threads(int(threads))


def _left_out(step: int, rows: Mapping[int, Mapping[str, Any]], there: set[int]) -> Regradient:
    row = rows.get(step, {})
    if step not in there:
        return Regradient(step, "its checkpoint is not kept", str(row.get("gradient_hash") or ""))
    why = "nothing was trained" if row.get("num_datums") == 0 else "no hash is stored"
    return Regradient(step, why)


def _regradient(
    run: RunRecord,
    config: Config,
    backend: Any,
    words: Words,
    step: int,
    reasons: tuple[str, ...],
    row: Mapping[str, Any],
) -> Regradient:
    training = config.training
    _, groups_P = credited(run.path, config, step, words.renderer.decode)
    batch = pack(
        groups_P,
        temperature=training.temperature,
        fixed_tokens=training.batch_size * training.group_size * training.max_tokens,
        keep_silent=config.loss.kl != 0 or config.loss.entropy != 0,
    )
    report = backend.train_step(batch, replace(optim_at(config, step), hash_gradient=True))
    stored = str(row["gradient_hash"])
    same = report.gradient_hash == stored
    return Regradient(
        step,
        "reproduced" if same else "differs",
        stored,
        report.gradient_hash,
        row.get("grad_norm"),
        report.grad_norm,
        () if same else (reasons or ("nothing that is recorded has changed",)),
    )
