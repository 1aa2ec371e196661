"""A Ray cluster of one CPU that something else uses: a campaign waits for it, begins, and loses a worker; and one that asks
for more than any node has is stopped while it waits.

Usage: python busy_cluster.py FOLDER FOLDER (each with a campaign.toml). Prints one JSON record.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_USAGE_STATS_PROMPT": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

import campaigns
import ray
from ray.cluster_utils import Cluster


def said(folder: Path) -> str:
    """What the campaign in ``folder`` has printed by now."""
    return "".join(path.read_text() for path in (folder / "logs").glob("campaign_*/events.log"))


def workers() -> list[int]:
    """Processes in which a task of a campaign goes on."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            ours = path.read_bytes().startswith(b"ray::attend")
            environment = (path.parent / "environ").read_bytes() if ours else b""
        except OSError:
            continue
        if os.environ["RAY_TMPDIR"].encode() in environment:
            found.append(int(path.parent.name))
    return found


def main() -> None:
    busy, large = map(Path, sys.argv[1:])
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}
    )
    sign = Path(tempfile.mkdtemp(dir=os.environ["RAY_TMPDIR"])) / "free"
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

        @ray.remote(num_cpus=1)
        def other() -> None:
            while not sign.exists():
                time.sleep(0.1)

        other.remote()
        campaigns.wait_for(lambda: ray.available_resources().get("CPU", 0.0) == 0.0)
        words = ("campaign.toml", "--ray-address", cluster.address)
        process = campaigns.begin(large, *words)
        campaigns.wait_for(lambda: "waiting up to" in said(large))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        stopped = process.returncode
        process = campaigns.begin(busy, *words)
        campaigns.wait_for(lambda: "wait in Ray's queue" in said(busy) or "waits in Ray's queue" in said(busy))
        early = said(busy)
        sign.touch()
        directory = campaigns.campaign(busy)
        campaigns.wait_for(lambda: any(len(campaigns.steps(directory, name)) > 1 for name in campaigns.states(directory)))
        (worker,) = workers()
        os.kill(worker, signal.SIGKILL)
        process.communicate(timeout=240)
        record = {
            "stopped": stopped, "large": said(large), "early": early, "busy": said(busy), "code": process.returncode,
            "states": campaigns.states(directory), "processes": campaigns.rows(directory / "processes.jsonl"),
            "steps": {name: campaigns.steps(directory, name) for name in campaigns.states(directory)},
        }  # fmt: skip
        print(json.dumps(record), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
