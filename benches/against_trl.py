"""A whole training step beside TRL's: the same model, prompts, completion lengths, rewards, adapter and optimizer.

    python benches/against_trl.py --peer-python PYTHON --workload medium --dtype fp32 --threads 2 --pairs 5
    python benches/against_trl.py --peer-python PYTHON --workload medium-small --search   # TRL's own settings
    python benches/against_trl.py --page                                                  # docs/speed.md

Two processes are started once, each in its own environment (``make_peer_env.sh`` makes TRL's), and take turns step by
step: only one computes at a time, who begins alternates, and both get the same step. The ratio is that of the medians,
its interval a bootstrap over the pairs. Results are merged into one JSON file that the page is written from.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cases import CASES, ROOT, Case, Work, model_folder, work  # noqa: E402

RESULTS = HERE / "results" / "against_trl.json"
PAGE = ROOT / "docs" / "speed.md"

SEARCH: dict[str, dict[str, Any]] = {
    "generate, dynamic cache, whole batch": {},
    "generate, static cache": {"cache": "static"},
    "batch / 2, accumulated": {"split": 2},
    "batch / 4, accumulated": {"split": 4},
    "batch / 8, accumulated": {"split": 8},
    "eager attention": {"attention": "eager"},
    "continuous batching": {"continuous": True},
    "torch_compile": {"compile": True},
}
"""TRL's settings that may matter on a CPU. bf16 adds autocast over float32 weights."""

BF16_SEARCH: dict[str, dict[str, Any]] = {
    "bf16 weights": {},
    "bf16 weights, autocast": {"autocast": True},
    "float32 weights, bf16 autocast": {"autocast": True, "weights": "fp32"},
}

_ALIKE = {
    "lr": 1e-4,
}


@dataclass
class Side:
    """One worker process and what its steps took."""

    name: str
    process: subprocess.Popen[str]
    steps: list[dict[str, Any]]
    ready: dict[str, Any]

    def step(self, message: dict[str, Any]) -> dict[str, Any]:
        """Let it compute one step."""
        self.tell(message)
        return self.hear()

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.strip():
            raise RuntimeError(f"{self.name} ended ({self.process.wait()}); its output is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            try:
                self.tell({"stop": True})
                self.process.wait(30)
            except (OSError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()


def start(
    name: str, python: str, script: str, case: Case, settings: dict[str, Any], run: argparse.Namespace
) -> Side:
    """Start one worker and wait until it has loaded its model."""
    chosen = dict(settings)
    if "split" in chosen:
        chosen["rows"] = case.groups * case.members // int(chosen.pop("split"))
    job = {
        "case": case.name,
        "model": str(model_folder(case, Path(run.models))),
        "groups": case.groups,
        "members": case.members,
        "longest": case.longest,
        "rank": case.rank,
        "dtype": run.dtype,
        "threads": run.threads,
        "settings": chosen,
        **_ALIKE,
    }
    threads = str(run.threads)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    if script == "our_step.py":
        env["PYTHONPATH"] = str(ROOT / "src")
    else:
        env.pop("PYTHONPATH", None)
    sink = None if run.verbose else tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closes with the run
    process = subprocess.Popen(
        [python, str(HERE / script), json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=sink,
        text=True,
        env=env,
    )
    side = Side(name, process, [], {})
    try:
        side.ready = side.hear()
    except RuntimeError:
        if sink is not None:
            sink.seek(0)
            print(sink.read()[-3000:], file=sys.stderr)
        raise
    return side


class Others:
    """Cores that everything else on the machine used meanwhile: a timing of a busy machine says so."""

    def __init__(self) -> None:
        self._busy, self._wall = self._read(), time.perf_counter()
        self.own = 0.0

    @staticmethod
    def _read() -> float:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, soft = (float(f) for f in fields[:7])
        return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")

    def cores(self) -> float:
        """Mean over the time since the start; ``own`` is the CPU time of the measured processes."""
        return max(0.0, (self._read() - self._busy - self.own) / (time.perf_counter() - self._wall))


def compare(run: argparse.Namespace) -> dict[str, Any]:
    """Alternate ``warmup + pairs`` steps of both sides; the record of one workload."""
    case = CASES[run.workload]
    settings = json.loads(run.settings) if run.settings else best_settings(run)
    theirs = start("TRL", run.peer_python, "trl_step.py", case, settings, run)
    ours: Side | None = None
    try:
        ours = start("retrain", run.python, "our_step.py", case, json.loads(run.our_settings), run)
        others = Others()
        for number in range(run.warmup + run.pairs):
            message = {
                "work": step_work(case, number, run.warmup).to_json(),
                "reset_peak": number == run.warmup,
            }
            for side in (theirs, ours) if number % 2 == 0 else (ours, theirs):
                took = side.step(message)
                others.own += took["cpu_s"]
                side.steps.append(took)
                print(
                    f"{number:3} {side.name:8} {took['wall_s']:9.3f} s  {took['cpu_s']:9.3f} CPU s",
                    flush=True,
                )
        busy = others.cores()
    finally:
        theirs.close()
        if ours is not None:
            ours.close()
    record = {
        "case": case.name,
        "dtype": run.dtype,
        "threads": run.threads,
        "warmup": run.warmup,
        "pairs": run.pairs,
        "completion_tokens": work(case, run.warmup).tokens,
        "trl_settings": settings,
        "our_settings": json.loads(run.our_settings),
        "cores_used_by_others": round(busy, 3),
        "machine": machine(),
        "versions": {"trl": versions(run.peer_python), "retrain": versions(run.python)},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "sides": {side.name: summary(side, run.warmup) for side in (theirs, ours)},
    }
    record["ratios"] = ratios(record)
    return record


def step_work(case: Case, number: int, warmup: int) -> Work:
    """The work of one step; warm-up steps have short completions, which load and compile the same things."""
    made = work(case, number)
    if number >= warmup:
        return made
    return replace(made, lengths=[[min(n, 16) for n in row] for row in made.lengths])


def summary(side: Side, warmup: int) -> dict[str, Any]:
    """Medians and every value of one side, warm-up left out."""
    steps = side.steps[warmup:]
    names = sorted({name for s in steps for name in s["parts"]})

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 4)

    return {
        "wall_s": median([s["wall_s"] for s in steps]),
        "cpu_s": median([s["cpu_s"] for s in steps]),
        "parts_s": {n: median([s["parts"].get(n, 0.0) for s in steps]) for n in names},
        "peak_bytes": max(s["peak_bytes"] for s in steps),
        "peak_bytes_with_warmup": max(s["peak_bytes"] for s in side.steps),
        "bytes_when_loaded": side.ready["peak_bytes"],
        "all_wall_s": [round(s["wall_s"], 4) for s in steps],
        "all_cpu_s": [round(s["cpu_s"], 4) for s in steps],
    }


def ratios(record: dict[str, Any]) -> dict[str, Any]:
    """TRL over retrain: ratio of medians with a bootstrap interval (95 %) over pairs."""
    sides = record["sides"]
    found: dict[str, Any] = {}
    for what in ("wall", "cpu"):
        a, b = (np.array(sides[n][f"all_{what}_s"]) for n in ("TRL", "retrain"))
        found[what] = round(float(np.median(a) / np.median(b)), 3)
        drawn = np.random.Generator(np.random.Philox(0)).integers(0, len(a), (10_000, len(a)))
        spread = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
        found[f"{what}_interval"] = [round(float(q), 3) for q in np.quantile(spread, (0.025, 0.975))]
    found["peak"] = round(sides["retrain"]["peak_bytes"] / sides["TRL"]["peak_bytes"], 3)
    return found


def search(run: argparse.Namespace) -> dict[str, Any]:
    """Every setting of TRL that may matter, one process each, stored as it is measured."""
    case = CASES[run.workload]
    tried: dict[str, Any] = {}
    wanted = {**SEARCH, **({} if run.dtype == "fp32" else BF16_SEARCH)}
    for name, settings in wanted.items():
        if run.only and run.only not in name:
            continue
        side: Side | None = None
        try:
            side = start("TRL", run.peer_python, "trl_step.py", case, settings, run)
            for number in range(run.warmup + run.pairs):
                message = {"work": step_work(case, number, run.warmup).to_json(), "reset_peak": False}
                side.steps.append(side.step(message))
            steps = side.steps[run.warmup :]
            tried[name] = {
                "settings": settings,
                "wall_s": round(statistics.median(s["wall_s"] for s in steps), 3),
                "cpu_s": round(statistics.median(s["cpu_s"] for s in steps), 3),
                "sample_s": round(statistics.median(s["parts"].get("sample", 0.0) for s in steps), 3),
                "peak_bytes": max(s["peak_bytes"] for s in steps),
            }
        except RuntimeError as error:
            tried[name] = {"settings": settings, "failed": str(error)}
        finally:
            if side is not None:
                side.close()
        print(f"{name:40} {tried[name]}", flush=True)
        key = f"{case.name} {run.dtype} {run.threads}"
        before = read(run.out)["searches"].get(key, {}).get("tried", {})
        record = {
            "case": case.name,
            "dtype": run.dtype,
            "threads": run.threads,
            "machine": machine(),
            "versions": versions(run.peer_python),
            "date": time.strftime("%Y-%m-%d"),
            "tried": {**before, name: tried[name]},
        }
        store(run.out, "searches", key, record)
    return tried


def best_settings(run: argparse.Namespace) -> dict[str, Any]:
    """The fastest setting (CPU time, which neighbours disturb least) that a search found for this model and dtype."""
    family = CASES[run.workload].model
    stored = read(run.out)["searches"].values()
    tried = [
        t
        for s in stored
        if CASES[s["case"]].model == family and s["dtype"] == run.dtype
        for t in s["tried"].values()
        if "failed" not in t
    ]
    return min(tried, key=lambda t: t["cpu_s"])["settings"] if tried else {}


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next(
        (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), ""
    )
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "features": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "system": platform.system(),
    }


def versions(python: str) -> dict[str, str]:
    """Package versions of one side's environment."""
    code = (
        "import json,sys\nfrom importlib import metadata as m\nf={'python':sys.version.split()[0]}\n"
        "for p in ('torch','transformers','peft','trl','accelerate','numpy'):\n"
        "  try: f[p]=m.version(p)\n"
        "  except m.PackageNotFoundError: pass\n"
        "print(json.dumps(f))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def commit() -> str:
    """Commit of this checkout, with a mark when the package's sources differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+changes" if git("status", "--porcelain", "--", "src") else ""
    )


def read(path: str) -> dict[str, Any]:
    """The stored results, empty ones when there are none."""
    file = Path(path)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": {}, "searches": {}}


def store(path: str, kind: str, key: str, record: dict[str, Any]) -> None:
    """Put one record in place of the earlier one of its key."""
    found = read(path)
    found[kind][key] = record
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def written(results: str) -> str:
    """The page of the stored results, and of the equal-learning ones beside them."""
    from speed_page import page

    learned = Path(results).with_name("equal_learning.json")
    return page(read(results), json.loads(learned.read_text(encoding="utf-8")) if learned.exists() else None)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default="", help="Python of the environment that has trl")
    parser.add_argument(
        "--python", default=sys.executable, help="Python of the environment that has retrain's needs"
    )
    parser.add_argument("--workload", default="tiny", choices=sorted(CASES))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pairs", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument(
        "--settings", default="", help="TRL's settings as JSON; default: the best one of a stored search"
    )
    parser.add_argument("--our-settings", default="{}", help="sections of our configuration as JSON")
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "retrain-models"))
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--search", action="store_true", help="try TRL's settings, one after the other")
    parser.add_argument("--only", default="", help="only settings of the search whose name holds this")
    parser.add_argument("--page", action="store_true", help="write docs/speed.md from the stored results")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    run = parser.parse_args()
    if run.page:
        PAGE.write_text(written(run.out), encoding="utf-8")
        print(PAGE)
        return 0
    if not run.peer_python:
        parser.error("--peer-python is needed; benches/make_peer_env.sh makes an environment")
    key = f"{run.workload} {run.dtype} {run.threads}"
    if run.search:
        search(run)
        return 0
    record = compare(run)
    store(run.out, "runs", key, record)
    print(json.dumps({"ratios": record["ratios"], "others": record["cores_used_by_others"]}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
