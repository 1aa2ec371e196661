"""Seconds per token of sampler and learner against batch size, length and vocabulary, and memory over many steps.

    python benches/scaling.py [--quick] [--devices gpu:0] [--out benches/results/scaling]

Writes JSON and a plot. The model is random and small, so that what grows is seen and not waited for: about ten minutes
on two cores. Every point is measured once per round, the rounds go through all points in turn, and a point's time is its
shortest: what else runs on the machine only ever adds. Lengths are forced, nothing ends early.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

LAYOUT: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 768, "tie_word_embeddings": True, "max_position_embeddings": 16_384,
}  # fmt: skip
VOCABULARY = 32_768
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = (384, 2048, 8192, 32_768, 151_936)
QUICK = {"batch": (1, 4, 16), "length": (64, 256, 1024), "vocabulary": (384, 8192)}
DECODED = 32
"""Tokens sampled per row, or fewer where the whole sequence is shorter than twice that."""


@dataclass
class Point:
    """One combination: rows of ``length`` tokens, of which the last ``sampled`` are sampled and trained."""

    axis: str
    value: int
    rows: int
    length: int
    sampled: int
    vocabulary: int
    shared: bool
    """One prompt for all rows."""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Shortest seconds per token, and the median for comparison."""
        tokens = {
            "prefill": (self.length - self.sampled) * (1 if self.shared else self.rows),
            "decode": (self.sampled - 1) * self.rows,
            "sample": self.sampled * self.rows,
            "learn": self.length * self.rows,
        }
        return {
            "axis": self.axis, "value": self.value, "rows": self.rows, "length": self.length, "sampled": self.sampled,
            "vocabulary": self.vocabulary,
            "seconds_per_token": {k: min(v) / tokens[k] for k, v in self.seconds.items()},
            "median_seconds_per_token": {k: statistics.median(v) / tokens[k] for k, v in self.seconds.items()},
        }  # fmt: skip


def points(quick: bool) -> list[Point]:
    """All three axes; the model's own vocabulary wherever that is not the axis."""
    batches, lengths, vocabularies = QUICK.values() if quick else (BATCHES, LENGTHS, VOCABULARIES)
    return [
        *(Point("batch", b, b, 64 + DECODED, DECODED, VOCABULARY, shared=False) for b in batches),
        *(Point("length", n, 4, n, min(DECODED, n // 2), VOCABULARY, shared=True) for n in lengths),
        *(Point("vocabulary", v, 16, 64 + DECODED, DECODED, v, shared=False) for v in vocabularies),
    ]


def make_model(folder: Path, vocabulary: int) -> Path:
    """A random model of the layout, in float32; its dtype in a run is the configuration's."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = folder / f"vocabulary-{vocabulary}"
    if not path.exists():
        torch.manual_seed(0)
        config = Qwen3Config(
            **LAYOUT, vocab_size=vocabulary, eos_token_id=1, pad_token_id=0, bos_token_id=None
        )
        Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@contextlib.contextmanager
def parts(model: Path, devices: str, longest: int) -> Iterator[tuple[Any, Any]]:
    """Learner and sampler of a run on this model."""
    from retrain import plugins
    from retrain.config.schema import Config

    config = Config.model_validate(
        {
            "model": {"model": str(model), "lora_rank": 16},
            "backend": {"devices": devices},
            "training": {"max_tokens": longest, "seed": 1, "temperature": 1.0},
            "data": {"source": "arithmetic"},
            "reward": {"type": "match"},
        }
    )
    backend = plugins.load("backend", "local")(config, None)
    engine = plugins.load("engine", "pytorch")(config, None)
    try:
        yield backend, engine
    finally:
        engine.close()
        backend.close()


def sample(engine: Any, point: Point, draw: int) -> tuple[dict[str, float], list[Any]]:
    """Sample the point's rows; seconds of its phases, and the completions with their prompts."""
    from retrain.types import NoiseKey, Sampling

    rng = np.random.Generator(np.random.Philox(draw))
    count = 1 if point.shared else point.rows
    prompts = rng.integers(2, point.vocabulary, (count, point.length - point.sampled)).astype(np.int32)

    async def all_of_them() -> list[Any]:
        def ask(row: int) -> Any:
            noise = NoiseKey(seed=1, step=0, task=draw, member=row)
            how = Sampling(1.0, 1.0, point.sampled, (), (), False, noise)
            return engine.generate(prompts[row % count], 1, how)

        return [c for (c,) in await asyncio.gather(*(ask(row) for row in range(point.rows)))]

    before = dict(getattr(engine, "timings", None) or {})
    began = time.perf_counter()
    completions = asyncio.run(all_of_them())
    seconds = {"sample": time.perf_counter() - began}
    after = dict(getattr(engine, "timings", None) or {})
    if {"prefill", "decode"} <= set(after):
        spent = {k: after[k] - before.get(k, 0.0) for k in after}
        seconds["prefill"] = spent["prefill"]
        seconds["decode"] = spent["decode"] + spent.get("draw", 0.0)
    return seconds, [(prompts[i % count], c) for i, c in enumerate(completions)]


def learn(backend: Any, rolled: list[Any]) -> float:
    """Seconds of one update on these rows, half of them with positive advantage."""
    from retrain.types import OptimStep, TrainBatch, TrainRow

    rows = []
    for i, (prompt, c) in enumerate(rolled):
        n, k = len(prompt), len(c.token_ids_T)
        rows.append(
            TrainRow(
                np.concatenate([prompt, c.token_ids_T]),
                np.arange(n + k) >= n,
                np.concatenate([np.full(n, np.nan, np.float32), c.logprobs_T]),
                np.concatenate([np.zeros(n, np.float32), np.full(k, (-1.0) ** i, np.float32)]),
            )
        )
    tokens = sum(len(c.token_ids_T) for _, c in rolled)
    batch = TrainBatch(tuple(rows), tokens, len(rows), tokens, 1.0)
    began = time.perf_counter()
    backend.train_step(batch, OptimStep(1e-6, 0.0, 0.9, 0.95, 1e-8, 0.0))
    return time.perf_counter() - began


def measure(found: list[Point], devices: str, rounds: int, say: Callable[[str], None]) -> None:
    """Fill in every point's seconds, round by round."""
    longest = max(p.length for p in found)
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in sorted({p.vocabulary for p in found}):
            model = make_model(Path(folder), vocabulary)
            mine = [p for p in found if p.vocabulary == vocabulary]
            with parts(model, devices, longest) as (backend, engine):
                # Round 0 warms up: it allocates, and plans what later rounds reuse.
                for turn in range(rounds + 1):
                    for number, point in enumerate(mine):
                        engine.load(backend.publish())
                        seconds, rolled = sample(engine, point, draw=1000 * turn + number)
                        seconds["learn"] = learn(backend, rolled)
                        for name, value in seconds.items() if turn else ():
                            point.seconds.setdefault(name, []).append(value)
                    say(f"vocabulary {vocabulary}: round {turn} of {rounds}")


def resident(pid: int) -> int:
    """Resident bytes of a process now."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(steps: int, devices: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Resident memory after each step of a real run of the embedded model in its own process (this one's records would
    grow with it), and its slope by least squares over the second half (the first one fills caches), with a 95 % interval
    from the residuals."""
    settings = {
        "model.model": "retrain/tiny", "lora_rank": 16, "devices": devices, "batch_size": 4, "group_size": 8, "max_tokens": 48,
        "seed": 1, "temperature": 1.0, "data.source": "arithmetic", "max_steps": steps, "save_every": 20,
    }  # fmt: skip
    seen: list[int] = []
    with tempfile.TemporaryDirectory(prefix="retrain-memory-") as folder:
        config = Path(folder) / "empty.toml"
        config.write_text('[reward]\ntype = "match"\n', encoding="utf-8")
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "retrain", str(config), *flags, f"--log-dir={run}", "--plain"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            while child.poll() is None and len(seen) < steps:
                done = (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
                if done > len(seen):
                    # Steps that went by between two looks share one.
                    seen += [resident(child.pid)] * (done - len(seen))
                    if done % 50 == 0:
                        say(f"memory: {done} of {steps} steps")
                time.sleep(0.02)
            child.wait(timeout=120)
        finally:
            child.kill()
    if len(seen) < steps:
        raise SystemExit(f"the run of the memory measurement ended after {len(seen)} of {steps} steps.")
    late = np.array(seen[len(seen) // 2 :], dtype=np.float64)
    at = np.arange(len(late)) - (len(late) - 1) / 2
    slope = float(at @ late / (at @ at))
    rest = late - late.mean() - slope * at
    error = float(np.sqrt(rest @ rest / (len(late) - 2) / (at @ at)))
    return {
        "steps": steps,
        "resident_bytes": seen,
        "slope_bytes_per_step": slope,
        "interval_bytes_per_step": [slope - 1.96 * error, slope + 1.96 * error],
        "growth_over_second_half": float(late[-1] / late[0] - 1),
    }


def plot(record: dict[str, Any], path: Path) -> None:
    """Microseconds per token over each axis, and resident memory over steps."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "retrain"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    labels = {"batch": "rows", "length": "tokens of a sequence", "vocabulary": "vocabulary"}
    for axis, (name, label) in zip(axes, labels.items(), strict=False):
        rows = [p for p in record["points"] if p["axis"] == name]
        for phase in ("prefill", "decode", "sample", "learn"):
            known = [p for p in rows if phase in p["seconds_per_token"]]
            if known and not (phase == "sample" and "decode" in known[0]["seconds_per_token"]):
                axis.plot(
                    [p["value"] for p in known], [1e6 * p["seconds_per_token"][phase] for p in known], marker="o",
                    markersize=3, label=phase,
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="microseconds per token")
        axis.set_xticks(
            [p["value"] for p in rows], [f"{p['value']:,}" for p in rows], rotation=45, fontsize=7
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    if record["memory"]:
        axes[3].plot(np.array(record["memory"]["resident_bytes"]) / 1e6, linewidth=1)
        axes[3].set(
            xlabel="step",
            ylabel="resident MB",
            ylim=(0, 1.15 * max(record["memory"]["resident_bytes"]) / 1e6),
        )
        axes[3].grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling")
    parser.add_argument("--devices", default="cpu", help="backend.devices")
    parser.add_argument("--rounds", type=int, default=3, help="times that each point is measured")
    parser.add_argument("--steps", type=int, default=200, help="steps of the memory measurement; 0: none")
    parser.add_argument("--only-memory", action="store_true", help="measure the memory anew, keep the stored points")
    parser.add_argument("--quick", action="store_true", help="a few points, to see that it works")
    chosen = parser.parse_args()
    import torch

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = points(chosen.quick)
    began = time.time()
    held = memory(chosen.steps, chosen.devices, say) if chosen.steps else None
    if chosen.only_memory:
        record = json.loads(chosen.out.with_suffix(".json").read_text(encoding="utf-8")) | {"memory": held}
        _write(record, chosen.out)
        return
    measure(found, chosen.devices, chosen.rounds, say)
    record = {
        "layout": LAYOUT,
        "rounds": chosen.rounds,
        "device": torch.cuda.get_device_name() if chosen.devices != "cpu" and torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in ("torch", "transformers", "numpy")}},
        "seconds": time.time() - began,
        "points": [p.record() for p in found],
        "memory": held,
    }  # fmt: skip
    _write(record, chosen.out)
    say(f"wrote {chosen.out}.json and .svg in {record['seconds']:.0f} s")


def _write(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(record, out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
