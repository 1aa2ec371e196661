"""Rows of a long study, kept where its run directories may not be: one line of JSON for each finished run of a campaign.

    python benches/study_rows.py collect CAMPAIGN_DIR ROWS.jsonl       adds the finished runs that are not in ROWS yet
    python benches/study_rows.py missing CAMPAIGN.toml ROWS.jsonl      the seeds that some condition has no row for
    python benches/study_rows.py judge CAMPAIGN.toml ROWS.jsonl        what the declared procedure says, as JSON

A study that spans several sittings, or several machines, starts the missing seeds with
``retrain CAMPAIGN.toml --seeds "$(... missing ...)"`` and collects again; ``judge`` refuses to say anything before the
declared seeds are complete in every condition.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrain.campaign import manifest, outcomes
from retrain.config import campaigns
from retrain.config.load import load
from retrain.tracking import layout


def rows(path: Path) -> list[dict[str, Any]]:
    """Every row of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def collect(directory: Path, path: Path) -> int:
    """Append the finished runs of a campaign that the file lacks; how many those were."""
    known = manifest.read(directory)
    have = {(row["condition"], row["seed"]) for row in rows(path)}
    added = 0
    with path.open("a", encoding="utf-8") as file:
        for found in outcomes.gather(directory, known):
            if found.state != "done" or (found.condition, found.seed) in have:
                continue
            run = Path(found.path)
            facts = json.loads((run / layout.RUN).read_text(encoding="utf-8")).get("facts", {})
            adapter = run / layout.ADAPTER / "adapter_model.safetensors"
            row = {
                "condition": found.condition, "seed": found.seed, "value": found.value,
                "curve": [list(point) for point in found.curve], "variance": found.variance, "reached": found.reached,
                "steps": found.step, "seconds": found.seconds, "tokens": found.tokens,
                "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest()[:16],
                "evaluation": str(known.declared.evaluation.get("digest", "")),
                "code": facts.get("code", ""), "torch": facts.get("torch", ""), "machine": facts.get("machine", ""),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            added += 1
    return added


def missing(config: Path, path: Path) -> list[int]:
    """Declared seeds that some condition has no row for."""
    loaded = load(config).config
    assert loaded.campaign is not None
    labels = [c.label for c in campaigns.conditions(loaded)]
    have = {(row["condition"], row["seed"]) for row in rows(path)}
    return [seed for seed in loaded.campaign.seeds if any((label, seed) not in have for label in labels)]


def values(found: list[dict[str, Any]]) -> dict[str, dict[int, float | None]]:
    """Outcome by condition and seed."""
    out: dict[str, dict[int, float | None]] = {}
    for row in found:
        out.setdefault(row["condition"], {})[row["seed"]] = row["value"]
    return out


def judge(config: Path, path: Path) -> Mapping[str, Any]:
    """The analysis that the configuration declares; SystemExit while runs are missing."""
    from retrain.campaign.statistics import Design, analyse

    left = missing(config, path)
    if left:
        raise SystemExit(f"{len(left)} seeds are not complete: no verdict is read before they are.")
    loaded = load(config).config
    campaign = loaded.campaign
    assert campaign is not None
    by = values(rows(path))
    ordered = {c.label: {s: by[c.label][s] for s in campaign.seeds} for c in campaigns.conditions(loaded)}
    design = Design(
        alpha=campaign.alpha, margin=campaign.smallest_effect, paired=campaign.test == "paired",
        looks=max(1, len(campaign.looks)),
    )  # fmt: skip
    return dataclasses.asdict(analyse(ordered, baseline=campaigns.baseline(loaded), design=design))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("collect", "missing", "judge"))
    parser.add_argument("source", type=Path)
    parser.add_argument("rows", type=Path)
    args = parser.parse_args()
    if args.what == "collect":
        print(f"{collect(args.source, args.rows)} rows added, {len(rows(args.rows))} in all", file=sys.stderr)
    elif args.what == "missing":
        print(json.dumps(missing(args.source, args.rows)))
    else:
        print(json.dumps(judge(args.source, args.rows), indent=1))


if __name__ == "__main__":
    main()
