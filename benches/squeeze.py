"""LoRA-Squeeze on adapters of real models' shapes: seconds and peak memory of the analysis and of the compressed adapter,
and the dense route on one layer.

    python benches/squeeze.py                      # Qwen3-4B at rank 128: 252 layers, 1.06 GB; two threads
    python benches/squeeze.py --shape 70b          # 560 layers at rank 128, 3.3 GB

The adapter is random, with singular values that fall, in float32. Each measurement runs in a process of its own, so that
its peak memory (VmHWM, which counts the interpreter and torch) is its own; nothing maps the adapter's file. The file is read
once before, so that the time is not that of the disk; memory holds it only as the system's cache.

The dense route forms B A of one layer (q_proj) in float32 and takes its singular values; their largest relative difference
from ours is stored too, over those above 1e-6 of the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from worker import peak_bytes

HERE = Path(__file__).resolve().parent
SHAPES = {
    # layers, hidden, query rows, key and value rows, intermediate
    "tiny": (3, 96, 96, 48, 256),
    "4b": (36, 2560, 4096, 1024, 9728),
    "70b": (80, 8192, 8192, 1024, 28672),
}


def layers(shape: str) -> dict[str, tuple[int, int]]:
    """Modules with (out, in)."""
    count, hidden, q, kv, inner = SHAPES[shape]
    kinds = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return {f"model.layers.{i}.{kind}": size for i in range(count) for kind, size in kinds.items()}


def make(folder: Path, shape: str, rank: int) -> None:
    """A random adapter, written layer by layer."""
    import torch

    from retrain.squeeze.tensors import write

    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in layers(shape).items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = (rank, columns)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (rows, rank)
    drawn = torch.Generator().manual_seed(0)

    def tensors() -> Any:
        for name, size in shapes.items():
            made = torch.randn(size, generator=drawn)
            yield made * 0.97 ** torch.arange(rank) if "lora_B" in name else made / size[1] ** 0.5

    folder.mkdir()
    write(folder / "adapter_model.safetensors", shapes, torch.float32, tensors())
    kinds = sorted({name.rpartition(".")[2] for name in layers(shape)})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": kinds, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def child(what: str, folder: Path, out: Path) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    began = time.perf_counter()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    loaded, idle = time.perf_counter() - began, peak_bytes()
    from retrain.squeeze.analysis import analyse, factors
    from retrain.squeeze.compress import compress
    from retrain.squeeze.source import open_source
    from retrain.squeeze.spectrum import spectrum

    found: dict[str, Any] = {"import_s": loaded, "import_bytes": idle}
    wall, cpu = time.perf_counter(), time.process_time()
    if what == "squeeze":
        analysis = analyse(folder, keep=True)
        found["analysis_s"] = time.perf_counter() - wall
        compress(analysis, analysis.recommended, out)
        found |= {"recommended": analysis.recommended, "layers": len(analysis.layers)}
    else:
        source = open_source(folder)
        pair = next(p for p in source.pairs if p.name.endswith("0.self_attn.q_proj"))
        a, b = factors(source, pair, torch.device("cpu"))
        found["shape"] = [pair.rows, pair.columns, pair.rank]
        wall, cpu = time.perf_counter(), time.process_time()
        if what == "layer":
            values = spectrum(a, b).values_R
            torch.save(values, out)
        else:
            dense = torch.linalg.svdvals(b @ a)[: pair.rank].double()
            ours = torch.load(out)
            clear = ours > 1e-6 * ours[0]
            found["largest_relative_difference"] = float(((dense - ours) / ours).abs()[clear].max())
    found |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "peak_bytes": peak_bytes()}
    return found


def machine() -> dict[str, Any]:
    """Where this was measured, and what else ran."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in text if line.startswith("model name")), "")
    return {
        "cpu": cpu, "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "safetensors")},
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the adapter is made; the system's temporary folder without it")
    parser.add_argument("--out", type=Path, default=HERE / "results/squeeze.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, folder, out = args.child
        print(json.dumps(child(what, Path(folder), Path(out))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        adapter = Path(place) / "adapter"
        facts = machine()
        make(adapter, args.shape, args.rank)
        with (adapter / "adapter_model.safetensors").open("rb") as file:
            while file.read(1 << 24):
                pass

        def measured(what: str, out: str) -> dict[str, Any]:
            command = [sys.executable, __file__, "--child", what, str(adapter), str(Path(place) / out)]
            env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        rounds = [measured("squeeze", f"out{i}") for i in range(args.rounds)]
        layer, dense = measured("layer", "values.pt"), measured("dense", "values.pt")
        record = {
            "shape": args.shape, "rank": args.rank, "threads": args.threads, "layers": len(layers(args.shape)),
            "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
            "best_s": min(r["wall_s"] for r in rounds), "peak_bytes": max(r["peak_bytes"] for r in rounds),
            "rounds": rounds, "one_layer": layer, "one_layer_dense": dense,
            "dense_over_ours": dense["cpu_s"] / layer["cpu_s"], "machine": facts,
        }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    stored[f"{args.shape}-rank{args.rank}-threads{args.threads}"] = record
    args.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{record['layers']} layers at rank {args.rank}: {record['best_s']:.1f} s, peak {record['peak_bytes'] / 1e9:.2f} GB")
    print(f"one layer {layer['shape']}: {layer['cpu_s']:.3f} s of CPU, dense {dense['cpu_s']:.2f} s")


if __name__ == "__main__":
    main()
