"""What ``retrain explain`` estimates, beside what runs really need: peak memory and the time of a step.

    python benches/estimate.py --models /tmp/models --out benches/results/estimate.json --page docs/explain.md

Each case is a real run in a process of its own: sampler, learner, credit, log and checkpoint. The reward is a coin, so
that every group trains whatever the model answers. Memory on a CPU is the process's largest resident size (VmHWM), on
CUDA the most that torch's allocator has held. A step's time is the median of all steps but the first; on a CPU it is the
process's own time, so set OMP_NUM_THREADS=1 and other programs do not count. The estimate is given the lengths that the
run had, and all else as it stands in the configuration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import TINY, make_medium
from worker import peak_bytes

CASES: dict[str, dict[str, Any]] = {
    "tiny, 8 x 16 x 80": {"model": "tiny", "batch_size": 8, "group_size": 16, "max_tokens": 80},
    "tiny, 32 x 16 x 80": {"model": "tiny", "batch_size": 32, "group_size": 16, "max_tokens": 80},
    "tiny, 8 x 16 x 80, rank 64": {
        "model": "tiny", "batch_size": 8, "group_size": 16, "max_tokens": 80, "lora_rank": 64,
    },
    "medium, 2 x 8 x 32": {"model": "medium", "batch_size": 2, "group_size": 8, "max_tokens": 32},
    "medium, 4 x 8 x 64": {"model": "medium", "batch_size": 4, "group_size": 8, "max_tokens": 64},
}  # fmt: skip
STEPS = 3
_COIN = '''"""A coin that every rollout has of its own."""
import hashlib


def score(response, reference):
    return float(hashlib.sha256(f"{response}".encode()).digest()[0] & 1)
'''
_TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def settings(case: dict[str, Any], model: Path, folder: Path, device: str) -> dict[str, Any]:
    """The configuration of a case."""
    return {
        "backend": {"devices": device},
        "model": {"model": str(model), "lora_rank": case.get("lora_rank", 16)},
        "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
        "training": {
            "seed": 1, "max_steps": STEPS, "temperature": 1.0, "lr": 1e-5,
            **{k: case[k] for k in ("batch_size", "group_size", "max_tokens")},
        },
        "data": {"source": "arithmetic"},
        "reward": {"type": "custom", "custom_module": "estimate_coin", "isolate": False},
        "plugins": {"search_paths": [str(folder)]},
        "logging": {"log_dir": str(folder / "run"), "generations": 0},
    }  # fmt: skip


def child(text: str) -> None:
    """Run one configuration and print what it took."""
    from retrain.config.load import load
    from retrain.runner import execute
    from retrain.tracking.run_log import RunLog

    ends, inner = [], RunLog.step

    def step(self: Any, *values: Any) -> None:
        inner(self, *values)
        ends.append(time.process_time())

    RunLog.step = step  # type: ignore[method-assign]
    result = execute(load(json.loads(text)), plain=True)
    import torch

    cuda = torch.cuda.is_available() and json.loads(text)["backend"]["devices"] != "cpu"
    print("RESULT " + json.dumps({
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else peak_bytes(), "run_dir": result.run_dir,
        "cpu_s": [b - a for a, b in itertools.pairwise(ends)],
    }))  # fmt: skip


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """Peak memory, seconds of a step and mean lengths of a run in a child."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(spec)], capture_output=True, text=True, check=False
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(done.stderr or done.stdout)
    found = json.loads(line.removeprefix("RESULT "))
    rows = [json.loads(x) for x in (Path(found["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "step_time_s" in r][1:]
    return {
        "peak_bytes": found["peak_bytes"],
        "wall_s": statistics.median(r["step_time_s"] for r in steps),
        # Other programs take the processor away; what the step itself took is what it would take alone.
        "step_s": statistics.median(
            found["cpu_s"] if spec["backend"]["devices"] == "cpu" else [r["step_time_s"] for r in steps]
        ),
        "mean_length": statistics.mean(r["mean_length"] for r in steps),
    }


def estimated(spec: dict[str, Any], length: float) -> dict[str, Any]:
    """The estimate for the same configuration."""
    from retrain import cards, estimate
    from retrain.config.load import load

    config = load(spec).config
    made = estimate.estimate(
        config, estimate.model_of(config), cards.present(config.backend.devices),
        lengths=estimate.Interval(length, length), trained=estimate.Interval(0.75, 1.0),
    )  # fmt: skip
    memory, cuda = made.memory, made.device.kind == "cuda"
    # torch's allocator knows nothing of the context and the libraries.
    outside = memory.kept["runtime"] if cuda else 0
    step, seconds = made.step_seconds, made.seconds or {}
    return {
        "peak_bytes": memory.peak - outside, "low_bytes": memory.low - outside, "high_bytes": memory.high - outside,
        "device": made.device.name, "kind": made.device.kind,
        "step_s": step and [step.low, step.high],
        "sample_s": seconds and [seconds["sample"].low, seconds["sample"].high],
        "learn_s": seconds and [seconds["learn"].low, seconds["learn"].high],
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| run | device | measured peak | estimate | error | measured step | estimate | holds |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in record["cases"]:
        real, made = row["measured"], row["estimated"]
        low, high = made["step_s"] or (float("nan"), float("nan"))
        lines.append(
            f"| {row['case']} | {made['device']} | {real['peak_bytes'] / 2**20:,.0f} MiB | "
            f"{made['peak_bytes'] / 2**20:,.0f} MiB | {row['memory_error']:+.1%} | {real['step_s']:.2f} s | "
            f"{low:.2f} to {high:.2f} s | {'yes' if row['time_holds'] else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, write the record, and put the table into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child")
    parser.add_argument("--models", type=Path, default=Path("bench-models"))
    parser.add_argument("--device", default="cpu", help="cpu or gpu:0")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    rows: list[dict[str, Any]] = []
    for name in given.cases:
        case = CASES[name]
        model = TINY if case["model"] == "tiny" else with_template(make_medium(given.models / "medium"))
        with tempfile.TemporaryDirectory(prefix="retrain-estimate-") as folder:
            (Path(folder) / "estimate_coin.py").write_text(_COIN)
            spec = settings(case, model, Path(folder), given.device)
            real = measured(spec)
            made = estimated(spec, real["mean_length"])
        low, high = made["step_s"] or (0.0, 0.0)
        rows.append({
            "case": name, "measured": real, "estimated": made,
            "memory_error": made["peak_bytes"] / real["peak_bytes"] - 1,
            "time_holds": low <= real["step_s"] <= high,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "processor": platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "cases": rows,
    }
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    if given.page:
        text = given.page.read_text(encoding="utf-8")
        made_table = f"<!-- estimate -->\n{table(record)}\n<!-- /estimate -->"
        given.page.write_text(
            re.sub(r"<!-- estimate -->.*<!-- /estimate -->", lambda _: made_table, text, flags=re.S),
            encoding="utf-8",
        )
    print(table(record))


def with_template(folder: Path) -> Path:
    """The medium model's tokenizer has no chat template of its own; a run needs one."""
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    if "chat_template" not in facts:
        path.write_text(json.dumps(facts | {"chat_template": _TEMPLATE}))
    return folder


if __name__ == "__main__":
    main()
