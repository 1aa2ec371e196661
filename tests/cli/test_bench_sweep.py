"""``retrain bench --sweep``: a real sweep of the embedded model, what it recommends, and where memory ends it."""

from __future__ import annotations

import json
import math
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.logging

from retrain.bench import curve
from retrain.bench.step import Settings
from retrain.bench.sweep import Sweep, _points, recommended, sweep
from retrain.cli.main import main
from retrain.config.load import load
from retrain.config.templates import path_of
from retrain.errors import OutOfMemory
from retrain.training import usl
from retrain.types import Sampled

torch.set_num_threads(1)
transformers.utils.logging.get_logger()

LINE = [
    "bench", "--sweep", "--group-size", "2", "--max-batch-size", "8", "--devices", "cpu", "--lora-rank", "4", "--steps", "2",
    "--trace", "flat:4", "--prompt-tokens", "10",
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(kappa: float, *, noise: float = 0.0, most: int = 64) -> dict[str, Any]:
    """The record of a sweep over a system that obeys the law."""
    group, points, pairs = 8, [], []
    for i, size in enumerate(s for s in (1, 2, 4, 8, 16, 32, 64) if s <= most):
        rate = usl.throughput(size * group, sigma=0.02, kappa=kappa, rate=50.0)
        each = [rate * (1 + noise * math.sin(7 * i + j)) for j in range(3)]
        points.append(
            {
                "batch_size": size, "concurrency": size * group, "tokens_per_second": sum(each) / 3, "each": each,
                "step_tokens_per_second": None,
            }
        )  # fmt: skip
        pairs += [(size * group, x) for x in each]
    fitted = usl.fit(pairs)
    assert fitted is not None
    return {
        "model": "a & b", "weights": {}, "points": points, "ran_out_at": None,
        "settings": {"lora_rank": 4, "group_size": group, "prompt_tokens": 1, "trace": "t", "steps": 3, "throttle_margin": 0.85},
        "fit": {
            **{n: _range(getattr(fitted, n)) for n in ("sigma", "kappa", "p_star")},
            "noise": fitted.noise, "coefficients": list(fitted.coefficients),
            "tokens_per_second": [fitted.throughput(p["concurrency"]) for p in points],
        },
        "recommended": recommended(points, fitted, group, 0.85),
    }  # fmt: skip


def _range(found: usl.Range) -> dict[str, float | None]:
    ends = {"value": found.value, "low": found.low, "high": found.high}
    return {end: value if math.isfinite(value) else None for end, value in ends.items()}


def test_a_real_sweep_measures_every_size_and_names_one(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, place: Path
) -> None:
    with caplog.at_level("WARNING"):
        assert main([*LINE, "--json", "--out", "curve.svg"]) == 0
    # Lengths are given, so all answers may be cut: no reason to raise an alarm.
    assert "alarm" not in caplog.text
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert [p["batch_size"] for p in record["points"]] == [1, 2, 4, 8]
    assert [p["concurrency"] for p in record["points"]] == [2, 4, 8, 16]
    for point in record["points"]:
        assert len(point["each"]) == 2
        assert point["tokens_per_second"] == pytest.approx(sum(point["each"]) / 2)
        assert 0 < point["step_tokens_per_second"] < point["tokens_per_second"]
    assert 1 <= record["recommended"]["low"] <= record["recommended"]["batch_size"] <= record["recommended"]["high"] <= 8
    assert ET.parse(place / "curve.svg").getroot().tag.endswith("svg")
    assert sorted(p.name for p in place.iterdir()) == ["curve.svg"]


def test_the_recommendation_is_the_margin_of_the_peak() -> None:
    record = made(1e-4)
    star = math.sqrt(0.98 / 1e-4)
    assert record["recommended"] == {"batch_size": int(0.85 * star / 8), "low": 10, "high": 10, "because": "peak"}
    text = curve.report(record)
    assert text.endswith("[training]\nbatch_size = 10")
    assert "at 99 rollouts at once" in text
    assert "85% of the peak" in text


def test_without_a_peak_the_largest_size_is_named() -> None:
    record = made(0.0)
    assert record["recommended"] == {"batch_size": 64, "low": 64, "high": 64, "because": "largest"}
    text = curve.report(record)
    assert "throughput has no peak below it" in text
    assert text.endswith("It is the largest size tried: --max-batch-size 256 shows whether throughput still grows.")
    assert "largest size tried" not in curve.report({**record, "ran_out_at": 128})
    assert "more often" not in text


def test_where_noise_hides_the_peak_the_fastest_is_named() -> None:
    record = made(1e-5, noise=0.6)
    best = max(record["points"], key=lambda p: p["tokens_per_second"])["batch_size"]
    assert record["recommended"]["because"] == "fastest"
    assert record["recommended"]["batch_size"] == best
    assert "not told from noise" in curve.report(record)
    assert "--steps 6 measures each size more often" in curve.report(record)


def test_a_peak_that_is_not_told_from_noise_is_shown_with_its_interval() -> None:
    record = made(1e-4)
    record["fit"]["p_star"] = {"value": None, "low": 0.0, "high": 1.69}
    assert "peak       not told from noise; the 95 % interval is 0 to 2 rollouts at once" in curve.report(record)


def test_without_a_fit_the_fastest_is_named_with_no_less_than_what_was_measured() -> None:
    points = [{"batch_size": s, "tokens_per_second": r} for s, r in ((4, 3.0), (8, 5.0), (9, 4.0))]
    assert recommended(points, None, 8, 0.85) == {"batch_size": 8, "low": 4, "high": 9, "because": "fastest"}


def test_the_pictures_hold_every_measurement_and_escape_names() -> None:
    record = made(1e-4)
    root = ET.fromstring(curve.svg(record))
    assert len(root.findall(".//{*}circle")) == 21
    assert len(root.findall(".//{*}polyline")) == 1
    page = curve.html(record)
    assert "a &amp; b" in page.replace("\\u0026", "&")
    assert "<script src=" not in page


def seen(size: int, put_back: int = 0) -> Sampled:
    return Sampled(size, 8, 100, 0.5, put_back=put_back)


def test_the_first_round_warms_up_and_the_last_one_stops() -> None:
    stop = threading.Event()
    sizer = Sweep([1, 2, 4], 3, stop)
    visited = []
    while not stop.is_set():
        visited.append(sizer.next())
        sizer.observe(seen(visited[-1]))
    assert visited == [1, 2, 4] * 3
    assert [m.size for m in sizer.measured] == [1, 2, 4] * 2
    assert all(m.rate == 200 for m in sizer.measured)


@pytest.mark.parametrize("at_round", [0, 1])
def test_memory_that_runs_out_ends_the_sweep_below(at_round: int) -> None:
    stop = threading.Event()
    sizer = Sweep([1, 2, 4, 8], 3, stop)
    visited, step = [], 0
    while not stop.is_set():
        size, put_back = sizer.next(), 0
        if size >= 4 and step // 4 >= at_round:
            put_back, size = size, sizer.out_of_memory(size)
        visited.append(size)
        sizer.observe(seen(size, put_back))
        step += 1
    assert sizer.ran_out_at == 4
    assert visited[-2:] == [1, 2]
    assert visited.count(4) == at_round
    assert len([m for m in sizer.measured if m.size == 1]) == 2
    assert Sweep([4, 8], 3, stop).out_of_memory(4) == 0


@pytest.mark.parametrize("at_round", [0, 1, 2])
def test_a_size_at_which_a_later_update_runs_out_is_never_recommended(at_round: int) -> None:
    stop = threading.Event()
    sizer = Sweep([1, 2, 4, 8], 3, stop)
    while not stop.is_set():
        size = sizer.next()
        # The loop lets the step stand: nothing was put back.
        if size == 8 and len(sizer.clean) >= 4 * at_round:
            assert sizer.out_of_memory(size) == 4
        sizer.observe(Sampled(size, 8, size * 100, 1 + size / 50))
    assert sizer.ran_out_at == 8
    assert {m.size for m in sizer.measured} == {1, 2, 4}
    assert sizer.clean.count(False) == 1
    fitted = usl.fit([(m.size * 8, m.rate) for m in sizer.measured])
    chosen = recommended(_points(sizer.measured, [], 8), fitted, 8, 0.85)
    assert chosen["batch_size"] == chosen["high"] == 4


@pytest.mark.parametrize("updates", [1, 2])
def test_a_real_sweep_ends_where_memory_does(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    from retrain.backends.local import LocalBackend

    whole, calls = LocalBackend.gradient, []

    def gradient(self: Any, batch: Any) -> Any:
        if batch.num_rollouts > 2 * 4:
            calls.append(batch)
        if len(calls) == updates and batch.num_rollouts > 2 * 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return whole(self, batch)

    monkeypatch.setattr(LocalBackend, "gradient", gradient)
    changed = {"backpressure": {"max_batch_size": 8}, "backend": {"devices": "cpu"}}
    changed["training"] = {"group_size": 2, "updates_per_batch": updates}
    loaded = load({**_tiny(), **changed})
    record = sweep(loaded, Settings(steps=1, trace="flat:4", prompt_tokens=10), progress=lambda done, total: None)
    assert record["ran_out_at"] == 8
    assert [p["batch_size"] for p in record["points"]] == [1, 2, 4]
    assert record["recommended"]["batch_size"] <= record["recommended"]["high"] <= 4
    assert "ran out at batch_size = 8" in curve.report(record)


def test_where_not_even_the_smallest_size_fits_the_error_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from retrain.engines.schedule import Batch

    def add(self: Any, requests: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(Batch, "add", add)
    assert main(LINE) == OutOfMemory.exit_code
    err = capsys.readouterr().err
    assert "memory ran out in sampling (CUDA out of memory. Tried to allocate 7 GiB)" in err
    assert "inference.max_rows" in err


def _tiny() -> dict[str, Any]:
    import tomllib

    with open(path_of("tiny"), "rb") as file:
        return {k: v for k, v in tomllib.load(file).items() if k in ("model", "reward", "algorithm", "data")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "--out", "x.svg"], "--out draws the curve of --sweep"),
        (["bench", "--sweep", "--out", "x.png"], "is neither an SVG nor a page"),
        (["bench", "--sweep", "--out", "nowhere/x.svg"], "cannot be written"),
    ],
)
def test_wrong_lines_are_refused_before_anything_is_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
