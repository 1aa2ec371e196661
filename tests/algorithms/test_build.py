"""From a configuration to an algorithm and its schedule."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrain.algorithms import advantages, transforms
from retrain.algorithms.credit import build, build_schedule, credit
from retrain.algorithms.planning import DEFAULT_GRAMS
from retrain.config.names import ALIASES, BUILT, CONDITIONS
from retrain.config.schema import Config
from retrain.errors import ConfigError, PluginError
from retrain.types import ScoredGroup, StepStats


class Renderer:
    """Only what an algorithm asks of one."""

    def offsets(self, token_ids: Any) -> tuple[str, list[tuple[int, int]]]:
        return " " * len(token_ids), [(i, i + 1) for i in range(len(token_ids))]


def config_of(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(sections)


def build_of(**sections: dict[str, Any]) -> Any:
    return build(config_of(**sections), Renderer())  # type: ignore[arg-type]


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An importable module ``mine`` of plug-ins."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_the_default_condition() -> None:
    got = build_of()
    assert (got.advantage, got.transform, got.uncertainty) == (
        advantages.maxrl, transforms.gtpo_sepa, transforms.surprisal,
    )  # fmt: skip
    assert got.params == {"beta": 0.1, "alpha": 0.2}
    assert got.correct_at is None
    assert got.detector.grams == DEFAULT_GRAMS


@pytest.mark.parametrize(("advantage", "transform"), CONDITIONS)
def test_every_standard_condition_builds_and_credits(
    advantage: str, transform: str, make_group: Callable[..., ScoredGroup]
) -> None:
    section = {"advantage_mode": advantage, "transform_mode": transform}
    algorithm = build_of(algorithm=section)
    assert (algorithm.advantage_name, algorithm.transform_name) == (advantage, transform)
    assert credit(make_group([0.0, 1.0, 1.0]), algorithm, 0.5).skipped == ""
    schedule = build_schedule(
        config_of(algorithm=section, sepa={"steps": 1, "delay_steps": 0, "correct_rate_gate": 0.0})
    )
    assert schedule.lambda_at(1) == (1.0 if transform == "gtpo_sepa" else 0.0)


@pytest.mark.parametrize(("alias", "name"), ALIASES["uncertainty"].items())
def test_aliases_of_uncertainties(alias: str, name: str) -> None:
    got = build_of(algorithm={"uncertainty_kind": alias})
    assert got.uncertainty_name == name
    assert got.uncertainty is getattr(transforms, name)


def test_what_built_in_transforms_read_is_known_for_all_of_them() -> None:
    assert set(transforms.PARAMETERS) == set(BUILT["transform"])
    assert set(transforms.PARAMETERS) >= transforms.SEPA_TRANSFORMS


def test_settings_reach_their_pieces() -> None:
    got = build_of(
        gtpo={"beta": 0.5},
        hicra={"alpha": 0.0},
        reward={"correct_at": 3.0},
        logging={"strategic_grams": "hold on"},
        algorithm={"transform_params": {"beta": 2.0}},
    )
    assert got.params == {"beta": 2.0, "alpha": 0.0}
    assert got.correct_at == 3.0
    assert got.detector.grams == ("hold on",)


def test_the_schedule_is_the_configured_one() -> None:
    schedule = build_schedule(
        config_of(
            sepa={
                "steps": 4, "schedule": "auto", "delay_steps": 1, "correct_rate_gate": 0.5, "ema_decay": 0.5,
                "threshold": 0.5, "warmup_updates": 1,
            }
        )
    )  # fmt: skip
    schedule.observe(StepStats(0.5, 4.0))
    assert schedule.lambda_at(2) == 0.25
    schedule.observe(StepStats(0.0, 0.0))
    assert schedule.state_dict() == {"gate_open": True, "updates": 2, "ema": 2.0, "var_0": 4.0}
    schedule.observe(StepStats(0.0, 0.0))
    assert schedule.lambda_at(0) == 0.5


def test_plug_ins_of_ones_own_get_their_parameters(
    mine: types.ModuleType, make_group: Callable[..., ScoredGroup]
) -> None:
    def centre(rewards: Any, *, scale: float) -> Any:
        return scale * (rewards - rewards.mean())

    def negate(group: Any, advantages_G_T: Any, context: Any) -> Any:
        return [context.params["sign"] * a for a in advantages_G_T]

    negate.uses_sepa = True  # type: ignore[attr-defined]
    mine.centre, mine.negate = centre, negate  # type: ignore[attr-defined]
    mine.flat = lambda rollout: np.where(rollout.sampled_T, 1.0, np.nan)  # type: ignore[attr-defined]
    mine.detector = lambda config: lambda text, offsets: np.ones(len(offsets), bool)  # type: ignore[attr-defined]
    sections: dict[str, Any] = {
        "algorithm": {
            "advantage_mode": "mine.centre", "transform_mode": "mine:negate", "uncertainty_kind": "mine.flat",
            "advantage_params": {"scale": 4.0}, "transform_params": {"sign": -1.0},
        },
        "planning": {"detector": "mine.detector"},
        "sepa": {"steps": 1, "delay_steps": 0, "correct_rate_gate": 0.0},
    }  # fmt: skip
    group = make_group([0.0, 1.0])
    got = credit(group, build_of(**sections), 0.0)
    sampled = group.rollouts_G[1].sampled_T
    assert set(got.advantages_G_T[1][sampled].tolist()) == {-2.0}
    assert got.planning_G_T[1].tolist() == sampled.tolist()
    assert build_schedule(config_of(**sections)).lambda_at(1) == 1.0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"advantage_params": {"eps": 1.0}}, "advantage 'maxrl' cannot be called with eps=1.0"),
        ({"transform_mode": "gtpo", "transform_params": {"alpha": 1.0}}, "takes beta, and .*'alpha'"),
        ({"transform_mode": "none", "transform_params": {"beta": 1.0}}, "takes no parameters"),
        ({"transform_params": {"beta": "0.1"}}, "beta of transform 'gtpo_sepa' must be a finite number"),
        ({"transform_params": {"beta": float("nan")}}, "must be a finite number"),
        ({"params": {"x": 1}}, "algorithm.params sets x"),
        (
            {"transform_mode": "entropy_mask", "transform_params": {"rho": 0.0}},
            "rho .* above 0 and at most 1",
        ),
        (
            {"transform_mode": "entropy_mask", "transform_params": {"rho": 1.1}},
            "rho .* above 0 and at most 1",
        ),
        ({"transform_mode": "entropy_mask", "transform_params": {"beta": 1.0}}, "takes rho, and .*'beta'"),
        (
            {"advantage_mode": "reinforce_pp", "advantage_params": {"eps": 1.0}},
            "cannot be called with eps=1.0",
        ),
    ],
)
def test_parameters_that_nothing_reads_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_of(algorithm=section)
    assert caught.value.fix


def test_an_algorithm_stands_in_for_advantage_and_transform(
    mine: types.ModuleType, make_group: Callable[..., ScoredGroup]
) -> None:
    def whole(group: Any, context: Any) -> Any:
        scale = context.params["scale"] * (1 + context.sepa_lambda)
        return [
            np.where(r.sampled_T, scale * (s.reward - 0.5), 0.0).astype(np.float32)
            for r, s in zip(group.rollouts_G, group.scores_G, strict=True)
        ]

    whole.uses_sepa = True  # type: ignore[attr-defined]
    mine.whole = whole  # type: ignore[attr-defined]
    sections: dict[str, Any] = {
        "algorithm": {"algorithm_mode": "mine.whole", "params": {"scale": 4.0}},
        "sepa": {"steps": 1, "delay_steps": 0, "correct_rate_gate": 0.0},
    }
    algorithm = build_of(**sections)
    assert (algorithm.whole_name, algorithm.params) == ("mine.whole", {"scale": 4.0})
    # 3.0 is a reward that maxrl, the default advantage, would refuse.
    group = make_group([0.0, 3.0, None])
    got = credit(group, algorithm, 0.5)
    values = [set(a[r.sampled_T].tolist()) for a, r in zip(got.advantages_G_T, group.rollouts_G, strict=True)]
    assert values == [{-3.0}, {15.0}, {0.0}]
    assert build_schedule(config_of(**sections)).lambda_at(1) == 1.0
    whole.uses_sepa = False  # type: ignore[attr-defined]
    assert build_schedule(config_of(**sections)).lambda_at(1) == 0.0


def test_a_batch_level_advantage_keeps_its_level_with_parameters(mine: types.ModuleType) -> None:
    def centre(rewards_P_G: Any, *, scale: float) -> Any:
        return [scale * (r - r.mean()) for r in rewards_P_G]

    centre.batch_level = True  # type: ignore[attr-defined]
    mine.centre = centre  # type: ignore[attr-defined]
    got = build_of(algorithm={"advantage_mode": "mine.centre", "advantage_params": {"scale": 2.0}})
    assert got.advantage.batch_level is True
    assert [a.tolist() for a in got.advantage([np.array([0.0, 1.0])])] == [[-1.0, 1.0]]


def test_only_mask_masks() -> None:
    flags = {t: build_of(training={"truncated": t}).mask_truncated for t in ("score", "mask", "soft")}
    assert flags == {"score": False, "mask": True, "soft": False}


def test_entropy_mask_has_a_share_of_its_own() -> None:
    assert build_of(algorithm={"transform_mode": "entropy_mask"}).params["rho"] == 0.2
    given = {"transform_mode": "entropy_mask", "transform_params": {"rho": 0.5}}
    assert build_of(algorithm=given).params["rho"] == 0.5


def test_unknown_names_are_refused(mine: types.ModuleType) -> None:
    with pytest.raises(PluginError, match="grop"):
        build_of(algorithm={"advantage_mode": "grop"})
    mine.detector = lambda config: None  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="made a NoneType"):
        build_of(planning={"detector": "mine.detector"})
