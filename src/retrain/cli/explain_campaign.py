"""What ``retrain explain`` says of a campaign: its forecast, what its conditions will do, and which of its runs is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from retrain import cards
from retrain.campaign import beforehand, forecast, plan, tune
from retrain.campaign.plan import Plan, PlannedRun
from retrain.cli.explained import sepa_record
from retrain.config.load import LoadedConfig, Origin
from retrain.config.schema import Campaign
from retrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Told:
    """A campaign before it runs. ``written`` is its configuration with the steps of its runs; ``shown`` is the run that is told
    of in detail, the one that needs the most memory; ``refusal`` where its runs cannot go at once."""

    planned: Plan
    written: LoadedConfig
    shown: PlannedRun
    record: dict[str, Any]
    refusal: ConfigError | None

    @property
    def announcements(self) -> tuple[str, ...]:
        """What is accepted and does nothing."""
        return self.planned.announcements

    def notes(self, ignored: Mapping[str, Any]) -> list[str]:
        """What the settings of the conditions imply."""
        return beforehand.notes(self.planned, ignored)


def told(loaded: LoadedConfig, gpu: str, *, data: bool) -> Told:
    """The campaign of a configuration, on this machine or on the card ``gpu``; ConfigError where no run of it is valid."""
    planned = plan.plan(plan.anchored(loaded), name="campaign")
    made = forecast.forecast(planned, cards.card(gpu) if gpu else None)
    refusal = None
    try:
        forecast.refuse_unfit(planned, made)
        if data:
            tune.declared(planned)
    except ConfigError as error:
        refusal = error
    arms = beforehand.configurations(planned)
    peaks = {label: each.memory.peak for label, each in made.estimates.items()}
    largest = max(peaks.values(), default=0)
    shown = next(run for run in planned.runs if not peaks or peaks[run.condition] == largest)
    record = {
        **forecast.record(made),
        "lines": forecast.lines(made, loaded.config),
        "shown": {"run": shown.name, "condition": shown.condition, "largest": len(set(peaks.values())) > 1},
        "sepa": {
            label: found for label, config in arms.items() if (found := sepa_record(config)) is not None
        },
    }
    return Told(planned, _written(loaded), shown, record, refusal)


def _written(loaded: LoadedConfig) -> LoadedConfig:
    """As written, with the steps that all runs take."""
    campaign = loaded.config.campaign or Campaign()
    training = loaded.config.training.model_copy(update={"max_steps": campaign.max_steps})
    origins = {**loaded.origins, "training.max_steps": Origin("file", "campaign.max_steps")}
    return replace(loaded, config=loaded.config.model_copy(update={"training": training}), origins=origins)
