"""The code blocks of CONTRIBUTING.md, run as they are printed: the reward, the advantage and the backend work."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest

from retrain import plugins
from retrain.algorithms import advantages
from retrain.config import names
from retrain.config.load import load
from retrain.runner import execute

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", TEXT, flags=re.M | re.S))


def contract(kind: str) -> types.ModuleType:
    """The contract suite of a protocol, as a module whose tests can be called."""
    path = ROOT / "tests" / "contract" / f"test_{kind}_contract.py"
    spec = importlib.util.spec_from_file_location(f"contributing_{kind}_contract", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    """Do what the page's diff of plugins.py and names.py does, reading the target from that diff."""
    target = re.search(rf'^\+.*"{name}": "([\w.:]+)"', TEXT, flags=re.M)
    assert target is not None
    assert re.search(rf'^\+    "{kind}": \(.*"{name}"\),$', TEXT, flags=re.M)
    monkeypatch.setitem(plugins.TABLE[kind], name, target[1])
    monkeypatch.setitem(names.BUILT, kind, (*names.BUILT[kind], name))


@pytest.fixture
def duels(monkeypatch):
    space = dict(vars(advantages))
    exec(BLOCKS["src/retrain/algorithms/advantages.py"], space)
    monkeypatch.setattr(advantages, "duels", space["duels"], raising=False)
    register(monkeypatch, "advantage", "duels")
    return plugins.load("advantage", "duels")


@pytest.fixture
def positive(monkeypatch):
    module = types.ModuleType("retrain.backends.positive")
    exec(BLOCKS["src/retrain/backends/positive.py"], vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register(monkeypatch, "backend", "positive")
    return plugins.load("backend", "positive")


def test_the_page_holds_the_four_blocks_and_each_is_short():
    assert len(BLOCKS) == 4
    assert all(len([line for line in body.splitlines() if line.strip()]) <= 10 for body in BLOCKS.values())


def test_the_advantage_keeps_its_contract(duels):
    suite = contract("advantage")
    suite.test_one_finite_float64_per_member(duels)
    suite.test_members_are_treated_alike(duels)
    suite.test_a_better_member_is_never_credited_less(duels)
    for rewards in ([0.1] * 6, [0.0] * 4, [1.0] * 4):
        suite.test_equal_rewards_get_exactly_nothing(duels, rewards)
    suite.test_empty_in_empty_out(duels)
    suite.test_the_same_rewards_get_the_same_advantages(duels)


def test_the_backend_keeps_its_contract(positive, make_config, random_model, tmp_path):
    suite = contract("backend")
    model = str(random_model(layers=1, hidden=32, heads=1))

    def make():
        return positive(make_config(model={"model": model, "lora_rank": 2}), None)

    suite.test_it_is_a_backend(make)
    suite.test_a_step_changes_weights_and_version(make)
    suite.test_an_empty_batch_is_refused(make)
    suite.test_restore_equals_save_and_the_next_step_too(make, tmp_path)


def test_all_three_train_a_step_together(duels, positive, tmp_path):
    config = tmp_path / "near.toml"
    config.write_text(BLOCKS["near.toml"], encoding="utf-8")
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "near.py").write_text(BLOCKS["plugins/near.py"], encoding="utf-8")
    loaded = load(
        config,
        {
            "backend.backend": "positive",
            "backend.devices": "cpu",
            "model.model": "retrain/tiny",
            "model.lora_rank": 4,
            "data.source": "arithmetic",
            "algorithm.advantage_mode": "duels",
            "algorithm.transform_mode": "none",
            "training.seed": 1,
            "training.max_steps": 1,
            "training.batch_size": 2,
            "training.group_size": 4,
            "training.max_tokens": 24,
            "training.temperature": 1.0,
            "logging.log_dir": str(tmp_path / "run"),
        },
    )
    assert execute(loaded, plain=True).status == "done"
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8"))
    assert row["condition"] == "duels+none"
    assert row["num_datums"] > 0
    assert row["grad_norm"] > 0
    assert row["reward_error_rate"] == 0
    assert 0 < row["mean_reward"] < 1
