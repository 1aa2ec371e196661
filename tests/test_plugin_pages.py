"""The examples of docs/plugins.md, run as they are printed, and the table of what each kind is called with."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrain import plugins
from retrain.config import names
from retrain.config.load import load
from retrain.fakes import FakeRenderer, FakeTasks
from retrain.rewards.own import make_reward
from retrain.runner import execute

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", TEXT, flags=re.M | re.S))
SNIPPETS = [name for name in BLOCKS if name.endswith(".toml")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_search_paths", [])
    (tmp_path / "plugins").mkdir()
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name in BLOCKS:
        sys.modules.pop(Path(name).stem, None)


def run(folder: Path, *snippets: str) -> list[dict[str, Any]]:
    config: dict[str, dict[str, Any]] = {
        "backend": {"devices": "cpu"}, "model": {"model": "retrain/tiny", "lora_rank": 4},
        "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
        "training": {
            "seed": 1, "max_steps": 2, "batch_size": 4, "group_size": 4, "max_tokens": 24, "temperature": 1.0,
        },
        "data": {"source": "arithmetic"}, "reward": {"type": "match"},
        "logging": {"log_dir": str(folder / "run")}, "plugins": {"search_paths": [str(folder / "plugins")]},
    }  # fmt: skip
    for snippet in snippets:
        for section, values in tomllib.loads(BLOCKS[snippet]).items():
            config.setdefault(section, {}).update(values)
    result = execute(load(config), plain=True)
    assert (result.status, result.steps) == ("done", 2)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_every_example_has_a_file_and_a_snippet() -> None:
    used = "".join(BLOCKS[s] for s in SNIPPETS) + "spread."
    for name in BLOCKS:
        if name.endswith(".py"):
            assert re.search(rf"\b{Path(name).stem}[.:]", used), name
    assert {tuple(tomllib.loads(BLOCKS[s])) for s in SNIPPETS} >= {
        ("algorithm",), ("planning",), ("reward",), ("data",), ("loss",), ("logging",),
    }  # fmt: skip


def test_the_examples_train_together(folder: Path) -> None:
    metrics = run(folder, *(s for s in SNIPPETS if s != "signed.toml"))
    assert any(m["num_datums"] for m in metrics)
    rows = [line.split("\t") for line in (folder / "run" / "table.tsv").read_text().splitlines()]
    assert [int(step) for step, _ in rows] == [0, 1]
    assert [float(reward) for _, reward in rows] == [m["mean_reward"] for m in metrics]
    recorded = json.loads((folder / "run" / "run.json").read_text())["facts"]["plugins"]
    assert recorded.count(", ") == len(SNIPPETS) - 2


def test_the_algorithm_trains(folder: Path) -> None:
    metrics = run(folder, "signed.toml", "shortest.toml", "doubles.toml")
    assert metrics[0]["condition"] == "signed.signed"
    assert any(m["num_datums"] for m in metrics)


def test_the_advantages_of_the_page(folder: Path) -> None:
    plugins.add_search_paths([folder / "plugins"])
    ranks = plugins.load("advantage", "ranks.ranks")
    assert ranks(np.array([0.0, 1.0, 1.0, 3.0]), scale=3.0).tolist() == [-3.0, 0.0, 0.0, 3.0]
    spread = plugins.load("advantage", "spread:spread")
    assert spread.batch_level is True
    got = spread([np.array([0.0, 1.0]), np.array([0.3, 0.3]), np.array([0.0, 4.0])])
    assert [a.tolist() for a in got] == [[-0.25, 0.25], [0.0, 0.0], [-1.0, 1.0]]


def test_the_table_states_what_is_called() -> None:
    rows = re.findall(r"^\| `[^|]+\| (\w+) \| `\((\w+(?:, \w+)*)[^|]*\)` \|", TEXT, flags=re.M)
    assert {kind: tuple(given.split(", ")) for kind, given in rows} == plugins.SIGNATURES
    assert set(plugins.SIGNATURES) == set(names.OPEN)


# What plug-ins.py promises and no example shows.


def test_a_package_adds_names_by_entry_points(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = folder / "site"
    (site / "adds-1.0.dist-info").mkdir(parents=True)
    (site / "adds-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: adds\nVersion: 1.0\n")
    (site / "adds-1.0.dist-info" / "entry_points.txt").write_text(
        "[retrain.transform]\nadded = early:early\nnone = early:early\n[retrain.advantage]\nwrong = early:early\n"
    )
    monkeypatch.syspath_prepend(site)
    plugins.add_search_paths([folder / "plugins"])
    assert "added" in plugins.names("transform")
    assert plugins.load("transform", "added").__name__ == "early"
    assert plugins.load("transform", "none").__module__ == "retrain.algorithms.transforms"
    base = {
        "data": {"source": "arithmetic"},
        "algorithm": {"transform_mode": "added", "transform_params": {"last": 1.0}},
    }
    assert load(base).config.algorithm.transform_mode == "added"
    assert list(plugins.digests([("transform", "added"), ("transform", "gtpo")])) == ["added"]
    with pytest.raises(plugins.PluginError, match=r"unknown transform 'adde'\. Fix: did you mean 'added'\?"):
        plugins.load("transform", "adde")


def test_a_name_of_two_packages_is_refused_when_it_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = folder / "site"
    for package, target in (("one", "early:early"), ("two", "other:early"), ("three", "early:early")):
        (site / f"{package}-1.0.dist-info").mkdir(parents=True)
        (site / f"{package}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        same = "same = early:early\n" if package != "two" else ""
        (site / f"{package}-1.0.dist-info" / "entry_points.txt").write_text(
            f"[retrain.transform]\n{same}" + (f"soon = {target}\n" if package != "three" else "")
        )
    monkeypatch.syspath_prepend(site)
    plugins.add_search_paths([folder / "plugins"])
    with pytest.raises(plugins.PluginError) as raised:
        plugins.load("transform", "soon")
    assert str(raised.value).startswith("transform 'soon' is ambiguous: ")
    assert {"one 1.0", "two 1.0", "'early:early'", "'other:early'"} <= set(re.findall(r"'\S+?'|\w+ 1\.0", str(raised.value)))
    # Two packages may mean the same object by a name.
    assert plugins.load("transform", "same").__name__ == "early"
    assert plugins.names("transform").count("same") == 1
    with pytest.raises(plugins.PluginError, match="transform 'soon' is ambiguous"):
        plugins.digests([("transform", "soon")])


def test_a_score_that_cannot_be_made_names_the_rewards_line(folder: Path) -> None:
    (folder / "plugins" / "nan_reward.py").write_text(
        "from retrain.types import Score\n\nclass Reward:\n    async def score(self, task, rollouts_G):\n"
        "        return [Score(float('nan'))]\n\ndef build(config, renderer):\n    return Reward()\n"
    )
    plugins.add_search_paths([folder / "plugins"])
    config: Any = None
    reward = make_reward("nan_reward.build", config, FakeRenderer())
    task = FakeTasks().take(1)[0]
    rollout: Any = None
    (score,) = asyncio.run(reward.score(task, [rollout]))
    assert score.error == "ValueError: a reward must be finite, not nan (nan_reward.py:5)"


def test_an_installed_plug_ins_own_line_is_named(folder: Path) -> None:
    packages = folder / "site-packages"
    (packages / "theirs").mkdir(parents=True)
    (packages / "theirs" / "__init__.py").write_text("")
    (packages / "theirs" / "pieces.py").write_text("import lib_of_others\n\ndef f():\n    lib_of_others.f()\n")
    (packages / "lib_of_others.py").write_text("import json\n\ndef f():\n    json.loads('{')\n")
    plugins.add_search_paths([packages])
    with pytest.raises(ValueError, match="Expecting") as raised:
        plugins.load("trace", "theirs.pieces:f")()
    assert plugins.place(raised.value.with_traceback(raised.value.__traceback__.tb_next)) == "pieces.py:4"


def test_a_digest_covers_what_the_module_imports_beside_it(folder: Path) -> None:
    package = folder / "plugins" / "pack"
    package.mkdir()
    files = {
        "__init__.py": "", "first.py": "from .second import f\nimport os\n", "second.py": "from pack import third\n",
        "third.py": "", "unused.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (package / name).write_text(text)
    plugins.add_search_paths([folder / "plugins"])

    def digest() -> str:
        return plugins.digests([("transform", "pack.first.f")])["pack.first.f"]

    first = digest()
    assert len(first) == 16
    for name, counts in [("unused.py", False), ("first.py", True), ("second.py", True), ("third.py", True)]:
        (package / name).write_text(files[name] + "# changed\n")
        assert (digest() != first) is counts, name
        (package / name).write_text(files[name])
    assert digest() == first
    assert "pack" not in sys.modules or "pack.first" not in sys.modules
    sys.modules.pop("pack", None)


def test_a_factory_that_returns_nothing_to_call_is_named(folder: Path) -> None:
    (folder / "plugins" / "facts_of.py").write_text(
        "def make_nothing():\n    return 3\ndef make_fails():\n    return 1 / 0\ndef make_x(a):\n    return a\n"
    )
    plugins.add_search_paths([folder / "plugins"])
    with pytest.raises(plugins.PluginError, match="is a int, not something to call"):
        plugins.load("transform", "facts_of.make_nothing")
    with pytest.raises(
        plugins.PluginError, match=r"raised ZeroDivisionError: division by zero \(facts_of.py:4\)"
    ):
        plugins.load("transform", "facts_of.make_fails")
    assert plugins.load("uncertainty", "facts_of.make_x")(5) == 5, (
        "one that takes arguments is the plug-in itself"
    )
    sys.modules.pop("facts_of", None)
