"""A campaign of the tiny model, killed with SIGKILL at random moments and rerun each time, against one that is left alone.

Usage: python benches/killed_campaign.py [--kills 10] [--seeds 2] [--steps 100] [--out benches/results/killed_campaign.json]

Every second kill takes the processes of the runs as well, as the end of a machine would; the others leave them to notice it.
Compared are, run by run: state, adapter (to the byte), metrics.jsonl without timings, every task drawn and what became of
it, and every completion that was recorded. Exit status 1 when anything differs. Run it from a checkout that nobody edits:
a resume says when the code has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from retrain.training.build import facts

CONFIG = """
[model]
model = "retrain/tiny"
lora_rank = 4
[backend]
devices = "cpu"
[training]
max_steps = {steps}
batch_size = 2
group_size = 8
max_tokens = 24
temperature = 1.0
lr = 1e-3
save_every = 5
[data]
source = "arithmetic"
levels = [1]
[reward]
type = "match"
[eval]
source = "arithmetic"
examples = 8
every = 20
[logging]
log_dir = "logs"
generations = 4
[campaign]
seeds = {seeds}
max_steps = {steps}
launcher = "processes"
max_workers = 2
threads = 1
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "gtpo_sepa"
[sepa]
delay_steps = 1
steps = 4
"""


def start(folder: Path, directory: Path | None) -> subprocess.Popen[bytes]:
    """A new campaign in ``folder``, or the one in ``directory`` again."""
    words = ["--resume", str(directory)] if directory else ["campaign.toml"]
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "retrain", *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, start_new_session=True,
        )  # fmt: skip


def campaign(folder: Path) -> Path | None:
    """The campaign that ``folder`` holds, once its design is written down."""
    return next((p.parent for p in (folder / "logs").glob("campaign_*/manifest.json")), None)


def children(directory: Path) -> list[int]:
    """Processes of the runs of a campaign."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"retrain.campaign.child" in words and any(w.startswith(str(directory).encode()) for w in words):
                found.append(int(path.parent.name))
    return found


def digests(directory: Path) -> dict[str, dict[str, str]]:
    """For every run: what must be equal, as digests and counts."""
    found: dict[str, dict[str, str]] = {}
    for run in sorted(p for p in (directory / "runs").iterdir() if p.is_dir()):
        tasks = [json.loads(line) for line in (run / "emergence/steps.jsonl").read_text().splitlines()]
        draws = [task["draw"] for row in tasks for task in row["tasks"]]
        twice = [draw for draw, count in Counter(draws).items() if count > 1]
        found[run.name] = {
            "state": json.loads((run / "run.json").read_text())["status"],
            "adapter": digest((run / "adapter/adapter_model.safetensors").read_bytes()),
            "metrics": digest("\n".join(timeless(run / "metrics.jsonl")).encode()),
            "steps": str(len(tasks)),
            "tasks": digest(json.dumps(tasks).encode()),
            "tasks_twice": str(len(twice)),
            "completions": digest((run / "emergence/generations.jsonl").read_bytes()),
        }
    return found


def timeless(path: Path) -> list[str]:
    """The rows of metrics.jsonl without what a clock has measured."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        json.dumps({k: v for k, v in row.items() if not k.endswith("_s") and k != "tokens_per_second"}) for row in rows
    ]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def unharmed(folder: Path) -> tuple[dict[str, dict[str, str]], float]:
    """A campaign that is left alone, and its seconds."""
    began = time.monotonic()
    code = start(folder, None).wait()
    if code:
        raise SystemExit(f"the campaign that nobody killed ended with {code}:\n{(folder / 'said.txt').read_text()[-2000:]}")
    return digests(campaign(folder) or folder), time.monotonic() - began


def moments(kills: int, total: int, chance: random.Random) -> list[tuple[int, float]]:
    """When to kill: (steps on record of all runs together, seconds after that), spread at random over the whole campaign;
    every fourth comes while processes start, before anything more is on record."""
    points = sorted(chance.randrange(total * 9 // 10) for _ in range(kills))
    return [(0 if i % 4 == 3 else point, chance.uniform(0.0, 8.0 if i % 4 == 3 else 0.5)) for i, point in enumerate(points)]


def harmed(folder: Path, when: list[tuple[int, float]]) -> tuple[dict, list[dict]]:
    """A campaign killed at the moments ``when`` and rerun after each: its digests, and what each kill met."""
    met: list[dict] = []
    while True:
        directory = campaign(folder)
        if directory is None:
            shutil.rmtree(folder / "logs", ignore_errors=True)
        process, began = start(folder, directory), time.monotonic()
        if len(met) == len(when):
            if code := process.wait():
                raise SystemExit(f"a rerun ended with {code}:\n{(folder / 'said.txt').read_text()[-2000:]}")
            return digests(campaign(folder) or folder), met
        steps, further = when[len(met)]
        while process.poll() is None and at(campaign(folder))["steps"] < steps:
            time.sleep(0.05)
        time.sleep(further)
        if process.poll() is not None:
            raise SystemExit(f"it ended before kill {len(met) + 1}: take more --steps.")
        process.kill()
        process.wait()
        directory = campaign(folder)
        pids = children(directory) if directory else []
        with_runs = bool(len(met) % 2)
        for pid in pids if with_runs else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        after_s = round(time.monotonic() - began, 2)
        met.append({"after_s": after_s, "running": len(pids), "with_runs": with_runs, **at(directory)})


def at(directory: Path | None) -> dict[str, int]:
    """Where the campaign stood: steps on record, and runs at their end."""
    runs = list((directory / "runs").glob("*/metrics.jsonl")) if directory else []
    steps = sum('"condition"' in line for path in runs for line in path.read_text().splitlines())
    ended = [json.loads(p.with_name("run.json").read_text()) for p in runs if p.with_name("run.json").exists()]
    return {"steps": steps, "done": sum(record.get("status") == "done" for record in ended)}


def measure(kills: int, seeds: int, steps: int, chance: random.Random, root: Path) -> dict:
    """The whole comparison as a record."""

    def folder(name: str) -> Path:
        made = root / name
        made.mkdir()
        (made / "campaign.toml").write_text(CONFIG.format(steps=steps, seeds=list(range(1, seeds + 1))))
        return made

    expected, seconds = unharmed(folder("unharmed"))
    when = moments(kills, 2 * seeds * steps, chance)
    found, met = harmed(folder("harmed"), when)
    differing = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    return {
        "design": f"2 conditions x {seeds} seeds of {steps} steps, 2 at a time, 1 thread each",
        "unharmed_s": round(seconds, 1),
        "kills": met,
        "runs": expected,
        "differing": differing,
        "equal": not differing,
        "tasks_counted_twice": sum(int(run["tasks_twice"]) for run in found.values()),
        "machine": platform.machine(),
        "facts": facts(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="killed-") as root:
        record = measure(given.kills, given.seeds, given.steps, random.Random(given.seed), Path(root))
    text = json.dumps(record, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0 if record["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
