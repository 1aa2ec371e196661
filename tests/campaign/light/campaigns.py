"""Starts campaigns of light runs as processes, signals them, and reads what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

LIGHT = Path(__file__).with_name("light.py")


def begin(folder: Path, *words: str, program: tuple[str, ...] = (str(LIGHT),), **settings: str) -> subprocess.Popen[str]:
    """``retrain WORDS`` in ``folder``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", **settings}
    return subprocess.Popen(
        [sys.executable, *program, *words], cwd=folder, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(folder: Path, *words: str, **settings: str) -> tuple[int, str]:
    """Exit status, and everything printed."""
    process = begin(folder, *words, **settings)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def campaign(folder: Path) -> Path:
    """The directory of the one campaign in ``folder``."""
    (found,) = (folder / "logs").glob("campaign_*")
    return found


def wait_for(found, seconds: float = 120.0) -> None:
    """Until ``found()``."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def rows(path: Path) -> list[dict]:
    """Records of a JSON-lines file; none where it is not there."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []


def steps(directory: Path, name: str) -> list[int]:
    """The steps that a run's metrics hold."""
    return [row["step"] for row in rows(directory / "runs" / name / "metrics.jsonl") if "condition" in row]


def states(directory: Path) -> dict[str, str]:
    """The state of every run that was begun."""
    found = sorted((directory / "runs").glob("*/run.json"))
    return {path.parent.name: json.loads(path.read_text())["status"] for path in found}


def alive(directory: Path) -> list[int]:
    """Processes of the campaign's runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"retrain.campaign.child" in words and any(w.startswith(str(directory).encode()) for w in words):
            found.append(int(path.parent.name))
    return found


CAMPAIGN = """
[model]
model = "retrain/tiny"
[backend]
backend = "light.backend"
devices = "cpu"
options = {{ signs = "{folder}/signs", step_s = {step_s} }}
[inference]
engine = "light.engine"
[training]
batch_size = 2
group_size = 64
max_tokens = 1
temperature = 1.0
save_every = 1
[data]
source = "jsonl"
path = "{folder}/tasks.jsonl"
[reward]
type = "light.reward"
[plugins]
search_paths = ["{here}"]
[logging]
log_dir = "{folder}/logs"
[campaign]
seeds = {seeds}
max_steps = {steps}
threads = 1
{more}
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "none"
"""


def write(folder, *, seeds=(1, 2), steps=3, step_s=0.0, more=""):
    """The configuration of a campaign of such runs in ``folder``."""
    (folder / "signs").mkdir(exist_ok=True)
    rows = [{"question": f"{i} ?", "answer": "7"} for i in range(40)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "campaign.toml"
    path.write_text(
        CAMPAIGN.format(folder=folder, here=Path(__file__).parent, seeds=list(seeds), steps=steps, step_s=step_s, more=more)
    )
    return path
