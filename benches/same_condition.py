"""An A/A test of the verdicts on real runs: many runs of one condition, dealt out to made-up conditions again and again.

    retrain benches/same_condition.toml                                   256 runs of 40 steps, two at a time
    python benches/study_rows.py collect CAMPAIGN_DIR benches/results/same_condition.jsonl
    python benches/same_condition.py --out benches/results/same_condition.json

Every run came from the same condition, so that each difference found is a false one. One deal gives all runs to campaigns
of 5 conditions x 8 seeds without putting any back; the product's own procedure judges each campaign. The rate of campaigns
with a false difference must not lie above what was declared (5 %) by more than its own uncertainty: an interval by the
bootstrap over runs, because the deals of one set of runs are not independent.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from retrain.campaign.procedure import VERDICTS, decide

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benches" / "results" / "same_condition.jsonl"
ALPHA, MARGIN = 0.05, 0.02

Values = npt.NDArray[np.float64]


def deals(values: Values, conditions: int, seeds: int, count: int, rng: np.random.Generator) -> Values:
    """[count * campaigns, conditions, seeds]: every deal splits all runs into as many campaigns as they fill."""
    size = conditions * seeds
    campaigns = len(values) // size
    orders = rng.permuted(np.tile(np.arange(len(values)), (count, 1)), axis=1)[:, : campaigns * size]
    return values[orders].reshape(count * campaigns, conditions, seeds)


def rates(dealt: Values, *, by_seed: bool = False) -> dict[str, float]:
    """Share of campaigns with any improvement, any degradation, either; and of comparisons called equivalent."""
    decided = decide([dealt[:, i] for i in range(dealt.shape[1])], ALPHA, MARGIN, by_seed=by_seed)
    named = {name: decided.verdict == VERDICTS.index(name) for name in VERDICTS}
    false = named["improvement"] | named["degradation"]
    return {
        "improvement": float(named["improvement"].any(axis=1).mean()),
        "degradation": float(named["degradation"].any(axis=1).mean()),
        "either": float(false.any(axis=1).mean()),
        "equivalent": float(named["equivalent"].mean()),
        "covered": float(((decided.tested.low <= 0) & (decided.tested.high >= 0)).mean()),
    }


def judge(values: Values, *, conditions: int, seeds: int, count: int, resamples: int, seed: int) -> dict[str, Any]:
    """Rates over ``count`` deals, with 95 % intervals over ``resamples`` bootstrap sets of runs of ``count // 10`` deals.

    A resampled set holds runs twice, which ties values and narrows nothing: the interval is about the runs that happened to
    be there, not about the deals.
    """
    rng = np.random.default_rng(seed)
    found = rates(deals(values, conditions, seeds, count, rng))
    again = [
        rates(deals(rng.choice(values, len(values)), conditions, seeds, max(20, count // 10), rng))
        for _ in range(resamples)
    ]
    interval = {key: [float(q) for q in np.quantile([a[key] for a in again], (0.025, 0.975))] for key in found}
    campaigns = len(values) // (conditions * seeds)
    # As if only the runs of one deal were independent: the widest honest view.
    one_deal = stats.binomtest(round(found["either"] * campaigns), campaigns).proportion_ci(0.95, "exact")
    return {
        "conditions": conditions, "seeds": seeds, "deals": count, "campaigns": count * campaigns, "rates": found,
        "intervals": interval, "one_deal": [float(one_deal.low), float(one_deal.high)],
    }  # fmt: skip


def holds(record: dict[str, Any]) -> bool:
    """Is the rate of campaigns with a false difference at most what was declared, within its interval?"""
    return record["intervals"]["either"][0] <= ALPHA


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--deals", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    values = np.array([row["value"] for row in sorted(found, key=lambda row: row["seed"])], np.float64)
    designs = [
        judge(values, conditions=conditions, seeds=seeds, count=args.deals, resamples=args.resamples, seed=0)
        for conditions, seeds in ((5, 8), (2, 8), (5, 16), (2, 4))
    ]
    record = {
        "runs": len(values), "mean": float(values.mean()), "deviation": float(values.std(ddof=1)),
        "skewness": float(stats.skew(values)), "evaluation_deviation": math.sqrt(float(np.mean([r["variance"] for r in found]))),
        "alpha": ALPHA, "designs": designs, "holds": all(map(holds, designs)),
        "code": sorted({row["code"] for row in found}), "torch": sorted({row["torch"] for row in found}),
        "machine": sorted({row["machine"] for row in found}),
    }  # fmt: skip
    text = json.dumps(record, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(0 if record["holds"] else 1)


if __name__ == "__main__":
    main()
