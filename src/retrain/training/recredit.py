"""Credit of stored rollouts, computed anew: what a file knows of its step goes in where a detector or a plug-in would be
asked, so that neither model nor engine is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrain import plugins
from retrain.algorithms import credit
from retrain.algorithms.sepa import SepaSchedule
from retrain.config.fields import settings
from retrain.config.idle import idle
from retrain.config.schema import Config, Planning
from retrain.errors import RetrainError
from retrain.protocols import Renderer
from retrain.tracking import rollouts
from retrain.tracking.rollouts import StoredStep
from retrain.types import CreditedGroup, Rollout


class _NoText:
    """A renderer where planning tokens are known and nothing asks for text."""

    def offsets(self, token_ids: Any) -> Any:
        raise RuntimeError("planning tokens are known, and the detector was asked all the same")


@dataclass(frozen=True, slots=True)
class Creditor:
    """Computes credit under one configuration, for steps that a run stored under its own."""

    config: Config
    algorithm: credit.Algorithm
    schedule: SepaSchedule
    stored_marks: bool
    stored_uncertainty: bool

    @classmethod
    def of(cls, config: Config, before: Config, renderer: Callable[[], Renderer] | None = None) -> Creditor:
        """``before`` is the run's own configuration: what the two have in common is read instead of computed.

        ``renderer`` is asked for only where planning tokens are to be found anew; None where they are not.
        """
        marks = config.planning == before.planning and (
            config.logging.strategic_grams == before.logging.strategic_grams
        )
        kind = str(config.algorithm.uncertainty_kind)
        known = kind == before.algorithm.uncertainty_kind and kind not in rollouts.RECOMPUTED
        lean = config
        if marks:
            # No detector need be made: a semantic one would load a model.
            lean = lean.model_copy(update={"planning": Planning()})
        if known:
            section = lean.algorithm.model_copy(update={"uncertainty_kind": "surprisal"})
            lean = lean.model_copy(update={"algorithm": section})
        source: Any = _NoText() if marks or renderer is None else renderer()
        return cls(config, credit.build(lean, source), credit.build_schedule(config), marks, known)

    def credit(self, step: StoredStep, sepa_lambda: float) -> list[CreditedGroup]:
        """The step's groups with credit."""
        algorithm = self.algorithm
        if self.stored_marks:
            algorithm = replace(algorithm, marks=_lookup(step, step.planning_P_G_T))
        if self.stored_uncertainty and step.uncertainty_P_G_T is not None:
            algorithm = replace(algorithm, uncertainty=_lookup(step, step.uncertainty_P_G_T))
        return credit.credit_step(step.groups_P, algorithm, sepa_lambda)

    @property
    def wants_text(self) -> bool:
        """Does a piece take part that may read a rollout's text?"""
        section = self.config.algorithm
        if section.algorithm_mode:
            return True
        pieces = [("transform", str(section.transform_mode))]
        if not self.stored_uncertainty:
            pieces.append(("uncertainty", str(section.uncertainty_kind)))
        return any(plugins.is_own(kind, name) for kind, name in pieces)


def _lookup(step: StoredStep, values_P_G: Sequence[Sequence[Any]]) -> Callable[[Rollout], Any]:
    known = {
        id(rollout): value
        for group, values in zip(step.groups_P, values_P_G, strict=True)
        for rollout, value in zip(group.rollouts_G, values, strict=True)
    }
    return lambda rollout: known[id(rollout)]


def credited(
    run: Path, config: Config, step: int, decode: rollouts.Decode
) -> tuple[StoredStep, list[CreditedGroup]]:
    """A stored step with the run's own credit; ``decode`` is used only where a plug-in may read text."""
    creditor = Creditor.of(config, config)
    stored = rollouts.read(run, step, decode=decode if creditor.wants_text else None)
    return stored, creditor.credit(stored, stored.sepa_lambda)


def silent_settings(config: Config) -> set[str]:
    """Settings that do nothing in this configuration, by the code of its plug-ins too, where that can be loaded."""
    silent = set(idle(config))
    try:
        if not credit.build_schedule(config).active:
            silent |= {key for key in settings() if key.startswith("sepa.")}
    except RetrainError:
        pass  # a plug-in that is gone may have read them
    return silent


def trains(group: CreditedGroup) -> bool:
    """Has any token of the group credit?"""
    return not group.skipped and any(a_T.any() for a_T in group.advantages_G_T)
