"""A Ray cluster of two nodes of one CPU each: one campaign runs on it, and of a second the worker node dies in the middle.

Usage: python two_nodes.py FOLDER FOLDER (each with a campaign.toml). Prints one JSON record per campaign.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_USAGE_STATS_PROMPT": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

import campaigns
from ray.cluster_utils import Cluster


def outcome(process, folder: Path) -> None:
    said, _ = process.communicate(timeout=240)
    directory = campaigns.campaign(folder)
    print(
        json.dumps(
            {
                "code": process.returncode,
                "said": said,
                "states": campaigns.states(directory),
                "steps": {name: campaigns.steps(directory, name) for name in campaigns.states(directory)},
                "processes": campaigns.rows(directory / "processes.jsonl"),
                "left": sorted(p.name for p in directory.iterdir() if p.name.startswith(".seen")),
            }
        ),
        flush=True,
    )


def main() -> None:
    whole, broken = map(Path, sys.argv[1:])
    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    args = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**args, "_system_config": quick})
    try:
        worker = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        words = ("campaign.toml", "--ray-address", cluster.address)
        outcome(campaigns.begin(whole, *words), whole)
        process = campaigns.begin(broken, *words)
        campaigns.wait_for(lambda: list((broken / "logs").glob("campaign_*")))
        directory = campaigns.campaign(broken)
        campaigns.wait_for(lambda: sum(len(campaigns.steps(directory, n)) > 1 for n in campaigns.states(directory)) == 2)
        cluster.remove_node(worker, allow_graceful=False)
        time.sleep(0.1)
        outcome(process, broken)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
