"""What a run has added up so far, as one part of its resumable state, and when skipped updates are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from retrain.errors import LearnerError
from retrain.protocols import State
from retrain.types import CreditedGroup, StepReport

log = logging.getLogger("retrain")

NO_SIGNAL = (
    "No step carried a signal: in every group all rewards were equal, so nothing was learned. Use easier tasks, "
    "a reward with more levels, or a larger group_size."
)
_MAX_SKIPPED_UPDATES = 3


@dataclass(slots=True)
class Counters:
    """What a run has added up so far. ``step`` counts completed steps."""

    step: int = 0
    correct_sum: float = 0.0
    correct_steps: int = 0
    steps_with_signal: int = 0
    evaluated_at: int = -1
    """Completed steps at the last evaluation, -1 before any."""
    skipped_updates_in_a_row: int = 0
    skipped_updates: int = 0
    reward_errors: int = 0
    tokens: int = 0

    def state_dict(self) -> State:
        """Every counter by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: State) -> None:
        """Continue counting."""
        for name in self.__slots__:
            setattr(self, name, state[name])

    @property
    def running_correct_rate(self) -> float | None:
        """Mean of the steps' correct rates."""
        return self.correct_sum / self.correct_steps if self.correct_steps else None

    def add(self, reward_errors: int, tokens: int, groups_P: Sequence[CreditedGroup], correct: float | None) -> None:
        """A step is complete; ``correct`` is its share of correct rollouts, None where that is unknown."""
        self.step += 1
        self.reward_errors += reward_errors
        self.tokens += tokens
        self.steps_with_signal += any(not group.skipped for group in groups_P)
        if correct is not None:
            self.correct_sum += correct
            self.correct_steps += 1

    def check_updates(self, reports: Sequence[StepReport]) -> None:
        """Count the updates of the last step that were skipped; LearnerError after three in a row."""
        for report in reports:
            self._check_update(report)

    def _check_update(self, report: StepReport) -> None:
        if not report.update_skipped:
            self.skipped_updates_in_a_row = 0
            return
        self.skipped_updates += 1
        self.skipped_updates_in_a_row += 1
        log.warning("Step %d: the update was skipped because %s.", self.step - 1, report.update_skipped)
        if self.skipped_updates_in_a_row >= _MAX_SKIPPED_UPDATES:
            raise LearnerError(
                f"{self.skipped_updates_in_a_row} updates in a row were skipped, the last because {report.update_skipped}.",
                fix='start a new run with a lower training.lr or inference.dtype = "fp32"; lora.init_from = a checkpoint\'s '
                "adapter folder goes on from what was learned.",
            )
