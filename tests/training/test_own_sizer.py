"""A controller of the batch size of one's own: held to its protocol, and named where it breaks it."""

from __future__ import annotations

from typing import Any

import pytest

from retrain import plugins
from retrain.errors import PluginError, RunError
from retrain.training.backpressure import BackPressure
from retrain.training.own_parts import make_sizer
from retrain.types import Sampled

MODULE = """
class Sizer:
    def next(self): return {next}
    def observe(self, seen): return {observe}
    def out_of_memory(self, batch_size): return {out}
    def state_dict(self): return {{}}
    def load_state_dict(self, state): pass

def make_sizer(config): return Sizer()
"""


@pytest.fixture
def made(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, make_config: Any, request: pytest.FixtureRequest) -> Any:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "own_sizer_" + "".join(c if c.isalnum() else "_" for c in request.node.name)[-60:]

    def make(next: str = "3", observe: str = "{}", out: str = "batch_size // 2", text: str = MODULE) -> Any:
        (tmp_path / f"{name}.py").write_text(text.format(next=next, observe=observe, out=out))
        plugins.add_search_paths([tmp_path])
        return make_sizer(make_config(backpressure={"enabled": True, "controller": f"{name}.make_sizer", "max_batch_size": 8}))

    return make


def test_the_built_in_one_and_none(make_config: Any) -> None:
    assert make_sizer(make_config()) is None
    assert isinstance(make_sizer(make_config(backpressure={"enabled": True})), BackPressure)


def test_what_keeps_to_the_protocol_passes(made: Any) -> None:
    sizer = made(next="__import__('numpy').int64(8)", observe="{'bp_mine': 1}")
    assert sizer.next() == 8
    assert type(sizer.next()) is int
    assert sizer.observe(Sampled(8, 2, 10, 1.0)) == {"bp_mine": 1}
    assert sizer.out_of_memory(8) == 4
    assert sizer.out_of_memory(1) == 0


@pytest.mark.parametrize("size", ["0", "9", "2.0", "True", "None", "-1"])
def test_a_size_out_of_its_limits_names_the_plug_in(made: Any, size: str) -> None:
    with pytest.raises(RunError, match=r"its next returned .*, not a whole number from 1 to 8"):
        made(next=size).next()


@pytest.mark.parametrize("size", ["batch_size", "-1", "None"])
def test_memory_that_ran_out_asks_for_fewer(made: Any, size: str) -> None:
    with pytest.raises(RunError, match=r"its out_of_memory returned .*, not a whole number from 0 to 3"):
        made(out=size).out_of_memory(4)


def test_metrics_have_names_of_their_own(made: Any) -> None:
    with pytest.raises(RunError, match="returned the metric 'loss'"):
        made(observe="{'loss': 0.0}").observe(Sampled(8, 2, 10, 1.0))


def test_what_it_raises_is_one_line_with_its_place(made: Any) -> None:
    with pytest.raises(RunError, match=r"raised ZeroDivisionError: division by zero \(own_sizer_.*\.py:4\)"):
        made(observe="1 / 0").observe(Sampled(8, 2, 10, 1.0))


def test_a_missing_method_is_found_before_the_run(made: Any) -> None:
    with pytest.raises(PluginError, match="which has no method out_of_memory"):
        made(text=MODULE.replace("def out_of_memory", "def other"))
