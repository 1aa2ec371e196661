"""The in-process sampler, timed on forced lengths: against another version of this package, interleaved, and against
the least time that memory and arithmetic allow.

    git worktree add ../before <revision>
    python benches/engine.py --against ../before/src --cases tiny medium --rounds 5 --out engine.json

Each version runs in a process of its own that stays; only one works at a time, turn by turn (A B A B). A time is CPU
seconds of that process on one thread, so that other programs do not count; ratios are of medians. The floor of a decode
step is (weights + KV read) / (bytes a second of a sum over memory) or operations / (operations a second of a large
float32 product), whichever is longer, both measured in the same process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cases import CASES, Case, make_medium, work

ROOT = Path(__file__).resolve().parents[1]


def settings(case: Case, model: str) -> dict[str, Any]:
    """The configuration that both versions get."""
    return {
        "backend": {"devices": "cpu"},
        "model": {"model": model, "lora_rank": case.rank},
        "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
        "training": {
            "seed": 1, "max_steps": 1, "batch_size": case.groups, "group_size": case.members,
            "max_tokens": case.longest, "temperature": 1.0, "lr": 1e-3,
        },
        "data": {"source": "arithmetic"},
        "reward": {"type": "match"},
    }  # fmt: skip


class Subject:
    """One version's engine, loaded with one model."""

    def __init__(self, case: Case, model: str, entropy: bool) -> None:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        from retrain.backends import local
        from retrain.config.schema import Config
        from retrain.engines import torch_engine
        from retrain.renderer import load_renderer

        config = Config.model_validate(settings(case, model))
        renderer = load_renderer(config.model.model)
        self._case, self._entropy = case, entropy
        self._backend = local.build(config, renderer)
        self.engine: Any = torch_engine.build(config, renderer)
        self.engine.load(self._backend.publish())

    def sample(self, step: int) -> dict[str, Any]:
        """One batch; its seconds and tokens."""
        from retrain.types import NoiseKey, Sampling

        load = work(self._case, step)

        async def go() -> int:
            waiting = []
            for g, (prompt, lengths) in enumerate(zip(load.prompts, load.lengths, strict=True)):
                ids = np.asarray(prompt, np.int32)
                parts = (
                    [(0, len(lengths), lengths[0])]
                    if len(set(lengths)) == 1
                    else [(m, 1, n) for m, n in enumerate(lengths)]
                )
                for member, n, tokens in parts:
                    key = NoiseKey(1, step, g, member=member)
                    sampling = Sampling(1.0, 1.0, tokens, (), (), self._entropy, key)
                    waiting.append(self.engine.generate(ids, n, sampling))
            return sum(len(c.token_ids_T) for group in await asyncio.gather(*waiting) for c in group)

        before = dict(getattr(self.engine, "timings", {}))
        cpu, wall = time.process_time(), time.perf_counter()
        tokens = asyncio.run(go())
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        split = {k: v - before[k] for k, v in getattr(self.engine, "timings", {}).items()}
        assert tokens == load.tokens
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        kv = getattr(self.engine, "kv_peak", None)
        return {
            "cpu_s": cpu,
            "wall_s": wall,
            "tokens": tokens,
            "split": split,
            "peak_bytes": peak,
            "kv_bytes": kv,
        }

    def floor(self) -> dict[str, float]:
        """Seconds of CPU that the mean decode step of the flat case must take on this machine."""
        import torch

        def best(call: Any) -> float:
            times = []
            for _ in range(5):
                started = time.process_time()
                call()
                times.append(time.process_time() - started)
            return min(times)

        x = torch.ones(64 * 2**20)
        bandwidth = x.numel() * 4 / best(x.sum)
        a, b = torch.randn(512, 2048), torch.randn(2048, 2048)
        flops = 2 * 512 * 2048 * 2048 / best(lambda: a @ b)
        model = self._backend.policy.model
        config = model.config
        embedding = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is embedding
        products = sum(p.numel() for p in model.parameters() if p.ndim == 2) - (
            0 if tied else embedding.numel()
        )
        products -= sum(
            p.numel() for p in self._backend.policy.adapter.values() if p.ndim == 2 and _inside(model, p)
        )
        rows = self._case.groups * self._case.members
        length = sum(self._case.prompt) / 2 + self._case.length / 2
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
        return {
            "bandwidth": bandwidth,
            "flops": flops,
            "memory_s": 4 * (products + rows * length * kv) / bandwidth,
            "arithmetic_s": rows * (2 * products + attention) / flops,
        }


def _inside(model: Any, p: Any) -> bool:
    return any(p is q for q in model.parameters())


def worker(case: Case, model: str, entropy: bool) -> None:
    """Answer lines of stdin: a step's number, or ``floor``."""
    subject = Subject(case, model, entropy)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        answer = subject.floor() if line.strip() == "floor" else subject.sample(int(line))
        print(json.dumps(answer), file=out, flush=True)


class Version:
    """A worker of one source folder."""

    def __init__(self, source: str, case: str, model: str, entropy: bool) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((source, str(ROOT / "benches"))),
            "HF_HUB_OFFLINE": "1",
        }
        env.setdefault("OMP_NUM_THREADS", "1")
        command = [
            sys.executable,
            __file__,
            "--worker",
            case,
            "--model",
            model,
            *(["--entropy"] if entropy else []),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        self._read()

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker died; run it by hand with --worker to see why")
        return line

    def ask(self, what: object) -> dict[str, Any]:
        """Its answer."""
        assert self._process.stdin
        print(what, file=self._process.stdin, flush=True)
        return json.loads(self._read())

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def compare(case: Case, model: str, sources: dict[str, str], rounds: int, entropy: bool) -> dict[str, Any]:
    """Interleaved runs of one case."""
    versions = {name: Version(source, case.name, model, entropy) for name, source in sources.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
    for step in range(rounds + 1):
        for name, version in versions.items():
            got = version.ask(step)
            if step:  # the first warms up
                runs[name].append(got)
    report: dict[str, Any] = {"floor": versions["now"].ask("floor")}
    for version in versions.values():
        version.close()
    for name, got in runs.items():
        report[name] = {
            "cpu_s": statistics.median(r["cpu_s"] for r in got),
            "cpu_min_s": min(r["cpu_s"] for r in got),
            "wall_s": statistics.median(r["wall_s"] for r in got),
            "tokens_per_cpu_s": statistics.median(r["tokens"] / r["cpu_s"] for r in got),
            "peak_bytes": got[-1]["peak_bytes"],
            "kv_bytes": got[-1]["kv_bytes"],
            "split": {k: statistics.median(r["split"][k] for r in got) for k in got[0]["split"]},
        }
    if "before" in report:
        ratios = sorted(b["cpu_s"] / a["cpu_s"] for a, b in zip(runs["now"], runs["before"], strict=True))
        report["ratio"] = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    split = report["now"]["split"]
    # The engine's own clock is the wall's; the split is taken from it and the amount from the process's CPU seconds.
    spent = split["decode"] + split["draw"]
    step_s = report["now"]["cpu_s"] * spent / (spent + split["prefill"]) / max(split["decode_steps"], 1)
    least = max(report["floor"]["memory_s"], report["floor"]["arithmetic_s"])
    report["decode_step_s"] = step_s
    report["share_of_floor"] = least / step_s
    report["share_of_memory_floor"] = report["floor"]["memory_s"] / step_s
    return report


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", help="src folder of the version to compare with")
    parser.add_argument(
        "--source", default=str(ROOT / "src"), help="src folder of the version that is measured"
    )
    parser.add_argument(
        "--cases", nargs="+", default=["tiny", "tiny-lognormal", "medium"], choices=sorted(CASES)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--entropy", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(CASES[given.worker], given.model, given.entropy)
        return
    sources = {"now": given.source, **({"before": given.against} if given.against else {})}
    results: dict[str, Any] = {}
    for name in given.cases:
        case = CASES[name]
        folder = Path(tempfile.gettempdir()) / "retrain-bench-medium"
        model = "retrain/tiny" if case.model == "tiny" else str(make_medium(folder))
        results[name] = compare(case, model, sources, given.rounds, given.entropy)
        print(name, json.dumps(results[name], indent=1), flush=True)
    import torch

    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor(),
    }
    if given.out:
        given.out.write_text(json.dumps({"machine": facts, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
