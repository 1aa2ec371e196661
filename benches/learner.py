"""The learner's step alone, interleaved with a plain PyTorch one and with an older version of ours: ratios, share of the
matrix-product peak, peak memory.

    python benches/learner.py --case medium --rounds 5 [--old FOLDER_OF_AN_OLDER_CHECKOUT] [--dtype bf16] [--json FILE]

Each side is a process of its own, one runs at a time, and each round runs every side on the same rows (half of the
groups carry no signal). ``plain`` is what one writes with transformers and PEFT: all rows in one padded batch, the whole
logits tensor, autograd, AdamW; it leaves the silent groups out too. A side's CPU seconds are summed over its threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from cases import CASES, MEDIUM_LAYOUT, TINY, Case, make_medium, work
from worker import Pipe

ROOT = Path(__file__).resolve().parents[1]


def rows_of(case: Case, step: int) -> list[dict[str, np.ndarray]]:
    """Rows of the groups that train: ids (T,), where they are sampled, old logprobs and advantages."""
    made = work(case, step)
    rng = np.random.default_rng(step)
    rows: list[dict[str, np.ndarray]] = []
    for prompt, lengths, rewards in zip(made.prompts, made.lengths, made.rewards, strict=True):
        if min(rewards) == max(rewards):
            continue
        mean, deviation = float(np.mean(rewards)), float(np.std(rewards)) + 1e-4
        for length, reward in zip(lengths, rewards, strict=True):
            ids = np.concatenate([prompt, rng.integers(5, min(case.vocabulary, 260), length)]).astype(
                np.int32
            )
            sampled = np.arange(len(ids)) >= len(prompt)
            old = np.where(sampled, -5.0, np.nan).astype(np.float32)
            advantage = np.where(sampled, (reward - mean) / deviation, 0.0).astype(np.float32)
            rows.append({"ids": ids, "sampled": sampled, "old": old, "advantages": advantage})
    return rows


def operations(case: Case, rows: list[dict[str, np.ndarray]], layout: dict[str, Any]) -> dict[str, float]:
    """Operations that the step needs at least, prompts once per group: frozen 4 and adapter 6 per parameter and token, head
    4 per sampled position (logits and slopes), attention 2 + 5 products over the causal half."""
    hidden, heads = layout["hidden_size"], layout["num_attention_heads"] * layout["head_dim"]
    keys, wide = layout["num_key_value_heads"] * layout["head_dim"], layout["intermediate_size"]
    shapes = [(hidden, heads), (hidden, keys), (hidden, keys), (heads, hidden)]
    shapes += [(hidden, wide), (hidden, wide), (wide, hidden)]
    dense = sum(a * b for a, b in shapes)
    adapter = sum(case.rank * (a + b) for a, b in shapes)
    prompts = {
        row["ids"][: int(row["sampled"].argmax())].tobytes(): int(row["sampled"].argmax()) for row in rows
    }
    sampled = sum(int(row["sampled"].sum()) for row in rows)
    tokens = sum(prompts.values()) + sampled - len(rows)
    pairs = sum(n * n / 2 for n in prompts.values())
    for row in rows:
        total, prompt = len(row["ids"]), int(row["sampled"].argmax())
        pairs += (total**2 - prompt**2) / 2
    layers = layout["num_hidden_layers"]
    return {
        "tokens": tokens,
        "positions": sampled,
        "head": 4.0 * sampled * hidden * layout["vocab_size"],
        "layers": layers * (tokens * (4.0 * dense + 6.0 * adapter) + 7.0 * 2.0 * pairs * heads),
    }


def ours(job: dict[str, Any], case: Case, pipe: Pipe) -> None:
    """Our backend, of whichever version is on the path."""
    from retrain.backends import local
    from retrain.config.schema import Config
    from retrain.types import OptimStep, TrainBatch, TrainRow

    backend = local.build(
        Config.model_validate(
            {
                "backend": {"devices": job["device"]},
                "model": {"model": job["model"], "lora_rank": case.rank},
                "lora": {"alpha": 2 * case.rank},
                "inference": {"dtype": job["dtype"]},
                "training": {"seed": 1, "max_tokens": case.longest, "group_size": case.members},
                "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
                "data": {"source": "arithmetic"},
                "reward": {"type": "match"},
            }
        ),
        None,  # type: ignore[arg-type]
    )
    optim = OptimStep(1e-5, 0.0, 0.9, 0.999, 1e-8, 1.0)
    timings: dict[str, float] = getattr(backend, "timings", {})
    peak: float | None = None
    while (message := pipe.next()) is not None:
        if message.get("measure"):
            import torch

            from retrain.peaks import matmul_flops

            device = backend.policy.device
            peak = matmul_flops(device, torch.float32 if job["dtype"] == "fp32" else torch.bfloat16)
            pipe.parts = {"peak_flops": peak}
            continue
        rows = rows_of(case, message["step"])
        before = dict(timings)
        batch = tuple(TrainRow(r["ids"], r["sampled"], r["old"], r["advantages"]) for r in rows)
        tokens = work(case, message["step"]).tokens
        report = backend.train_step(TrainBatch(batch, tokens, case.groups * case.members, 1, 1.0), optim)
        pipe.parts = {k: v - before[k] for k, v in timings.items()}
        pipe.parts["grad_norm"] = float(report.grad_norm or 0.0)


def plain(job: dict[str, Any], case: Case, pipe: Pipe) -> None:
    """transformers and PEFT, padded, whole logits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = torch.device("cpu" if job["device"] == "cpu" else "cuda")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    base: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(device)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model: Any = get_peft_model(
        base, LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=targets)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    while (message := pipe.next()) is not None:
        rows = rows_of(case, message["step"])
        tokens = work(case, message["step"]).tokens
        width = max(len(r["ids"]) for r in rows)

        def padded(name: str, rows: Any = rows, width: int = width) -> Any:
            out = np.zeros((len(rows), width), dtype=rows[0][name].dtype)
            for i, r in enumerate(rows):
                out[i, : len(r[name])] = r[name]
            return torch.as_tensor(out, device=device)

        ids, sampled = padded("ids").long(), padded("sampled")
        mask = torch.zeros_like(ids)
        for i, r in enumerate(rows):
            mask[i, : len(r["ids"])] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).squeeze(2)
        ratio = torch.exp(logprobs - padded("old")[:, 1:].nan_to_num())
        loss = -(ratio * padded("advantages")[:, 1:] * sampled[:, 1:]).sum() / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        pipe.parts = {"grad_norm": float(norm)}


class Side:
    """A process that runs one side's steps when told."""

    def __init__(self, name: str, job: dict[str, Any], source: Path) -> None:
        self.name = name
        env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(job["threads"])}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", json.dumps({**job, "side": name})],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.ready = self._read()
        self.steps: list[dict[str, Any]] = []

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the side {self.name!r} ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """One step, or the peak."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"stop": True}) + "\n")
        self._process.stdin.close()
        self._process.wait(60)


def compare(run: argparse.Namespace) -> dict[str, Any]:
    """All sides, round by round, the order turned each time."""
    case = CASES[run.case]
    models = Path(run.models)
    job = {
        "case": run.case, "dtype": run.dtype, "device": run.device, "threads": run.threads,
        "model": str(TINY if case.model == "tiny" else make_medium(models / "medium")),
    }  # fmt: skip
    sides = [Side("ours", job, ROOT / "src")]
    if not run.no_plain:
        sides.append(Side("plain", job, ROOT / "src"))
    if run.old:
        sides.append(Side("old", job, Path(run.old) / "src"))
    peaks: list[float] = []
    for number in range(run.rounds + 1):
        if number:
            peaks.append(sides[0].ask({"measure": True})["parts"]["peak_flops"])
        turned = sides[number % len(sides) :] + sides[: number % len(sides)]
        for side in turned:
            got = side.ask({"step": number, "reset_peak": True})
            if number:
                side.steps.append(got)
    for side in sides:
        side.close()
    layout = json.loads((TINY / "config.json").read_text()) if case.model == "tiny" else MEDIUM_LAYOUT
    needed = [operations(case, rows_of(case, n), layout) for n in range(1, run.rounds + 1)]
    mine = sides[0].steps
    record: dict[str, Any] = {
        "case": run.case, "dtype": run.dtype, "device": run.device, "threads": run.threads, "rounds": run.rounds,
        "peak_gflops": round(statistics.median(peaks) / 1e9, 1),
        "sides": {
            side.name: {
                "cpu_s": [round(s["cpu_s"], 4) for s in side.steps],
                "wall_s": [round(s["wall_s"], 4) for s in side.steps],
                "peak_bytes": max(s["peak_bytes"] for s in side.steps),
                "grad_norm": [round(s["parts"]["grad_norm"], 6) for s in side.steps],
            }
            for side in sides
        },
    }  # fmt: skip
    record["parts"] = [{k: round(v, 4) for k, v in s["parts"].items()} for s in mine]
    # By CPU seconds, which other processes stretch less than the clock; the head has its part of them by the clock.
    seconds = [s["cpu_s"] / run.threads if run.device == "cpu" else s["wall_s"] for s in mine]
    shares = [(n["head"] + n["layers"]) / t / p for n, t, p in zip(needed, seconds, peaks, strict=True)]
    heads = [
        n["head"] / (t * s["parts"]["head"] / s["wall_s"]) / p
        for n, s, t, p in zip(needed, mine, seconds, peaks, strict=True)
    ]
    record["share_of_peak"] = {"step": spread(shares), "head": spread(heads)}
    record["ratios"] = {
        side.name: {
            kind: spread([b[kind] / a[kind] for a, b in zip(mine, side.steps, strict=True)])
            for kind in ("cpu_s", "wall_s")
        }
        | {
            "peak_bytes": round(
                max(s["peak_bytes"] for s in side.steps) / max(s["peak_bytes"] for s in mine), 2
            )
        }
        for side in sides[1:]
    }
    return record


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {
        "median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="tiny", choices=sorted(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", help="cpu, or gpu:0")
    parser.add_argument("--old", default="", help="a checkout of an older version")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "retrain-models"))
    parser.add_argument("--json", default="")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    run = parser.parse_args()
    if run.side:
        job = json.loads(run.side)
        pipe = Pipe()
        import torch

        torch.set_num_threads(job["threads"])
        (plain if job["side"] == "plain" else ours)(job, CASES[job["case"]], pipe)
        return 0
    record = compare(run)
    text = json.dumps(record, indent=1)
    if run.json:
        Path(run.json).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
