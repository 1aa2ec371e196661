"""What a run has added up so far, as one part of its resumable state."""

from __future__ import annotations

from dataclasses import dataclass

from retrain.protocols import State


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
