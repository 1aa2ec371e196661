"""One step of a run, explained: what trained, what was dropped and why, and which tokens got the most credit."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrain import plugins
from retrain.config.load import LoadedConfig, load
from retrain.errors import RetrainError, UsageError
from retrain.tracking import layout, rollouts, texts
from retrain.tracking.read import RunRecord
from retrain.tracking.vitals import alarms
from retrain.training.recredit import credited
from retrain.types import CreditedGroup, IntArray

_TOKENS = 10

_UPDATE = (
    "loss", "grad_norm", "grad_clipped", "ratio_mean", "ratio_min", "ratio_max", "approx_kl", "moved_kl", "lr", "num_datums",
    "num_updates", "num_microbatches", "skipped_update", "clip_share", "kl_base", "policy_entropy", "gradient_hash",
)  # fmt: skip
_SAMPLED = (
    "mean_reward", "correct_rate", "mean_length", "max_token_hit_rate", "entropy_mean", "reward_error_rate",
    "rollout_error_rate", "tokens_sampled",
)  # fmt: skip


def explain_step(run: RunRecord, step: int) -> dict[str, Any]:
    """What happened in a 0-based step, as one JSON object; ``missing`` says what the run did not keep of it.

    UsageError for a step that the run has not completed.
    """
    rows = {int(row["step"]): row for row in run.steps}
    if step not in rows:
        last = max(rows, default=None)
        raise UsageError(
            f"{run.path} has no step {step}.",
            fix="it has completed no step yet."
            if last is None
            else f"steps are counted from 0; its last is {last}.",
        )
    row = rows[step]
    missing: list[str] = []
    path = run.path / layout.CONFIG
    loaded = load(path) if path.is_file() else None
    groups = next((r.get("tasks") for r in run.task_outcomes() if r.get("step") == step), None)
    if groups is None:
        missing.append(f"{layout.STEPS} holds nothing of this step: what became of its tasks is not known.")
    elif not isinstance(groups, list) or not all(map(_is_group, cast("list[object]", groups))):
        missing.append(f"{layout.STEPS} is damaged where it is about this step: what became of its tasks is not known.")
        groups = None
    tokens, source = _tokens(run, step, loaded, missing)
    return {
        "run": str(run.path),
        "step": step,
        "condition": row.get("condition"),
        "sepa_lambda": row.get("sepa_lambda"),
        "sepa_gate_open": row.get("sepa_gate_open"),
        "sampled": {key: row.get(key) for key in _SAMPLED},
        "groups": groups or [],
        "update": {
            **{key: row.get(key) for key in _UPDATE},
            "grad_clip": loaded.config.loss.grad_clip if loaded is not None else None,
            "skipped_because": _skipped_because(run.path, step) if row.get("skipped_update") else "",
        },
        "tokens": tokens,
        "tokens_from": source,
        "alarms": [{"message": a.message, "advice": a.advice} for a in alarms(run.rows) if a.step == step],
        "checkpoints": _checkpoints(run.path, step),
        "missing": missing,
    }


def _is_group(found: object) -> bool:
    """Is this what a run writes about a task into emergence/steps.jsonl?"""
    group = cast("Mapping[str, Any]", found if isinstance(found, Mapping) else {})
    texts_there = all(isinstance(group.get(key), str) for key in ("task", "outcome", "why"))
    kinds: Mapping[str, Any] = {"rewards": int | float | None, "lengths": int, "errors": str}
    lists = all(
        isinstance(values := group.get(key), list) and all(isinstance(v, kind) for v in cast("list[object]", values))
        for key, kind in kinds.items()
    )
    return texts_there and lists and bool(group["lengths"])


def _checkpoints(run: Path, step: int) -> dict[str, int | None]:
    """The nearest checkpoints by completed steps: ``step`` of them where the step begins, one more where it ends."""
    there = rollouts.checkpointed(run)
    return {
        "before": max((s for s in there if s <= step), default=None),
        "after": min((s for s in there if s > step), default=None),
    }


def _skipped_because(run: Path, step: int) -> str:
    """The reason that events.log gives, "" where it does not."""
    try:
        text = (run / layout.EVENTS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.findall(rf"Step {step}: the update was skipped because (.*)\.$", text, flags=re.MULTILINE)
    return found[-1] if found else ""


def _tokens(
    run: RunRecord, step: int, loaded: LoadedConfig | None, missing: list[str]
) -> tuple[list[dict[str, Any]], str]:
    """The tokens with the largest |A|, at most one a rollout, and where they were read from."""
    why = f"{run.path / layout.CONFIG} is not there."
    if loaded is not None:
        plugins.add_search_paths(loaded.search_paths)
        model = loaded.config.model
        tokenizer = texts.tokenizer_of(model.model, model.revision)

        def decode(ids: IntArray) -> str:
            return tokenizer.decode(ids.tolist()) if tokenizer is not None else ""

        try:
            _, groups_P = credited(run.path, loaded.config, step, decode)
        except RetrainError as error:
            why = error.message
        else:
            if tokenizer is None:
                missing.append(
                    f"The tokenizer of {model.model} is not on this machine: tokens are shown as numbers."
                )
            return _from_rollouts(groups_P, tokenizer), "rollouts"
    rows = [r for r in run.generations() if r.get("step") == step]
    if rows:
        try:
            found = _from_generations(rows)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            # Another program may have written there, or half of a line be lost.
            missing.append(f"{why} {layout.GENERATIONS} is damaged where it is about this step: its tokens are not known.")
            return [], ""
        missing.append(f"{why} The tokens are those of the {len(rows)} rollouts in {layout.GENERATIONS}.")
        return found, "generations"
    missing.append(f"{why} Neither does {layout.GENERATIONS} hold any: its tokens are not known.")
    return [], ""


def _from_rollouts(groups_P: Sequence[CreditedGroup], tokenizer: Any) -> list[dict[str, Any]]:
    found: list[tuple[float, int, CreditedGroup, int, int]] = []
    for group in groups_P:
        for i, a_T in enumerate(group.advantages_G_T):
            if len(a_T) and a_T.any():
                at = int(np.abs(a_T).argmax())
                found.append((float(abs(a_T[at])), -len(found), group, i, at))
    out: list[dict[str, Any]] = []
    for _, _, group, i, at in heapq.nlargest(_TOKENS, found, key=lambda entry: entry[:2]):
        rollout, a_T = group.scored.rollouts_G[i], group.advantages_G_T[i]
        before, token, after = texts.around(tokenizer, rollout.token_ids_T.tolist(), at)
        out.append(
            {
                "task": group.scored.task.id,
                "member": rollout.member,
                "position": int(np.count_nonzero(rollout.sampled_T[:at])),
                "advantage": float(a_T[at]),
                "alike": bool((a_T[rollout.sampled_T] == a_T[at]).all()),
                "logprob": float(rollout.logprobs_T[at]),
                "uncertainty": float(group.uncertainty_G_T[i][at]),
                "planning": bool(group.planning_G_T[i][at]),
                "before": before,
                "token": token,
                "after": after,
            }
        )
    return out


def _from_generations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for row in rows:
        credit = cast("Mapping[str, Any]", row.get("credit") or {})
        values = cast("list[float]", credit.get("advantages") or [])
        if not any(values):
            continue
        at = max(range(len(values)), key=lambda i: abs(values[i]))
        pieces: list[str] = credit["texts"]
        out.append(
            {
                "task": row["task"],
                "member": row["member"],
                "position": at,
                "advantage": values[at],
                "alike": all(v == values[at] for v in values),
                "logprob": credit["logprobs"][at],
                "uncertainty": credit["uncertainty"][at],
                "planning": bool(credit["planning"][at]),
                "before": "".join(pieces[max(0, at - 16) : at]),
                "token": pieces[at],
                "after": "".join(pieces[at + 1 : at + 9]),
            }
        )
    return sorted(out, key=lambda entry: -abs(entry["advantage"]))[:_TOKENS]
