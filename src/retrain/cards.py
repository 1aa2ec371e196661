"""Devices and models in numbers, known without torch: the device that is here, a table of real cards, and a model's
config.json from its folder, from the local cache, or from a table of well-known ones.

Cards: memory in GB as sold, dense tensor peaks of bf16 products with float32 sums and peaks of plain float32 in TFLOP/s
(no sparsity), memory traffic in GB/s, all from NVIDIA's data sheets and architecture papers: GA102 (RTX 3090, A10, RTX
A6000), Ada (RTX 4090, L4, L40S, RTX 6000 Ada), RTX Blackwell (RTX 5090), A100, H100, H200 and B200 in the SXM form
unless the name says PCIe or NVL; the A10G's are those that its only seller states. Memory that programs are shown is what
torch reports, less than what is sold: most of all where error correction takes a share. Models: the sizes in their published
config.json. Both tables stand for what cannot be looked up here; what is on the disk, or in the machine, wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal, cast

import numpy as np

from retrain.errors import ModelError, UsageError

_MIB = 2**20
_SHARE = 0.85
"""Of their single speed that threads keep beside each other, seen on two cores."""
_MATMUL = 512
"""Rows and columns of the product that measures a CPU."""
_TINY = "retrain/tiny"
_PART = "MIG-"
"""Begins the name of a part of a card in CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True, slots=True)
class CardSpec:
    """One card: ``memory_gb`` as sold, ``gib`` as programs are shown it, ``bf16`` and ``fp32`` in TFLOP/s, ``bandwidth`` in
    GB/s."""

    name: str
    memory_gb: int
    gib: float
    bf16: float
    fp32: float
    bandwidth: float

    @property
    def bytes(self) -> int:
        """Memory that a program is shown."""
        return int(self.gib * 2**30)


CARDS = {
    spec.name: spec
    for spec in (
        CardSpec("RTX 3090", 24, 23.69, 71.0, 35.6, 936),
        CardSpec("RTX 3090 Ti", 24, 23.69, 80.0, 40.0, 1008),
        CardSpec("RTX 4090", 24, 23.64, 165.2, 82.6, 1008),
        CardSpec("RTX 4090 D", 24, 23.64, 147.1, 73.5, 1008),
        CardSpec("RTX 5090", 32, 31.36, 209.5, 104.8, 1792),
        CardSpec("RTX A6000", 48, 47.53, 154.8, 38.7, 768),
        CardSpec("RTX 6000 Ada", 48, 47.50, 364.2, 91.1, 960),
        CardSpec("A10", 24, 22.06, 125.0, 31.2, 600),
        CardSpec("A10G", 24, 22.06, 70.0, 31.5, 600),
        CardSpec("L4", 24, 22.03, 121.0, 30.3, 300),
        CardSpec("L40", 48, 44.39, 181.0, 90.5, 864),
        CardSpec("L40S", 48, 44.39, 362.0, 91.6, 864),
        CardSpec("A100 40GB", 40, 39.39, 312.0, 19.5, 1555),
        CardSpec("A100 80GB", 80, 79.14, 312.0, 19.5, 2039),
        CardSpec("H100", 80, 79.10, 989.0, 67.0, 3350),
        CardSpec("H100 PCIe", 80, 79.10, 756.0, 51.0, 2000),
        CardSpec("H100 NVL", 94, 93.00, 835.0, 60.0, 3900),
        CardSpec("H200", 141, 139.8, 989.0, 67.0, 4800),
        CardSpec("H200 NVL", 141, 139.8, 835.0, 60.0, 4800),
        CardSpec("B200", 180, 178.35, 2250.0, 75.0, 7700),
    )
}
"""By name, smallest first within a family."""


def _plain(name: str) -> str:
    """Letters and digits, without what drivers write around a name."""
    words = re.sub(r"(?i)nvidia|geforce|tesla|graphics|sxm\d?|hbm\d\w*", " ", name)
    return re.sub(r"[^a-z0-9]", "", words.lower())


def find(name: str) -> CardSpec:
    """The card that ``--gpu`` names, however it is spelt; UsageError with the table's names otherwise."""
    by_plain = {_plain(n): spec for n, spec in CARDS.items()}
    wanted = _plain(name)
    if wanted == "a100":
        wanted = "a10080gb"
    if wanted in by_plain:
        return by_plain[wanted]
    # Its memory behind a name that needs none: "H100 80GB", "L4 24GB".
    for plain, spec in by_plain.items():
        if wanted.replace(f"{spec.memory_gb}gb", "") == plain:
            return spec
    # A whole end of a name before any part of one: 4090 is no RTX 4090 D.
    for part in (str.endswith, str.__contains__):
        holding = [spec for plain, spec in by_plain.items() if wanted and part(plain, wanted)]
        if len(holding) == 1:
            return holding[0]
    near = get_close_matches(wanted, by_plain, n=1)
    hint = f"did you mean {by_plain[near[0]].name}? " if near else ""
    raise UsageError(f"--gpu {name!r} is not in the table of cards.", fix=f"{hint}known: {', '.join(CARDS)}.")


def of_driver(name: str, memory_bytes: int) -> CardSpec | None:
    """The table's entry for what a driver calls a card, None for one that is not in it."""
    found = _plain(name)
    close = [
        s for n, s in CARDS.items() if found.startswith(_plain(n).removesuffix("40gb").removesuffix("80gb"))
    ]
    # The longest name first: an H100 PCIe is no H100, and an A100 no A10.
    close.sort(key=lambda s: (-len(_plain(s.name)), abs(s.bytes - memory_bytes)))
    fitting = [s for s in close if 0.8 < memory_bytes / s.bytes < 1.25]
    return fitting[0] if fitting else None


def _taken_as(name: str, spec: CardSpec) -> str:
    """Where the figures are from, and of which card, where the driver's name says more than the table's."""
    rest = _plain(name).removesuffix("generation").replace(f"{spec.memory_gb}gb", "")
    same = rest == _plain(spec.name).replace(f"{spec.memory_gb}gb", "")
    return "data sheet" if same else f"taken as {spec.name}; data sheet"


@dataclass(frozen=True, slots=True)
class Device:
    """A device in numbers: ``bytes`` of memory, ``flops`` of its best product per format in operations a second,
    ``bandwidth`` in bytes a second (0: unknown, then there is no estimate of time). ``note`` says where they are from.
    ``guessed``: a GPU was asked for and none was found, which torch may still see."""


    name: str
    kind: Literal["cpu", "cuda"]
    bytes: int
    flops_bf16: float
    flops_fp32: float
    bandwidth: float
    here: bool
    note: str = ""
    swap: int = 0
    guessed: bool = False


def card(name: str) -> Device:
    """A card of the table; UsageError for another name."""
    spec = find(name)
    return Device(
        spec.name, "cuda", spec.bytes, spec.bf16 * 1e12, spec.fp32 * 1e12, spec.bandwidth * 1e9, False, "data sheet"
    )  # fmt: skip


def present(devices: str, *, speed: bool = True) -> Device:
    """The device that ``backend.devices`` comes to on this machine, without torch: a missing GPU is the CPU, as in a run,
    and then only ``guessed``: torch sees GPUs that nvidia-smi does not list (parts of a card by name, those of others).
    ``speed`` also measures the CPU's products, in about 10 ms."""
    if devices != "cpu" and (found := _cuda(int(devices.partition(":")[2] or 0))) is not None:
        return found
    asked = devices != "cpu"
    note = f"none was found here for {devices}; a run without one uses the CPU" if asked else ""
    if asked and any(not row for _, row in _listed()):
        note = f"{devices} is a part of a card, whose memory and speed are not known before a run"
    return Device(
        "CPU", "cpu", _host_bytes(), 0.0, _cpu_flops() if speed else 0.0, 10e9 if speed else 0.0, True, note, _swap_bytes(), asked
    )  # fmt: skip


def visible() -> list[str]:
    """The GPUs that this program sees, each as CUDA_VISIBLE_DEVICES names it; empty where the driver lists none."""
    return [name for name, _ in _listed()]


def _listed() -> list[tuple[str, list[str]]]:
    """(how CUDA_VISIBLE_DEVICES names it, what the driver says) of every GPU that this program sees; a part of a card, of
    which the driver's list says nothing, has no words."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,uuid", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.count(",") >= 2]
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is None:
        return [(str(i), row) for i, row in enumerate(rows)]
    found: dict[str, tuple[str, list[str]]] = {}
    for name in map(str.strip, stated.split(",")):
        if name.startswith(_PART):
            found.setdefault(name, (name, []))
            continue
        named = [row for i, row in enumerate(rows) if name == str(i) or (name[:3] == "GPU" and row[2].startswith(name))]
        if len(named) != 1:
            # CUDA sees what stands before the first name that is none.
            break
        found.setdefault(named[0][2], (name, named[0]))
    return list(found.values())


def _cuda(index: int) -> Device | None:
    """What the driver says of the GPU that the program would see as number ``index``."""
    rows = [row for _, row in _listed()]
    if index >= len(rows) or not rows[index] or not rows[index][1].isdecimal():
        return None
    name, size = rows[index][0], int(rows[index][1]) * _MIB
    spec = of_driver(name, size)
    if spec is None:
        return Device(
            name, "cuda", size, 0.0, 0.0, 0.0, True, "not in the table of cards: its speed is unknown"
        )
    return Device(
        name, "cuda", size, spec.bf16 * 1e12, spec.fp32 * 1e12, spec.bandwidth * 1e9, True, _taken_as(name, spec)
    )


def _host_bytes() -> int:
    """Memory that this process may have: the machine's, or less where a control group says so."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total


def _swap_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal"))


def _cpu_flops() -> float:
    """Operations a second of a float32 product with the threads that a run would have: measured with those that numpy
    has, which a short command keeps at one because starting them costs more than everything else it does."""
    x = np.ones((_MATMUL, _MATMUL), np.float32)
    out, best = np.empty_like(x), float("inf")
    for _ in range(6):
        began = time.perf_counter()
        np.matmul(x, x, out=out)
        best = min(best, time.perf_counter() - began)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run = _number_of("OMP_NUM_THREADS") or cores
    mine = _number_of("OPENBLAS_NUM_THREADS") or run
    return 2.0 * _MATMUL**3 / best * (1.0 if mine >= run else _SHARE * run / mine)


def _number_of(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _model(
    hidden: int, layers: int, heads: int, kv: int, head_dim: int, width: int, vocab: int, tied: bool, context: int,
    **more: Any,
) -> Mapping[str, Any]:  # fmt: skip
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": head_dim, "intermediate_size": width, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": context, **more,
    }  # fmt: skip


_QWEN3 = {"model_type": "qwen3"}
_QWEN2 = {"model_type": "qwen2"}

MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-0.6B": _model(1024, 28, 16, 8, 128, 3072, 151936, True, 40960, **_QWEN3),
    "Qwen/Qwen3-1.7B": _model(2048, 28, 16, 8, 128, 6144, 151936, True, 40960, **_QWEN3),
    "Qwen/Qwen3-4B": _model(2560, 36, 32, 8, 128, 9728, 151936, True, 40960, **_QWEN3),
    "Qwen/Qwen3-4B-Instruct-2507": _model(2560, 36, 32, 8, 128, 9728, 151936, True, 262144, **_QWEN3),
    "Qwen/Qwen3-4B-Thinking-2507": _model(2560, 36, 32, 8, 128, 9728, 151936, True, 262144, **_QWEN3),
    "Qwen/Qwen3-8B": _model(4096, 36, 32, 8, 128, 12288, 151936, False, 40960, **_QWEN3),
    "Qwen/Qwen3-14B": _model(5120, 40, 40, 8, 128, 17408, 151936, False, 40960, **_QWEN3),
    "Qwen/Qwen3-32B": _model(5120, 64, 64, 8, 128, 25600, 151936, False, 40960, **_QWEN3),
    "Qwen/Qwen2.5-0.5B-Instruct": _model(896, 24, 14, 2, 64, 4864, 151936, True, 32768, **_QWEN2),
    "Qwen/Qwen2.5-1.5B-Instruct": _model(1536, 28, 12, 2, 128, 8960, 151936, True, 32768, **_QWEN2),
    "Qwen/Qwen2.5-3B-Instruct": _model(2048, 36, 16, 2, 128, 11008, 151936, True, 32768, **_QWEN2),
    "Qwen/Qwen2.5-7B-Instruct": _model(3584, 28, 28, 4, 128, 18944, 152064, False, 32768, **_QWEN2),
    "meta-llama/Llama-3.2-1B-Instruct": _model(2048, 16, 32, 8, 64, 8192, 128256, True, 131072),
    "meta-llama/Llama-3.2-3B-Instruct": _model(3072, 28, 24, 8, 128, 8192, 128256, True, 131072),
    "meta-llama/Llama-3.1-8B-Instruct": _model(4096, 32, 32, 8, 128, 14336, 128256, False, 131072),
}
"""Keys of config.json of models that runs often name, for those who have not downloaded them yet."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What is known of a model before it is loaded: the keys of its config.json as attributes, those of its
    generation_config.json (None: not looked at), in words where they are from, and the folder (None: a table)."""

    name: str
    config: Any
    generation: Mapping[str, Any] | None
    source: str
    folder: Path | None = None


def look_up(name: str, revision: str = "", beside: Path | None = None) -> ModelFiles:
    """A model's configuration from its folder (``beside`` is looked in first), the local cache or the table of well-known
    ones; ModelError where it is in none of them."""
    folder = _folder(name, beside)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.model = {name!r}: the folder holds no config.json.",
                fix="name a folder that holds a model.",
            )
        return _from(folder, name, "its folder")
    cached = _cached(name, revision)
    if cached is not None:
        return _from(cached, name, "the local cache")
    if name in MODELS:
        return ModelFiles(name, SimpleNamespace(**MODELS[name]), None, "the table of well-known models")
    raise ModelError(
        f"model.model = {name!r} is not on this machine, and not in the table of well-known models.",
        fix="correct the name, or download it once.",
    )


def _folder(name: str, beside: Path | None) -> Path | None:
    if name == _TINY:
        return Path(__file__).parent / "assets" / "tiny"
    # What cannot be looked at is not a folder of ours.
    with contextlib.suppress(OSError, RuntimeError):
        for root in (beside or Path.cwd(), Path.cwd()):
            path = root / Path(name).expanduser()
            if path.is_dir():
                return path
    return None


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot of an id in the Hub's cache, whose layout is stable: refs hold commits, snapshots their files."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    root = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    place = root / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    # What is no branch or tag may be a commit.
    with contextlib.suppress(OSError, ValueError):
        commit = (place / "refs" / commit).read_text(encoding="utf-8").strip()
    folder = place / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def _from(folder: Path, name: str, source: str) -> ModelFiles:
    values = _json(folder / "config.json")
    if values is None:
        raise ModelError(f"{folder / 'config.json'} is not a JSON object.", fix="download the model again.")
    return ModelFiles(
        name, SimpleNamespace(**values), _json(folder / "generation_config.json") or MappingProxyType({}), source, folder
    )  # fmt: skip


def _json(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else None
