"""Runs training jobs in forked children of one process that has imported everything once; kills some of them.

Usage: python resume_jobs.py JOBS.json. Each job: {"config": {...}, "kill_at": completed steps or null}.
Prints one JSON line per job: {"status": exit status or -signal, "output": what it printed}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import peft  # noqa: F401
import torch
import transformers  # noqa: F401

from retrain.config.load import load
from retrain.errors import RetrainError
from retrain.runner import execute


def child(job: dict, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(job.get("threads", 1))
    status = 70
    try:
        execute(load(job["config"]))
        status = 0
    except RetrainError as error:
        print(error)
        status = error.exit_code
    finally:
        sys.stdout.flush()
        os._exit(status)


def rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return sum('"condition"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def main() -> None:
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        log = Path(sys.argv[1]).with_suffix(f".{number}.log")
        pid = os.fork()
        if pid == 0:
            child(job, log)
        run = Path(job["config"].get("resume", {}).get("from") or job["config"]["logging"]["log_dir"])
        killed = False
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if job.get("kill_at") and not killed and rows(run) > job["kill_at"]:
                os.kill(pid, signal.SIGKILL)
                killed = True
            time.sleep(0.005)
        print(
            json.dumps({"status": os.waitstatus_to_exitcode(status), "output": log.read_text()}), flush=True
        )


if __name__ == "__main__":
    main()
