"""What starting costs: no heavy import, and at most five times the CPU time of bare Python."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "pydantic", "numpy", "rich", "tomlkit", "datasets")
MAIN = "import sys; from retrain.cli.main import main; main(sys.argv[1:])"

LIGHT = {
    "import": ["-c", "import retrain"],
    "help": ["-c", MAIN, "--help"],
    "command help": ["-c", MAIN, "init", "--help"],
    "eval help": ["-c", MAIN, "eval", "--help"],
    "sample help": ["-c", MAIN, "sample", "--help"],
    "bench help": ["-c", MAIN, "bench", "--help"],
    "export help": ["-c", MAIN, "export", "--help"],
    "demo help": ["-c", MAIN, "demo", "--help"],
    "init-plugin": ["-c", MAIN, "init-plugin", "--kind", "sink", "--name", "my_sink"],
    "page": ["-c", MAIN, "man", "--format", "html"],
    "status help": ["-c", MAIN, "status", "--help"],
    "top help": ["-c", MAIN, "top", "--help"],
    "man": ["-c", MAIN, "man"],
    "topic": ["-c", MAIN, "man", "--topic", "options"],
    "init": ["-c", MAIN, "init", "--template", "tiny", "out.toml"],
    "list": ["-c", MAIN, "init", "--list"],
    "version": ["-c", MAIN, "--version"],
}


def cpu_seconds(arguments: list[str], folder: Path) -> float:
    """User and system time of one child."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def median_cpu(arguments: list[str], folder: Path) -> float:
    times: list[float] = []
    for _ in range(7):
        (folder / "out.toml").unlink(missing_ok=True)
        times.append(cpu_seconds(arguments, folder))
    return statistics.median(times)


@pytest.mark.parametrize("name", LIGHT)
def test_imports_nothing_heavy(name: str, tmp_path: Path) -> None:
    flag, code, *words = LIGHT[name]
    check = f"\nprint('HEAVY', sorted(m for m in {HEAVY!r} if m in sys.modules))"
    code = code if code.startswith("import sys") else f"import sys; {code}"
    done = subprocess.run(
        [sys.executable, flag, code + check, *words], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert done.stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="measures with getrusage")
def test_starting_costs_at_most_five_times_bare_python(tmp_path: Path) -> None:
    bare = median_cpu(["-c", "pass"], tmp_path)
    for name in ("import", "help", "man", "init"):
        cost = median_cpu(LIGHT[name], tmp_path)
        assert cost <= 5 * bare, f"{name}: {cost * 1000:.0f} ms, bare python {bare * 1000:.0f} ms"


def test_the_command_line_module_leaves_heavy_libraries_out() -> None:
    code = (
        f"import sys, retrain.cli.main\nprint(sorted(m for m in {(*HEAVY, 'pandas')!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
