"""Does retrain learn as TRL does, and for how much CPU time? The embedded model, two-digit sums, many seeds of both.

    python benches/equal_learning.py --peer-python PYTHON --side both --evaluate

The sides alternate seed by seed, so that both see the same state of the machine; finished seeds are kept in ``--work``.

Same tasks in the same order per seed, reward, advantage (reward minus the group's mean), loss, optimizer, warm-up and
clipping, no KL term, one thread. Adapters of both are evaluated by one function on the same 256 held-out tasks with the
same noise. CPU seconds are those of the training steps; start-up is reported beside them. Final accuracies are compared by
two one-sided Welch tests (TOST) against 3 points; the ratio of the CPU seconds to an accuracy by a bootstrap over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from against_trl import commit, machine, versions  # noqa: E402
from cases import ROOT, TINY  # noqa: E402

RESULTS = HERE / "results" / "equal_learning.json"
MARGIN = 0.03
GOAL = 0.8
SHAPE = {"groups": 8, "members": 16, "max_tokens": 80, "lr": 1e-3, "warmup": 5, "rank": 16}


def worker(python: str, script: str, job: dict[str, Any]) -> None:
    """Run one job on one thread; its own output is shown only when it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(ROOT / "src") if script == "learn_our.py" else ""
    done = subprocess.run(
        [python, str(HERE / script), json.dumps(job)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-3000:], file=sys.stderr)
        raise SystemExit(f"{script} failed with {done.returncode}")


def train_side(run: argparse.Namespace, side: str, seed: int) -> None:
    """One seed of one side, unless it is there."""
    out = Path(run.work) / side / f"seed-{seed}"
    if (out / "times.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    job = {**SHAPE, "seed": seed, "steps": run.steps, "every": run.every, "out": str(out)}
    job |= {"model": str(TINY), "boxed": str(ROOT / "src" / "retrain" / "boxed.py")}
    began = time.perf_counter()
    if side == "trl":
        tasks = Path(run.work) / f"tasks-{seed}.json"
        worker(run.python, "learn_our.py", {**job, "do": "tasks", "tasks": str(tasks)})
        worker(run.peer_python, "learn_trl.py", {**job, "tasks": str(tasks)})
    else:
        worker(run.python, "learn_our.py", {**job, "do": "train"})
    times = json.loads((out / "times.json").read_text(encoding="utf-8"))
    print(
        f"{side} seed {seed}: {sum(times['cpu_s']):.1f} CPU s, {time.perf_counter() - began:.0f} s",
        flush=True,
    )


def evaluate(run: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of every saved adapter of both sides, in one process; the whole record."""
    folders: list[Path] = []
    seeds: dict[str, list[int]] = {}
    for side in ("trl", "retrain"):
        seeds[side] = []
        for seed in range(1, run.seeds + 1):
            out = Path(run.work) / side / f"seed-{seed}"
            if (out / "times.json").exists():
                seeds[side].append(seed)
                folders += [out / f"step-{s}" for s in range(run.every, run.steps + 1, run.every)]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        job = {**SHAPE, "do": "evaluate", "steps": run.steps, "out": str(Path(folder) / "run")}
        job |= {"adapters": [str(f) for f in folders], "found": str(found), "samples": run.samples}
        worker(run.python, "learn_our.py", job)
        accuracy = json.loads(found.read_text(encoding="utf-8"))
    grid = list(range(0, run.steps + 1, run.every))
    sides: dict[str, Any] = {}
    for side, of in seeds.items():
        rows: list[dict[str, Any]] = []
        for seed in of:
            out = Path(run.work) / side / f"seed-{seed}"
            times = json.loads((out / "times.json").read_text(encoding="utf-8"))
            spent = np.concatenate([[0.0], np.cumsum(times["cpu_s"])])
            curve = [accuracy["" if s == 0 else str(out / f"step-{s}")] for s in grid]
            rows.append(
                {
                    "seed": seed,
                    "accuracy": curve,
                    "cpu_s": [round(float(spent[s]), 3) for s in grid],
                    "startup_cpu_s": times["startup_cpu_s"],
                }
            )
        sides[side] = rows
    return {
        "steps": grid,
        "shape": SHAPE,
        "evaluation": {"tasks": 256, "samples": run.samples},
        "machine": machine(),
        "versions": {
            "retrain": versions(run.python),
            **({"trl": versions(run.peer_python)} if run.peer_python else {}),
        },
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "sides": sides,
        "summary": summary(sides, run.goal),
    }


def crossing(cpu_s: Sequence[float], accuracy: Sequence[float], goal: float) -> float | None:
    """CPU seconds at which the piecewise linear curve first reaches ``goal``; None where it never does."""
    for i in range(1, len(accuracy)):
        if accuracy[i] >= goal:
            share = (
                (goal - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1]) if accuracy[i - 1] < goal else 0.0
            )
            return cpu_s[i - 1] + share * (cpu_s[i] - cpu_s[i - 1])
    return None


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Difference of the means of ``a`` and ``b``, its standard error and Welch's degrees of freedom."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return statistics.fmean(a) - statistics.fmean(b), math.sqrt(va + vb), freedom


def summary(sides: dict[str, Any], goal: float) -> dict[str, Any]:
    """TOST of the final accuracies (ours minus TRL's) and the ratio of CPU seconds to ``goal``."""
    from scipy import stats

    if min(len(rows) for rows in sides.values()) < 2:
        return {}
    final = {side: [row["accuracy"][-1] for row in rows] for side, rows in sides.items()}
    gap, error, freedom = welch(final["retrain"], final["trl"])
    t: Any = stats.t(freedom)
    half = float(t.ppf(0.95)) * error
    reach = {
        side: [crossing(row["cpu_s"], row["accuracy"], goal) for row in rows] for side, rows in sides.items()
    }
    with_startup = {
        side: [
            None if got is None else got + row["startup_cpu_s"]
            for got, row in zip(reach[side], rows, strict=True)
        ]
        for side, rows in sides.items()
    }
    return {
        "final": {side: {"mean": statistics.fmean(v), "sd": statistics.stdev(v), "n": len(v)} for side, v in final.items()},
        "difference": gap,
        "interval_90": [gap - half, gap + half],
        "p_not_worse": float(t.sf((gap + MARGIN) / error)),
        "p_not_better": float(t.cdf((gap - MARGIN) / error)),
        "equivalent": abs(gap) + half < MARGIN,
        "margin": MARGIN,
        "goal": goal,
        "cpu_s_to_goal": spent(reach),
        "cpu_s_to_goal_with_startup": spent(with_startup),
        "cpu_s_of_all_steps": spent({side: [row["cpu_s"][-1] for row in rows] for side, rows in sides.items()}),
    }  # fmt: skip


def spent(by_side: dict[str, list[float | None]]) -> dict[str, Any]:
    """Means of the runs that got there, how many did, and the ratio TRL / ours with a bootstrap interval (95 %)."""
    known = {side: np.array([v for v in values if v is not None]) for side, values in by_side.items()}
    found: dict[str, Any] = {
        side: {
            "reached": len(known[side]),
            "of": len(values),
            "mean": round(float(known[side].mean()), 3) if len(known[side]) else None,
        }
        for side, values in by_side.items()
    }
    if min(map(len, known.values())) >= 2:
        rng = np.random.Generator(np.random.Philox(0))
        drawn = {s: v[rng.integers(0, len(v), (10_000, len(v)))].mean(axis=1) for s, v in known.items()}
        found["ratio"] = round(float(known["trl"].mean() / known["retrain"].mean()), 3)
        found["ratio_interval"] = [
            round(float(q), 3) for q in np.quantile(drawn["trl"] / drawn["retrain"], (0.025, 0.975))
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default="", help="Python of the environment that has trl")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--side", default="", choices=("", "trl", "retrain", "both"))
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between two evaluated adapters")
    parser.add_argument("--samples", type=int, default=2, help="samples per held-out task")
    parser.add_argument("--goal", type=float, default=GOAL)
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "retrain-equal-learning"))
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--evaluate", action="store_true")
    run = parser.parse_args()
    if run.side in ("trl", "both") and not run.peer_python:
        parser.error("--peer-python is needed; benches/make_peer_env.sh makes an environment")
    if run.side:
        sides = ("trl", "retrain") if run.side == "both" else (run.side,)
        for seed in range(1, run.seeds + 1):
            for side in sides if seed % 2 else sides[::-1]:
                train_side(run, side, seed)
    if run.evaluate:
        record = evaluate(run)
        Path(run.out).parent.mkdir(parents=True, exist_ok=True)
        Path(run.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(record["summary"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
