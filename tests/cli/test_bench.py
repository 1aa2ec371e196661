"""``retrain bench`` on the embedded model: what it reports, that it leaves nothing behind, and its errors."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.utils.logging

from retrain import peaks
from retrain.bench.roof import roof_of
from retrain.bench.step import _against, _Step, slowest
from retrain.cli.bench import report
from retrain.cli.main import main
from retrain.config.load import load
from retrain.config.templates import path_of
from retrain.roofline import Peaks, Shape

torch.set_num_threads(1)
# Its handler keeps the stderr that it finds, which must not be one test's.
transformers.utils.logging.get_logger()

SMALL = ["--batch-size", "2", "--group-size", "3", "--devices", "cpu", "--lora-rank", "4"]
LINE = ["bench", *SMALL, "--steps", "2", "--trace", "flat:6", "--prompt-tokens", "10", "--json"]
SECONDS = {
    "step", "sync", "sample", "prefill", "decode", "draw", "score", "credit_and_pack", "learn", "forward", "head",
    "backward", "optimizer", "log", "other",
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a folder of temporary files beside it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        code = main(list(words))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert main(list(words)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err.rstrip("\n")

    return run


@pytest.fixture
def record(said: Callable[..., str]) -> dict[str, Any]:
    (line,) = said(*LINE).splitlines()
    return json.loads(line)


def test_the_record_of_a_real_step(record: dict[str, Any], place: Path) -> None:
    assert set(record) == {
        "model", "weights", "settings", "work", "seconds", "seconds_each", "cpu_seconds", "tokens_per_second",
        "non_model_share", "peaks", "roofline", "memory", "versions", "slowest",
    }  # fmt: skip
    # 2 groups of 3 with 10 tokens of prompt and 6 sampled; draw 0 of each pair of draws trains, draw 1 does not.
    assert record["work"] == {
        "groups": 2, "groups_trained": 1, "rollouts": 6, "prompt_tokens": 20, "sampled_tokens": 36,
        "trained_tokens": 48, "trained_sampled_tokens": 18,
    }  # fmt: skip
    assert record["settings"]["steps"] == 2 == len(record["seconds_each"])
    assert record["settings"]["lora_rank"] == 4
    assert not list((place / "work").iterdir())
    # Torch may make a folder of its own there.
    assert not [p for p in (place / "tmp").iterdir() if p.name.startswith("retrain")]


def test_the_parts_fill_the_step(record: dict[str, Any]) -> None:
    seconds = record["seconds"]
    assert set(seconds) == SECONDS
    top = ("sync", "sample", "score", "credit_and_pack", "learn", "log", "other")
    assert all(seconds[name] >= 0 for name in top)
    # Parts that overlap would add up to more.
    assert sum(seconds[name] for name in top) >= seconds["step"] * (1 - 1e-6)
    for whole, parts in (
        ("sample", ("prefill", "decode", "draw")),
        ("learn", ("forward", "head", "backward", "optimizer")),
    ):
        told = [seconds[name] for name in parts if seconds[name] is not None]
        assert sum(told) <= seconds[whole]
    assert 0 < record["non_model_share"] < 1
    assert 0 < record["cpu_seconds"] < 64 * seconds["step"]
    assert record["tokens_per_second"]["step"] == pytest.approx(36 / seconds["step"])


def test_shares_of_the_roof_are_those_of_the_counted_work(record: dict[str, Any]) -> None:
    shape = Shape(
        hidden=96, layers=3, heads=3, kv_heads=1, head_dim=32, intermediate=256, vocab=384, tied=True
    )
    rows = record["roofline"]
    assert set(rows) == {"prefill", "decode", "sample", "learn", "learn_whole_rows"}
    for name, row in rows.items():
        if row["share"] is None:
            assert name in ("prefill", "decode")
            continue
        # A cache or a busy machine can move a peak, never by this much.
        assert 0 < row["share"] < 1.5, name
        assert row["share"] == pytest.approx(row["floor_s"] / row["seconds"])
        assert row["bound"] in ("compute", "memory")
    pairs = 2 * 10 * 11 // 2
    assert (
        rows["prefill"]["flops"]
        == 2 * shape.block_weights * 20 + 2 * shape.head_weights * 2 + shape.pair_flops * pairs
    )
    # One group trains: its prompt once and three completions; or three whole rows.
    adapter = shape.adapter_weights(4)
    once = rows["learn"]["flops"]
    assert rows["learn_whole_rows"]["flops"] - once == 2 * (
        10 * (4 * shape.block_weights + 6 * adapter) + 3 * shape.pair_flops * pairs // 2
    )
    assert record["peaks"]["matmul_fp32"] > 1e8
    assert record["peaks"]["bandwidth"] > 1e8
    assert record["memory"]["resident_peak"] > 5e7


def test_several_updates_of_a_batch_are_counted(said: Callable[..., str], record: dict[str, Any]) -> None:
    made = json.loads(said(*LINE, "--updates-per-batch", "3"))
    assert made["tokens_per_second"]["learn"] == pytest.approx(3 * 48 / made["seconds"]["learn"])
    assert made["roofline"]["learn"]["flops"] == 3 * record["roofline"]["learn"]["flops"]
    assert made["roofline"]["learn"]["seconds"] == pytest.approx(made["seconds"]["learn"])


def test_the_roof_knows_the_format_of_the_cache_and_of_the_weights() -> None:
    config = load(Path(path_of("tiny"))).config
    shape = Shape(96, 3, 3, 1, 32, 256, 384, True)

    def roof(dtype: torch.dtype, device: str = "cpu", **changes: Any) -> Any:
        made = config.model_copy(
            update={
                "inference": config.inference.model_copy(update=changes.get("inference", {})),
                "model": config.model.model_copy(update=changes.get("model", {})),
            }
        )
        sizes = SimpleNamespace(
            hidden_size=96, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=32,
            intermediate_size=256, vocab_size=384, tie_word_embeddings=True,
        )  # fmt: skip
        policy = SimpleNamespace(
            model=SimpleNamespace(config=sizes), dtype=dtype, device=torch.device(device), trainable=1000
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peaks, "measure", lambda *_: (Peaks(1e12, 1e11), {}))
            return roof_of(made, policy)

    step = _Step(1.0, 1.0, 0.0, {"step_time_s": 1.0}, {}, {}, [10], [(10, 5), (10, 3)], [], 0)
    plain = _against([step], roof(torch.bfloat16), 1)
    unmerged = _against([step], roof(torch.bfloat16, "cuda"), 1)
    eight = _against([step], roof(torch.bfloat16, inference={"kv_cache_dtype": "fp8"}), 1)
    # Cache entries: the prompt's 10 once; then rows of 11 to 14 and of 11 and 12 tokens that steps 1 to 4 read.
    seen = 11 + 12 + 13 + 14 + 11 + 12
    assert (
        plain["decode"]["bytes"]
        == 4 * 2 * (shape.block_weights + shape.head_weights) + 2 * seen * shape.kv_numbers
    )
    saved = 2 - (1 + 4 / 32)
    assert plain["decode"]["bytes"] - eight["decode"]["bytes"] == pytest.approx(
        saved * seen * shape.kv_numbers
    )
    assert plain["prefill"]["bytes"] - eight["prefill"]["bytes"] == pytest.approx(
        saved * 10 * shape.kv_numbers
    )
    assert eight["decode"]["flops"] == plain["decode"]["flops"]
    # Two rows in two decode steps and one in two more; 10 prompt tokens.
    assert unmerged["decode"]["flops"] - plain["decode"]["flops"] == 2 * 1000 * 6
    assert unmerged["prefill"]["flops"] - plain["prefill"]["flops"] == 2 * 1000 * 10
    assert roof(torch.float32, "cuda").sampled_adapter == 0
    assert roof(torch.bfloat16, "cuda", model={"quantization": "nf4"}) is None


def test_the_text_shows_the_split_and_says_what_is_slowest(
    record: dict[str, Any], said: Callable[..., str]
) -> None:
    text = report(record)
    for name in ("weights over", "sample", "score", "credit, pack", "learn", "log", "memory", "non-model"):
        assert name in text
    assert text.splitlines()[-1] == record["slowest"] == slowest(record)
    assert "of the step" in record["slowest"]
    assert ("others use" in text) == (record["cpu_seconds"] < 0.9 * record["seconds"]["step"])
    assert "this process had 50% of one" in report({**record, "cpu_seconds": record["seconds"]["step"] / 2})
    without = [word for word in LINE if word != "--json"]
    assert said(*without).splitlines()[-1].startswith("Slowest: ")


def test_the_slowest_part_is_named_with_what_bounds_it() -> None:
    seconds: dict[str, Any] = dict.fromkeys(SECONDS, 0.1)
    made: dict[str, Any] = {
        "seconds": {**seconds, "step": 4.0, "sample": 2.5, "prefill": None, "decode": None, "draw": None},
        "roofline": {"sample": {"share": 0.25, "bound": "memory"}},
    }
    assert (
        slowest(made)
        == "Slowest: sampling, 62% of the step, at 25% of what this device allows by its memory bandwidth."
    )
    made["seconds"] |= {"prefill": 0.3, "decode": 1.5, "draw": 0.5}
    made["roofline"] = None
    assert slowest(made) == "Slowest: decoding and drawing, 50% of the step."
    made["seconds"]["draw"] = None
    assert slowest(made) == "Slowest: decoding, 38% of the step."
    made["seconds"]["log"] = 2.2
    assert slowest(made) == "Slowest: the records, 55% of the step."


def test_without_a_trace_lengths_follow_max_tokens(said: Callable[..., str]) -> None:
    made = json.loads(said("bench", *SMALL, "--steps", "1", "--max-tokens", "16", "--json"))
    assert made["settings"]["trace"].startswith("lognormal:median=700,p95=2048,cap=2048,scale=0.0078125")
    assert made["settings"]["max_tokens"] == 16
    assert made["settings"]["prompt_tokens"] == 128


def test_a_configuration_is_read_and_its_run_is_left_alone(said: Callable[..., str], place: Path) -> None:
    logs = place / "work" / "logs"
    (logs / "demo").mkdir(parents=True)
    (logs / "demo" / "metrics.jsonl").write_text("mine\n")
    (place / "work" / "retrain.toml").write_text(
        '[model]\nmodel = "retrain/tiny"\nlora_rank = 2\n[backend]\ndevices = "cpu"\n[training]\nbatch_size = 2\n'
        'group_size = 2\ntruncated = "mask"\nmin_signal = 1.0\nseed = -1\n[data]\nsource = "jsonl"\npath = "no such file"\n'
        '[reward]\ntype = "match"\n[logging]\nlog_dir = "logs/demo"\n'
    )
    made = json.loads(said("bench", "--steps", "1", "--trace", "flat:3", "--json"))
    assert made["settings"]["lora_rank"] == 2
    assert made["work"]["groups_trained"] == 1
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == [
        "work/logs/demo/metrics.jsonl", "work/retrain.toml",
    ]  # fmt: skip


def test_an_engine_of_ones_own_is_held_to_its_protocol(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (place / "work" / "plugins").mkdir()
    (place / "work" / "plugins" / "bench_engine.py").write_text(
        "class Short:\n    def load(self, weights): ...\n    def close(self): ...\n"
        "    async def generate(self, prompt_ids, n, sampling):\n        return []\n\n"
        "def build(config, renderer):\n    return Short()\n"
    )
    assert main([*LINE, "--inference.engine", "bench_engine.build"]) == 1
    said = capsys.readouterr().err
    assert "engine 'bench_engine.build' returned 0 values, not 1 of type Completion." in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--steps", "0"], "--steps 0 is not a whole number of at least 1"),
        (["--steps", "two"], "--steps two is not"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0"),
        (["--trace", "normal"], "trace 'normal' is unknown"),
        (["--trace", "flat:0"], "at least 1 token"),
        (["--trace", "nowhere:lengths"], "needs the module 'nowhere'"),
        (["--trace", "flat:500", "--prompt-tokens", "30"], "exceed the model's context of 512"),
        (
            ["--trace", "flat:500", "--prompt-tokens", "30"],
            "--prompt-tokens to at most 12, or give a --trace of at most 482",
        ),
        (["--trace", "flat:600"], "Fix: give a --trace of at most 511 tokens"),
        (["--max-tokens", "600"], "Fix: set --max-tokens to at most 511"),
        (["--max-tokens", "600", "--prompt-tokens", "12"], "Fix: set --max-tokens to at most 500"),
        (["--trace", "flat:5", "--prompt-tokens", "600"], "Fix: lower --prompt-tokens to at most 507"),
        (["--trace", "file:"], "no file is named"),
        (["--trace", "lognormal:p95=1e308"], "p95 = 1e+308 is more than"),
        (["--overwrite"], "--overwrite is not an option of bench"),
        (["--plain"], "--plain is not an option of bench"),
        (["--no-such-flag", "1"], "--no-such-flag is not a flag"),
        (["--json=yes"], "--json takes no value"),
        (["missing"], "there is no file 'missing'"),
        (["missing.toml"], "there is no such file"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
    ],
)
def test_an_error_is_one_line_with_a_fix(refused: Callable[..., str], words: list[str], part: str) -> None:
    said = refused("bench", *words)
    assert part in said
    assert "\n" not in said
    assert "Fix: " in said


def test_the_help_is_its_own(said: Callable[..., str]) -> None:
    assert said("bench", "--help").startswith("Usage: retrain bench [CONFIG]")
