"""generations.jsonl carries the credit of every token of the rollouts it holds; sinks are told, and may break."""

from __future__ import annotations

import json
import math
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest

from retrain.algorithms.credit import correct
from retrain.fakes import FakeRenderer
from retrain.tracking import layout
from retrain.tracking.run_log import RunLog, to_json
from retrain.types import CreditedGroup, Message, Rollout, Score, ScoredGroup, Task

NAN = math.nan


def group(*, error: str = "", second: Score | None = None, stop: str = "stop") -> CreditedGroup:
    """Two members: "ab", then a tool's "x", then "cd"; the second may have a reward that failed, or another score."""
    sampled = np.array([False, True, True, False, True, True])
    ids = FakeRenderer().encode([Message("user", "qabxcd")])
    logprobs = np.where(sampled, np.float32(-1.23456789), np.float32(NAN)).astype(np.float32)
    broken = "gone" if stop == "error" else ""
    members = tuple(Rollout("t", m, ids, sampled, logprobs, None, "abcd", stop, 3, broken) for m in range(2))
    scores = (Score(1.0, parts={"match": 1.0}), Score.failed(error) if error else second or Score(0.0))
    advantages = tuple(np.where(sampled, s * np.float32(1 / 3), 0).astype(np.float32) for s in (1, -1))
    uncertainty = np.where(sampled, np.float32(0.5), np.float32(NAN)).astype(np.float32)
    planning = np.array([False, True, False, False, False, True])
    task = Task("t", (Message("user", "q"),), "ref", "s", 0)
    return CreditedGroup(
        ScoredGroup(task, members, scores), advantages, (uncertainty, uncertainty), (planning, planning), ""
    )


class Sink:
    def __init__(self, breaks: str = "") -> None:
        self.calls: list[str] = []
        self.rows: list = []
        self.breaks = breaks

    def _call(self, name):
        self.calls.append(name)
        if name == self.breaks:
            raise ValueError("no more")

    def log(self, step, metrics):
        self._call("log")

    def generations(self, step, rows):
        self.rows = list(rows)
        self._call("generations")

    def ended(self, status):
        self._call(status)

    def close(self):
        self._call("close")


def write(run, sinks=(), generations=8, judge=None, **changes):
    log = RunLog(run, FakeRenderer(), sinks, generations=generations, store=None, judge=judge)
    log.begin({})
    log.step(4, {"uncertainty_kind": "surprisal"}, [group(**changes)])
    log.evaluation(5, {"eval/accuracy": 0.5})
    log.status("done", step=5)
    log.close()
    return [json.loads(line) for line in (run / layout.GENERATIONS).read_text().splitlines()]


def test_every_sampled_token_has_its_text_and_credit(tmp_path):
    first, second = write(tmp_path)
    assert first["credit"] == {
        "uncertainty_kind": "surprisal",
        "texts": ["a", "b", "c", "d"],
        "advantages": [0.333333] * 4,
        "uncertainty": [0.5] * 4,
        "planning": [1, 0, 0, 1],
        "logprobs": [-1.23457] * 4,
    }
    assert second["credit"]["advantages"] == [-0.333333] * 4
    assert (first["completion"], first["tokens"], first["planning_tokens"]) == ("abcd", 4, 2)


def test_a_failed_reward_is_null_in_the_file(tmp_path):
    rows = write(tmp_path, error="too slow")
    assert rows[1]["reward"] is None
    assert rows[1]["error"] == "too slow"


def test_correct_is_what_the_run_counts(tmp_path):
    judge = partial(correct, correct_at=0.5)

    def verdicts(name, **changes):
        return [row["correct"] for row in write(tmp_path / name, judge=judge, **changes)]

    assert verdicts("plain") == [True, False]
    assert verdicts("passed", second=Score(0.4, passed=True)) == [True, True]
    assert verdicts("not passed", second=Score(0.9, passed=False)) == [True, False]
    assert verdicts("failed reward", error="too slow") == [True, None]
    assert verdicts("failed rollout", stop="error") == [None, None]
    rows = write(tmp_path / "unjudged", second=Score(0.4, passed=True))
    assert [row["correct"] for row in rows] == [None, True]


@pytest.mark.parametrize(("wanted", "rows"), [(0, 0), (1, 1), (9, 2)])
def test_how_many_are_written_and_shown(tmp_path, wanted, rows):
    sink = Sink()
    assert len(write(tmp_path, [sink], wanted)) == rows
    assert len(sink.rows) == rows
    assert sink.calls == [*(["generations"] if rows else []), "log", "log", "done", "close"]


def test_a_sink_needs_only_log_and_close(tmp_path):
    seen = []

    class Small:
        def log(self, step, metrics):
            seen.append(step)

        def close(self):
            seen.append("closed")

    write(tmp_path, [Small()])
    assert seen == [4, 5, "closed"]


@pytest.mark.parametrize("breaks", ["generations", "log", "done"])
def test_a_sink_that_breaks_is_off_with_one_warning_and_the_others_go_on(tmp_path, caplog, breaks):
    bad, good = Sink(breaks), Sink()
    with caplog.at_level("WARNING", "retrain"):
        write(tmp_path, [bad, good])
    assert good.calls == ["generations", "log", "log", "done", "close"]
    assert bad.calls[-1] == breaks
    assert bad.calls.count(breaks) == 1
    warnings = [r.getMessage() for r in caplog.records]
    assert warnings == ["Sink failed and is off for the rest of the run: no more"]


def test_a_sink_that_cannot_be_closed_warns(tmp_path, caplog):
    with caplog.at_level("WARNING", "retrain"):
        write(tmp_path, [Sink("close")])
    assert [r.getMessage() for r in caplog.records] == ["Sink failed to close: no more"]


def test_a_resume_tells_everything_up_to_the_checkpoint_to_sinks_that_replay(tmp_path):
    log = RunLog(tmp_path, FakeRenderer(), [], generations=8, store=None)
    log.evaluation(0, {"eval/accuracy": 0.25})
    log.step(0, {"loss": 0.1}, [group()])
    kept = log.state_dict()
    log.step(1, {"loss": 0.2}, [group()])
    log.close()

    class Replaying(Sink):
        replays = True

        def log(self, step, metrics):
            super().log(step, metrics)
            self.calls.append((step, dict(metrics)))

    plain, asking = Sink(), Replaying()
    log = RunLog(tmp_path, FakeRenderer(), [plain, asking], generations=8, store=None)
    log.load_state_dict(kept)
    assert plain.calls == []
    assert asking.calls == ["log", (0, {"eval/accuracy": 0.25}), "generations", "log", (0, {"loss": 0.1})]
    assert [row["member"] for row in asking.rows] == [0, 1]
    log.step(1, {"loss": 0.2}, [group()])
    assert plain.calls == ["generations", "log"]
    assert asking.calls[-1] == (1, {"loss": 0.2})
    log.close()


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"a": [0.1, 1e-7], "b": True, "c": None, "d": "\u00e9"}, '{"a": [0.1, 1e-07], "b": true, "c": null, "d": "\u00e9"}'),
        ({"a": np.float64(0.1), "b": (1, 2), "n": 2**70}, '{"a": 0.1, "b": [1, 2], "n": 1180591620717411303424}'),
        ({"a": [1.0, math.nan], "b": -math.inf}, '{"a": [1.0, null], "b": null}'),
        ({"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}, '{"a": 0.5, "b": 3, "c": true}'),
        ({"a": MappingProxyType({1: [{"x": np.float64(math.nan)}]})}, '{"a": {"1": [{"x": null}]}}'),
    ],
)
def test_a_record_is_one_line_of_strict_json(value, line):
    assert to_json(value) == line
