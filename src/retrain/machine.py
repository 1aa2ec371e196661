"""What this machine offers a run: Python, packages, devices, memory, disk, caches, clock and file locks, one ``Check``
each. torch is asked in a child process, because a broken driver can take a process with it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

Status: TypeAlias = Literal["ok", "warning", "problem"]

TORCH_DEADLINE_S = 120.0
"""Importing torch and a first kernel on a cold, slow disk take up to a minute."""

EXTRAS = {
    "local": "training, sampling, models and data sets",
    "tasks": 'data.source = "reasoning_gym"',
    "checks": "constraints json_schema and language, safe regular expressions",
    "semantic": 'planning.detector = "semantic"',
    "wandb": "tracker wandb",
    "trackio": "tracker trackio",
    "tensorboard": "tracker tensorboard",
    "qlora": "model.quantization on CUDA",
}
"""What each extra of the package is for."""

VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "LD_LIBRARY_PATH", "PYTHONPATH", "TOKENIZERS_PARALLELISM",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_ENDPOINT",
    "HTTP_PROXY", "HTTPS_PROXY", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL",
    "RETRAIN_NO_DOTENV", "TMPDIR",
)  # fmt: skip
"""Environment variables that change what a run does. Only their names are shown."""

_LOW_DISK, _NO_DISK = 5 * 2**30, 2**28
_LOW_MEMORY = 2 * 2**30

_TORCH = """
import json, sys
import torch
found = {
    "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(), "devices": [], "error": "",
}
probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
found["cpu_bf16"] = any(bool(getattr(torch.cpu, p)()) for p in probes if hasattr(torch.cpu, p))
try:
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        x = torch.ones(64, 64, device=f"cuda:{i}")
        works = bool(((x @ x) == 64).all())
        found["devices"].append({
            "index": i, "name": torch.cuda.get_device_name(i), "free": free, "total": total, "works": works,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "bf16": torch.cuda.get_device_capability(i) >= (8, 0),
        })
except Exception as error:
    found["error"] = str(error).strip().partition(chr(10))[0] or type(error).__name__
json.dump(found, sys.stdout)
"""

_WANDB = """
import json
import wandb
try:
    out = wandb.setup().settings.mode == "online" and not wandb.login(prompt=False)
    print(json.dumps("it is not logged in" if out else ""))
except Exception as error:
    print(json.dumps(str(error).partition(chr(10))[0] or type(error).__name__))
"""

_LOCK = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("held")
    else:
        print("free")
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: ``what`` was found, and the ``fix`` where it is not ok ("" where there is none)."""

    area: str
    name: str
    status: Status
    what: str
    fix: str = ""


def checks(directory: Path, torch: Mapping[str, Any]) -> list[Check]:
    """Every check of the machine. ``directory`` is where runs go, made or not; ``torch`` is what ``ask_torch`` says."""
    place = _standing(directory)
    return [
        *_software(),
        *_packages(),
        *_devices(torch),
        _processors(torch),
        _memory(),
        _disk("disk of runs", place, f"for {directory}"),
        *_hub(),
        _clock(place),
        _locks(place),
        _environment(),
    ]


def ask_torch(deadline_s: float = TORCH_DEADLINE_S) -> dict[str, Any]:
    """torch's version, threads and devices, from a child process; ``error`` says why there is no answer."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH],
            capture_output=True, text=True, timeout=deadline_s, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"version": "", "devices": [], "error": f"no answer within {deadline_s:g} seconds"}
    except OSError as error:
        return {"version": "", "devices": [], "error": str(error)}
    try:
        return cast("dict[str, Any]", json.loads(done.stdout))
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2]
        why = f"it ended by signal {-done.returncode}" if done.returncode < 0 else last or "it said nothing"
        return {"version": "", "devices": [], "error": why}


def ask_wandb(deadline_s: float = TORCH_DEADLINE_S) -> str | None:
    """Why wandb would refuse to start a run here, "" where it would not; None where it gives no answer. Asked in a child
    process, because its import takes a second and stays."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _WANDB],
            capture_output=True, text=True, timeout=deadline_s, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return str(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _software() -> Iterator[Check]:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11)
    yield Check(
        "software", "Python", "ok" if fine else "problem",
        f"{version} ({platform.python_implementation()}), {platform.system()} {platform.machine()}",
        "" if fine else "use Python 3.11 or newer.",
    )  # fmt: skip
    from retrain import __version__

    root = Path(__file__).resolve().parents[2]
    commit = _commit(root)
    where = f"checkout {commit}" if commit else "installed copy"
    yield Check("software", "retrain", "ok", f"{__version__}, {where}")


def _commit(root: Path) -> str:
    """Short commit of a checkout, with a + where its sources are changed; "" for an installed copy."""
    if not (root / ".git").exists():
        return ""
    found: list[str] = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "src"]):
        try:
            done = subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return "without git"
        found.append(done.stdout.strip())
    return f"{found[0]} with changes" if found[1] else found[0]


def requirements() -> dict[str, list[tuple[str, str]]]:
    """Packages and their tested ranges, by extra ("" for the core), from the package's own metadata."""
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        listed = metadata.requires("retrain") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return found
    from packaging.requirements import Requirement

    for line in listed:
        wanted = Requirement(line)
        extra = next((e for e in EXTRAS if wanted.marker and f'extra == "{e}"' in str(wanted.marker)), "")
        if wanted.name != "retrain" and (extra or wanted.marker is None):
            ordered = ",".join(sorted(str(wanted.specifier).split(","), reverse=True))
            found.setdefault(extra, []).append((wanted.name, ordered))
    return found


def _packages() -> Iterator[Check]:
    ranges = requirements()
    if not ranges:
        yield Check("packages", "metadata", "warning", "retrain is not installed, so tested versions are unknown",
                    'install it: pip install -e ".[local]".')  # fmt: skip
        return
    for extra in ("", *EXTRAS):
        if extra in ranges:
            yield _extra(extra, ranges[extra])


def _extra(extra: str, ranges: Iterable[tuple[str, str]]) -> Check:
    from packaging.specifiers import SpecifierSet

    held: list[str] = []
    missing: list[str] = []
    outside: list[str] = []
    for name, tested in ranges:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        held.append(f"{name} {version}")
        if not SpecifierSet(tested).contains(version, prereleases=True):
            outside.append(f"{name} {version} is outside {tested}")
    name = extra or "core"
    install = f'pip install "retrain[{extra}]"' if extra else 'pip install --upgrade "retrain"'
    if outside:
        return Check("packages", name, "warning", "; ".join(outside), f"{install} installs a tested version.")
    if not missing:
        return Check("packages", name, "ok", ", ".join(held))
    if extra in ("", "local"):
        return Check("packages", name, "problem", f"not installed: {', '.join(missing)}", f"{install}.")
    return Check("packages", name, "ok", f"not installed; for {EXTRAS[extra]}: {install}")


def _devices(torch: Mapping[str, Any]) -> Iterator[Check]:
    error, version = str(torch.get("error", "")), str(torch.get("version", ""))
    if not version:
        yield Check("devices", "torch", "problem", f"cannot be used: {error}",
                    'pip install "retrain[local]", with the torch build for your driver.')  # fmt: skip
        return
    built = (
        f"CUDA {torch['cuda']}"
        if torch.get("cuda")
        else f"ROCm {torch['hip']}"
        if torch.get("hip")
        else "CPU only"
    )
    yield Check("devices", "torch", "ok", f"{version}, built for {built}")
    if error:
        yield Check("devices", "CUDA", "problem", f"cannot be used: {error}",
                    "update the driver, or install the torch build that fits it.")  # fmt: skip
    elif not torch["devices"] and shutil.which("nvidia-smi"):
        what = "nvidia-smi is there, but torch sees no CUDA device"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        fix = (
            "unset CUDA_VISIBLE_DEVICES."
            if hidden
            else "install a torch build for CUDA, or check the driver."
        )
        yield Check("devices", "CUDA", "warning", what, fix)
    elif not torch["devices"]:
        yield Check("devices", "CUDA", "ok", 'no CUDA device: backend.devices = "cpu"')
    for device in torch["devices"]:
        free, total = device["free"] / 2**30, device["total"] / 2**30
        what = (
            f"{device['name']}, {free:.1f} of {total:.1f} GiB free, compute capability {device['capability']}, "
            f"bf16 {'yes' if device['bf16'] else 'no'}"
        )
        name = f"gpu:{device['index']}"
        if not device["works"]:
            yield Check("devices", name, "problem", f"{what}; a product came out wrong",
                        "restart the machine; if it stays so, the device is broken.")  # fmt: skip
        elif not device["bf16"]:
            yield Check(
                "devices",
                name,
                "warning",
                what,
                'set inference.dtype = "fp32", which is slow, or use a newer card.',
            )
        elif free < total / 2:
            yield Check(
                "devices", name, "warning", what, "another process holds memory there: see nvidia-smi."
            )
        else:
            yield Check("devices", name, "ok", what)


def usable_processors() -> float:
    """Processors that this process may use: its affinity, and the quota of its container."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, int(quota) / int(period))
    return count


def _processors(torch: Mapping[str, Any]) -> Check:
    usable, threads = usable_processors(), torch.get("threads")
    what = f"{usable:g} usable of {os.cpu_count()}"
    if threads is None:
        return Check("devices", "processors", "ok", what)
    units = "bf16 units" if torch.get("cpu_bf16") else "no bf16 units"
    what += f", {threads} {'thread' if threads == 1 else 'threads'} in torch, {torch.get('cpu')}, {units}"
    if threads > usable + 0.5:
        return Check("devices", "processors", "warning", what, f"set OMP_NUM_THREADS={max(1, int(usable))}.")
    return Check("devices", "processors", "ok", what)


def _memory() -> Check:
    facts: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            facts[name] = int(value.split()[0]) * 1024
    if "MemTotal" not in facts:
        return Check("devices", "memory", "ok", "unknown on this system")
    total, free = facts["MemTotal"], facts.get("MemAvailable", 0)
    limited = ""
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if limit < total:
            total, free, limited = limit, min(free, limit - used), " (limit of the container)"
    what = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free{limited}"
    if free < _LOW_MEMORY:
        return Check(
            "devices", "memory", "warning", what, "end other programs: a model's weights pass through here."
        )
    return Check("devices", "memory", "ok", what)


def _standing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))


def _disk(name: str, place: Path, purpose: str) -> Check:
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return Check("storage", name, "warning", f"{place}: {error.strerror}", "check the file system.")
    what = f"{usage.free / 2**30:.1f} GiB free {purpose}"
    if usage.free < _NO_DISK:
        return Check("storage", name, "problem", what, "make room: a run could not write a checkpoint.")
    if usage.free < _LOW_DISK:
        return Check(
            "storage",
            name,
            "warning",
            what,
            "make room, or keep fewer checkpoints (training.keep_checkpoints).",
        )
    return Check("storage", name, "ok", what)


def hub_cache() -> Path:
    """Where models and data sets of Hugging Face are kept."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def is_offline() -> str:
    """The variable that keeps Hugging Face from the network, "" where none does."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON"):
            return name
    return ""


def _hub() -> Iterator[Check]:
    cache = hub_cache()
    held = len([p for p in cache.glob("models--*") if p.is_dir()]) if cache.is_dir() else 0
    flag = is_offline()
    what = f"{cache}: {held} {'model' if held == 1 else 'models'}" + (
        f"; {flag} is set: nothing is downloaded" if flag else ""
    )
    if not os.access(_standing(cache), os.W_OK) and not flag:
        yield Check(
            "storage",
            "Hugging Face",
            "problem",
            f"{what}; cannot be written",
            "set HF_HOME to a folder of yours.",
        )
    else:
        yield Check("storage", "Hugging Face", "ok", what)
    if not flag:
        yield _disk("disk of models", _standing(cache), f"for {cache}")


def _clock(place: Path) -> Check:
    """The clock against the newest file of this package, and the file system's clock against ours: heartbeats need both."""
    now = time.time()
    built = max((p.stat().st_mtime for p in Path(__file__).parent.glob("*.py")), default=0.0)
    if now < built - 3600:
        return Check("storage", "clock", "warning", f"{time.strftime('%Y-%m-%d')}, before this program was installed",
                     "set the clock: ages of runs are told by it.")  # fmt: skip
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=place, prefix=".retrain-") as file:
        before = time.time()
        file.write(b"x")
        file.flush()
        skew = os.stat(file.name).st_mtime - before
        if abs(skew) > 5:
            return Check("storage", "clock", "warning", f"the file system's clock differs by {skew:+.0f} seconds",
                         "set both clocks by the same server.")  # fmt: skip
    return Check("storage", "clock", "ok", "agrees with the file system's")


def _locks(place: Path) -> Check:
    """Does a lock in the file system of runs keep another process out? It is what keeps two runs apart."""
    try:
        import fcntl
    except ImportError:
        return Check(
            "storage",
            "file locks",
            "warning",
            "none on this system",
            "do not start two runs in one directory.",
        )
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".retrain-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            done = subprocess.run(
                [sys.executable, "-S", "-c", _LOCK, file.name],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
    except (OSError, subprocess.SubprocessError) as error:
        return Check(
            "storage",
            "file locks",
            "problem",
            f"{place}: {error}",
            "choose a logging.log_dir that can be written.",
        )
    if done.stdout.strip() == "held":
        return Check("storage", "file locks", "ok", "work in the file system of runs")
    return Check("storage", "file locks", "warning", "do not hold in the file system of runs",
                 "choose a local logging.log_dir, or never start two runs in one directory.")  # fmt: skip


def _environment() -> Check:
    found = [name for name in VARIABLES if name in os.environ or name.lower() in os.environ]
    return Check(
        "storage",
        "variables",
        "ok",
        f"set: {', '.join(found)}" if found else "no variable set that matters",
    )
