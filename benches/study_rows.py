"""Rows of a long study, kept where its run directories may not be: one line of JSON for each run of a campaign that counts.

    python benches/study_rows.py collect CAMPAIGN_DIR ROWS.jsonl       adds the runs that count and are not in ROWS yet
    python benches/study_rows.py missing CAMPAIGN.toml ROWS.jsonl      the seeds that some condition has no row for
    python benches/study_rows.py judge CAMPAIGN.toml ROWS.jsonl        what the declared procedure says, as JSON

A study that spans several sittings, or several machines, starts the missing seeds with
``retrain CAMPAIGN.toml --seeds "$(... missing ...)"`` and collects again. A run that failed has a row as well, at its last
evaluation: a study that left such runs out, or tried them until they went well, would compare the survivors. ``judge``
refuses to say anything before the declared seeds are complete in every condition, and of rows that are no one study: two of
one condition and seed, tasks of more than one digest, another number of steps than the configuration's. It lists the states
of the code, versions of torch and machines, which a long study may have several of, each with its number of rows, and the
runs that broke off.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections import Counter
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
    """Append the runs of a campaign that count, done or failed, and that the file lacks; how many those were."""
    known = manifest.read(directory)
    have = {(row["condition"], row["seed"]) for row in rows(path)}
    added = 0
    with path.open("a", encoding="utf-8") as file:
        for found in outcomes.gather(directory, known):
            if found.state not in ("done", "failed") or found.value is None or (found.condition, found.seed) in have:
                continue
            run = Path(found.path)
            record = run / layout.RUN
            facts: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")).get("facts", {}) if record.exists() else {}
            adapter = run / layout.ADAPTER / "adapter_model.safetensors"
            row = {
                "condition": found.condition, "seed": found.seed, "state": found.state, "value": found.value,
                "curve": [list(point) for point in found.curve], "variance": found.variance, "reached": found.reached,
                "steps": found.step, "max_steps": known.declared.max_steps, "lost": found.lost,
                "error": found.error, "seconds": found.seconds, "tokens": found.tokens,
                "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest()[:16] if adapter.exists() else "",
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


def refuse(found: list[dict[str, Any]], max_steps: int) -> None:
    """SystemExit where rows are no one study."""
    twice = [key for key, n in Counter((row["condition"], row["seed"]) for row in found).items() if n > 1]
    if twice:
        raise SystemExit(f"{_named(twice)}: more than one row. Remove the one that is not of this study.")
    tasks = Counter(row.get("evaluation") or "none" for row in found)
    if len(tasks) > 1:
        told = ", ".join(f"{digest[:16]} ({n} rows)" for digest, n in tasks.items())
        raise SystemExit(f"the rows were evaluated on {len(tasks)} sets of tasks and cannot be compared: {told}.")
    # A run that broke off has fewer steps than it was meant to have, and rows of older versions only those they have.
    steps = {(row["condition"], row["seed"]): row.get("max_steps", row["steps"]) for row in found}
    steps |= {(row["condition"], row["seed"]): row["steps"] for row in found if row.get("state", "done") == "done"}
    other = [key for key, count in steps.items() if count != max_steps]
    if other:
        raise SystemExit(f"{_named(other)}: another number of steps than the {max_steps} of the configuration.")


def _named(keys: list[tuple[str, int]]) -> str:
    return ", ".join(f"{label}_s{seed}" for label, seed in keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def judge(config: Path, path: Path) -> Mapping[str, Any]:
    """The analysis that the configuration declares, with the ``code``, ``torch`` and ``machine`` of the rows and the runs that
    ``broke_off``; SystemExit while runs are missing, and where rows are no one study."""
    from retrain.campaign.statistics import Design, analyse

    left = missing(config, path)
    if left:
        raise SystemExit(f"{len(left)} seeds are not complete: no verdict is read before they are.")
    loaded = load(config).config
    campaign = loaded.campaign
    assert campaign is not None
    labels = [c.label for c in campaigns.conditions(loaded)]
    used = [row for row in rows(path) if row["condition"] in labels and row["seed"] in campaign.seeds]
    refuse(used, campaign.max_steps)
    by = values(used)
    ordered = {label: {s: by[label][s] for s in campaign.seeds} for label in labels}
    design = Design(
        alpha=campaign.alpha, margin=campaign.smallest_effect, paired=campaign.test == "paired",
        looks=max(1, len(campaign.looks)),
    )  # fmt: skip
    found = dataclasses.asdict(analyse(ordered, baseline=campaigns.baseline(loaded), design=design))
    kinds = {key: dict(Counter(str(row.get(key, "")) for row in used)) for key in ("code", "torch", "machine")}
    off = [f"{row['condition']}_s{row['seed']}" for row in used if row.get("state", "done") != "done"]
    return {**found, "rows": len(used), **kinds, "broke_off": off}


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
