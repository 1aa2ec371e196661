"""SEPA's schedule: how strongly the uncertainties of execution tokens are pooled at each step.

Lambda is resolved before a step from what earlier steps showed; correct rate and variance are observed once
after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from retrain.errors import ResumeError, RunError
from retrain.protocols import State
from retrain.types import StepStats

VARIANCE_FLOOR = 1e-8
"""Smallest var_0 that the automatic part divides by."""

_KEYS = {"gate_open", "updates", "ema", "var_0"}


class SepaSchedule:
    """Linear or automatic schedule behind a correct-rate gate.

    linear: ``clip((step - delay_steps) / steps, 0, 1)``, 0 when ``steps <= 0``. auto: the larger of that and
    ``1 - min((ema / max(var_0, 1e-8)) / threshold, 1)``, where ``ema`` (decay ``ema_decay``, starting at the
    first value) follows the variance of the uncertainty over a step's execution tokens and ``var_0`` is its
    value after ``warmup_updates`` updates; before those only the linear part counts. The variance is followed
    while the gate is closed, too.

    Gate: lambda is 0 until a step's correct rate reaches ``correct_rate_gate``, then the gate stays open; a
    gate of 0 or less starts open. An inactive schedule (a condition without SEPA) has lambda 0 at every step,
    follows along and asks nothing of the rewards. ValueError for arguments outside their ranges.
    """

    def __init__(
        self,
        *,
        steps: int = 500,
        schedule: Literal["linear", "auto"] = "linear",
        delay_steps: int = 50,
        correct_rate_gate: float = 0.1,
        ema_decay: float = 0.99,
        threshold: float = 0.2,
        warmup_updates: int = 50,
        active: bool = True,
    ) -> None:
        if schedule not in ("linear", "auto"):
            raise ValueError(f"sepa schedule must be linear or auto, not {schedule!r}")
        if not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"sepa ema_decay must be in [0, 1), not {ema_decay}")
        if not threshold > 0.0:
            raise ValueError(f"sepa threshold must be above 0, not {threshold}")
        if warmup_updates < 1:
            raise ValueError(f"sepa warmup_updates must be at least 1, not {warmup_updates}")
        self._active = active
        self._steps = steps
        self._auto = schedule == "auto"
        self._delay_steps = delay_steps
        self._gate = correct_rate_gate
        self._decay = ema_decay
        self._threshold = threshold
        self._warmup_updates = warmup_updates
        self._gate_open = correct_rate_gate <= 0.0
        self._updates = 0
        self._ema: float | None = None
        self._var_0: float | None = None

    @property
    def active(self) -> bool:
        """False for credit that does not read lambda."""
        return self._active

    @property
    def gate_open(self) -> bool:
        """True from the first step on whose correct rate reached the gate (or always, without a gate)."""
        return self._gate_open

    def _linear(self, step: int) -> float:
        if self._steps <= 0:
            return 0.0
        return min(max((step - self._delay_steps) / self._steps, 0.0), 1.0)

    def lambda_at(self, step: int) -> float:
        """Pooling weight of the 0-based ``step``, in [0, 1], from everything observed so far."""
        if not (self._active and self._gate_open):
            return 0.0
        linear = self._linear(step)
        if not self._auto or self._var_0 is None or self._ema is None:
            return linear
        remaining = (self._ema / max(self._var_0, VARIANCE_FLOOR)) / self._threshold
        return max(linear, 1.0 - min(remaining, 1.0))

    def linear_lambdas(self, steps: Sequence[int]) -> list[float]:
        """The linear part at each of ``steps`` with the gate taken as open: what is known before a run."""
        return [self._linear(step) if self._active else 0.0 for step in steps]

    def observe(self, stats: StepStats) -> None:
        """Take in one step's correct rate and execution variance (None: no execution token, no update).

        RunError when the gate is still closed and the rewards do not say what is correct. A step that shows
        neither number (all its rollouts broke) is passed over.
        """
        rate, variance = stats.correct_rate, stats.exec_variance
        if not self._gate_open and rate is not None:
            self._gate_open = rate >= self._gate
        elif not self._gate_open and variance is not None and self._active:
            raise RunError(
                "SEPA's gate waits for a correct rate, and rewards outside [0, 1] do not tell it.",
                fix="set reward.correct_at to the reward above which a rollout counts as correct, "
                "or sepa.correct_rate_gate = 0 to start with the gate open.",
            )
        if variance is None:
            return
        if not (math.isfinite(variance) and variance >= 0.0):
            raise ValueError(f"a variance is finite and not negative, not {variance}")
        self._ema = (
            variance if self._ema is None else self._decay * self._ema + (1.0 - self._decay) * variance
        )
        self._updates += 1
        if self._updates == self._warmup_updates:
            self._var_0 = self._ema

    def state_dict(self) -> State:
        """Gate, number of updates, average and var_0. Floats survive JSON bit for bit."""
        return {
            "gate_open": self._gate_open,
            "updates": self._updates,
            "ema": self._ema,
            "var_0": self._var_0,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue exactly from ``state_dict``; ResumeError for a state that this schedule did not write."""
        if set(state) != _KEYS:
            raise ResumeError(
                f"the saved SEPA state has {', '.join(sorted(state)) or 'nothing in it'}, "
                f"expected {', '.join(sorted(_KEYS))}.",
                fix="resume with the transform_mode of the saved run.",
            )
        ema, var_0 = state["ema"], state["var_0"]
        self._gate_open = bool(state["gate_open"])
        self._updates = int(state["updates"])
        self._ema = None if ema is None else float(ema)
        self._var_0 = None if var_0 is None else float(var_0)
