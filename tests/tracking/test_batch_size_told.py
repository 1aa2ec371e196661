"""What a run under back pressure says on the console: in each step, and at its end."""

from __future__ import annotations

import logging

import pytest

from retrain.sinks import BatchSizes, ConsoleSink, step_line

NONE = {
    "bp_p_star": None,
    "bp_p_star_low": None,
    "bp_p_star_high": None,
    "bp_sigma": None,
    "bp_ceiling": None,
}
FIT = {"bp_p_star": 120.0, "bp_p_star_low": 96.0, "bp_p_star_high": 160.0, "bp_sigma": 0.01}


def row(size, then, action, rate=100.0, **more):
    return {
        "batch_size": size, "group_size": 8, "tokens_per_second": rate, "bp_action": action, "bp_batch_size": then, **NONE,
        **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (row(1, 2, "warm-up"), "bp=warm-up to 2"),
        (row(16, 12, "throttle", **FIT), "bp=throttle to 12, peak near 15 tasks"),
        (row(16, 16, "hold", bp_sigma=0.02), "bp=hold, no peak in sight"),
        (row(4, 4, "hold"), "bp=hold, no fit"),
        (row(8, 8, "hold", bp_out_of_memory=1, bp_sigma=0.1), "bp=hold, memory ran out, no peak in sight"),
        (row(8, 2, "probe", bp_drifted=True), "bp=probe to 2, throughput has changed"),
    ],
)
def test_a_step_says_what_was_decided_and_why(metrics, said):
    assert step_line(3, metrics).endswith(f" | {said}")
    assert "bp=" not in step_line(3, {"batch_size": 4})


def advice(*rows):
    sizes = BatchSizes()
    for each in rows:
        sizes.log(each)
    return sizes.advice()


def test_the_end_names_a_size_and_the_reason():
    cold = row(1, 1, "warm-up", rate=9999.0)
    swept = [cold, row(1, 2, "warm-up", 100.0), row(2, 4, "warm-up", 180.0), row(4, 4, "warm-up", 150.0)]
    assert advice() == advice({"batch_size": 4}) == ""
    assert advice(*swept) == (
        "Back pressure was still measuring: it recommends no batch size yet. "
        "Of 1, 2, 4 tasks 2 was the fastest, 180 tokens/s so far."
    )
    assert advice(*swept, row(4, 12, "throttle", **FIT)) == (
        "Back pressure: use training.batch_size = 12 next time. Why: throughput peaks near 15 tasks (95 % interval 12 to 20)."
    )
    found = advice(*swept, row(16, 16, "hold", bp_sigma=0.0, bp_ceiling=16))
    assert found.endswith(
        "= 16 next time. Why: throughput has no peak in sight up to 16 tasks. Memory ran out above 16."
    )
    found = advice(*swept, row(4, 4, "hold"))
    assert "= 2 next time. Why: no law fitted what was measured; of 1, 2, 4 tasks 2 was the fastest" in found
    assert "still growing" in advice(*swept, row(4, 8, "grow", **FIT))


def test_the_line_comes_once_when_the_run_closes(caplog):
    sink = ConsoleSink(total_steps=2, plain=True)
    sink.log(0, row(1, 2, "warm-up"))
    sink.log(1, row(2, 2, "hold", bp_sigma=0.0))
    with caplog.at_level(logging.INFO, logger="retrain"):
        sink.close()
        sink.close()
    assert [r.getMessage()[:53] for r in caplog.records] == [
        "Back pressure: use training.batch_size = 2 next time."
    ]
