"""Error rates of a campaign's verdicts, simulated: campaigns without any effect, with one, and with one at the margin.

    python benches/null_campaigns.py [--campaigns 10000] [--seed 0] [--out benches/results/null_campaigns.json] [--page]

Every simulated campaign goes through the product's own ``retrain.campaign.procedure.decide``. Exit status 1 when a bar is
missed. ``--page`` writes the tables of docs/statistics.md from the stored results instead of simulating.

docs/statistics.md says which distributions were fixed before the first figure was seen. Outcomes are accuracies around
0.5 with a deviation of 2 points over seeds; 5 conditions of 8 runs. "skewed": errors from a gamma distribution of shape 1
(skewness 2), the upper end of what accuracies of runs that mostly work show; "collapsed": each run loses 30 points with
probability 0.1; "unequal": deviations of the arms from 1 to 4 points, with the baseline among the quiet ones, and once
the noisy one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from retrain.campaign.power import detectable
from retrain.campaign.procedure import VERDICTS, decide, moments, t_critical
from retrain.campaign.sensitivity import iqm_difference, skewed_and_unequal

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benches" / "results" / "null_campaigns.json"
PAGE = ROOT / "docs" / "statistics.md"

Values = npt.NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, ...]], Values]

CONDITIONS, SEEDS = 5, 8
ALPHA, MARGIN = 0.05, 0.02
CENTRE, DEVIATION = 0.5, 0.02
QUIET = (0.5, 0.5, 1.0, 1.5, 2.0)
NOISY = (2.0, 0.5, 0.5, 1.0, 1.0)
LOOKS = {2: (4, 8), 3: (3, 5, 8)}


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Mean 0, deviation 1."""
    return rng.standard_normal(shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Mean 0, deviation 1, skewness -2: most runs a little above the mean, some far below."""
    return 1.0 - rng.gamma(1.0, 1.0, shape)


def mildly_skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Mean 0, deviation 1, skewness -1."""
    return (4.0 - rng.gamma(4.0, 1.0, shape)) / 2.0


def lognormal(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Mean 0, deviation 1, skewness -6.2: beyond anything that a bar is set for."""
    return (math.exp(0.5) - np.exp(rng.standard_normal(shape))) / math.sqrt((math.e - 1) * math.e)


def collapsed(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """A normal run that with probability 0.1 loses 15 deviations; its mean is 0."""
    return rng.standard_normal(shape) - 15.0 * (rng.random(shape) < 0.1) + 1.5


Scenario = tuple[str, Noise, Sequence[float]]
SCENARIOS: tuple[Scenario, ...] = (
    ("normal", normal, (1.0,) * 5),
    ("skewed", skewed, (1.0,) * 5),
    ("unequal variances", normal, QUIET),
    ("unequal variances, noisy baseline", normal, NOISY),
    ("10 % collapsed runs", collapsed, (1.0,) * 5),
    ("mildly skewed", mildly_skewed, (1.0,) * 5),
    ("mildly skewed and unequal", mildly_skewed, QUIET),
    ("skewed and unequal", skewed, QUIET),
    ("skewed and unequal, noisy baseline", skewed, NOISY),
    ("log-normal", lognormal, (1.0,) * 5),
    ("log-normal and unequal", lognormal, QUIET),
)
BARRED = 5
"""The first so many scenarios depart from the assumptions in one way at most, and have bars."""


def draw(
    rng: np.random.Generator, noise: Noise, scales: Sequence[float], campaigns: int, seeds: int = SEEDS
) -> list[Values]:
    """Campaigns without any effect: an array [campaigns, seeds] for every condition, the baseline first."""
    return [CENTRE + DEVIATION * scale * noise(rng, (campaigns, seeds)) for scale in scales]


def rate(hits: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Share of the hits with its 95 % interval (Clopper and Pearson)."""
    found = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(0.95)
    return {"rate": float(hits.mean()), "low": float(found.low), "high": float(found.high)}


def null(rng: np.random.Generator, scenario: Scenario, campaigns: int) -> dict[str, Any]:
    """Rates of false verdicts and coverage where there is no difference."""
    _, noise, scales = scenario
    arms = draw(rng, noise, scales, campaigns)
    got = decide(arms, ALPHA, MARGIN, by_seed=False)
    significant = got.p_holm <= ALPHA
    inside = (got.tested.low <= 0) & (got.tested.high >= 0)
    own: list[float] = []
    for arm in arms:
        mean, variance = moments(arm)
        half = t_critical(ALPHA / 2, float(SEEDS - 1)) * np.sqrt(variance / SEEDS)
        own.append(float((np.abs(mean - CENTRE) <= half).mean()))
    warned = skewed_and_unequal(arms)
    false = significant.any(-1)
    record: dict[str, Any] = {
        "improvement": rate(got.improvement.any(-1)),
        "improvement_before_equivalence": rate((significant & (got.tested.difference > 0)).any(-1)),
        "either_direction": rate(false),
        "coverage": [float(column.mean()) for column in np.moveaxis(inside, -1, 0)],
        "coverage_of_an_arms_own_interval": own,
        "warned": float(warned.mean()),
        "warned_among_false": float(warned[false].mean()) if false.any() else None,
    }
    for count, at in LOOKS.items():
        said = np.zeros(campaigns, np.bool_)
        for n in at:
            said |= decide(
                [arm[:, :n] for arm in arms], ALPHA / count, MARGIN, by_seed=False
            ).improvement.any(-1)
        record[f"improvement_over_{count}_looks"] = rate(said)
    return record


def paired(rng: np.random.Generator, campaigns: int) -> dict[str, Any]:
    """The paired design: half of the variance is the seed's, shared by all conditions."""
    shared = DEVIATION * math.sqrt(0.5) * rng.standard_normal((campaigns, SEEDS))
    arms = [
        CENTRE + shared + DEVIATION * math.sqrt(0.5) * normal(rng, shared.shape) for _ in range(CONDITIONS)
    ]
    got, plain = (decide(arms, ALPHA, MARGIN, by_seed=by_seed) for by_seed in (True, False))
    inside = (got.tested.low <= 0) & (got.tested.high >= 0)
    return {
        "improvement": rate(got.improvement.any(-1)),
        "improvement_by_welch": rate(plain.improvement.any(-1)),
        "coverage": [float(column.mean()) for column in np.moveaxis(inside, -1, 0)],
    }


def power(rng: np.random.Generator, noise: Noise, campaigns: int) -> dict[str, float]:
    """Share of improvements of one arm that is better by what the design is said to detect with 80 % power."""
    arms = draw(rng, noise, (1.0,) * CONDITIONS, campaigns)
    effect = detectable(DEVIATION, SEEDS, ALPHA / (CONDITIONS - 1))
    got = decide([*arms[:2], arms[2] + effect, *arms[3:]], ALPHA, MARGIN, by_seed=False)
    return {**rate(got.improvement[:, 1]), "effect": effect}


def at_the_margin(rng: np.random.Generator, noise: Noise, scale: float, campaigns: int) -> dict[str, float]:
    """Share of "equivalent" where the true difference is the smallest effect of interest."""
    base, arm = draw(rng, noise, (scale, scale), campaigns)
    got = decide([base, arm + MARGIN], ALPHA, MARGIN, by_seed=False)
    return rate(got.verdict[:, 0] == VERDICTS.index("equivalent"))


def bootstrap_coverage(rng: np.random.Generator, noise: Noise, pairs: int) -> dict[str, float]:
    """How often the interval of the IQM's difference holds 0."""
    hits = np.zeros(pairs, np.bool_)
    for i in range(pairs):
        a, b = draw(rng, noise, (1.0, 1.0), 1)
        _, low, high = iqm_difference(a[0], b[0], ALPHA, draws=2000, seed=i)
        hits[i] = low <= 0 <= high
    return rate(hits)


def simulate(campaigns: int, seed: int) -> dict[str, Any]:
    """Everything; each part has a generator of its own, so that one can be added without changing the others."""

    def rng(part: int) -> np.random.Generator:
        return np.random.default_rng([seed, part])

    record: dict[str, Any] = {
        "campaigns": campaigns,
        "seed": seed,
        "design": {
            "conditions": CONDITIONS,
            "seeds": SEEDS,
            "alpha": ALPHA,
            "margin": MARGIN,
            "deviation": DEVIATION,
        },
        "null": {each[0]: null(rng(i), each, campaigns) for i, each in enumerate(SCENARIOS)},
        "skewed_and_unequal_by_seeds": {
            str(count): rate(
                decide(
                    draw(rng(500 + count), skewed, QUIET, campaigns, count),
                    ALPHA,
                    MARGIN / 100,
                    by_seed=False,
                ).improvement.any(-1)
            )
            for count in (8, 16, 32, 64)
        },
        "paired": paired(rng(100), campaigns),
        "power": {
            name: power(rng(200 + i), noise, campaigns)
            for i, (name, noise, _) in enumerate((SCENARIOS[0], SCENARIOS[1], SCENARIOS[4]))
        },
        "equivalent_at_the_margin": {
            f"{name}, deviation {100 * DEVIATION * scale:.2g} points": at_the_margin(
                rng(300 + i), noise, scale, 4 * campaigns
            )
            for i, (name, noise, scale) in enumerate(
                (
                    ("normal", normal, 0.25),
                    ("normal", normal, 0.5),
                    ("normal", normal, 1.0),
                    ("skewed", skewed, 0.25),
                    ("skewed", skewed, 0.5),
                )
            )
        },
        "bootstrap_coverage": {
            name: bootstrap_coverage(rng(400 + i), noise, max(50, campaigns // 5))
            for i, (name, noise, _) in enumerate((SCENARIOS[0], SCENARIOS[1]))
        },
    }
    record["bars"] = bars(record)
    return record


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold, what was found, and whether it does."""
    made: list[dict[str, Any]] = []

    def hold(what: str, found: float, least: float, most: float) -> None:
        made.append(
            {"what": what, "found": found, "least": least, "most": most, "holds": least <= found <= most}
        )

    for name, noise, _ in SCENARIOS[:BARRED]:
        got = record["null"][name]
        hold(f"{name}: improvement, upper end", got["improvement_before_equivalence"]["high"], 0, 0.055)
        for count in LOOKS:
            hold(
                f"{name}: improvement over {count} looks, upper end",
                got[f"improvement_over_{count}_looks"]["high"],
                0,
                0.055,
            )
        hold(f"{name}: least coverage of a comparison", min(got["coverage"]), 0.93, 1.0)
        hold(
            f"{name}: most coverage of a comparison",
            max(got["coverage"]),
            0.93,
            0.97 if noise is normal else 1.0,
        )
    hold("paired: improvement, upper end", record["paired"]["improvement"]["high"], 0, 0.055)
    hold("power of a detectable effect", record["power"]["normal"]["rate"], 0.75, 0.85)
    for name, got in record["equivalent_at_the_margin"].items():
        if name.startswith("normal"):
            hold(f"equivalent at the margin: {name}", got["rate"], 0, 0.055)
    return made


def tables(record: dict[str, Any]) -> str:
    """The Markdown of docs/statistics.md that quotes the results."""
    rows = [
        "| runs | improvement (upper end) | over 2 looks | over 3 looks | either direction | coverage |",
        "|---|---|---|---|---|---|",
    ]
    for name, got in record["null"].items():
        found = got["improvement_before_equivalence"]
        rows.append(
            f"| {name} | {found['rate']:.2%} ({found['high']:.2%}) | {got['improvement_over_2_looks']['rate']:.2%} | "
            f"{got['improvement_over_3_looks']['rate']:.2%} | {got['either_direction']['rate']:.2%} | "
            f"{min(got['coverage']):.1%} to {max(got['coverage']):.1%} |"
        )
    rows += [
        "",
        "| runs | warned | warned where a verdict is false | an arm's own interval covers |",
        "|---|---|---|---|",
    ]
    for name, got in record["null"].items():
        own = got["coverage_of_an_arms_own_interval"]
        rows.append(
            f"| {name} | {got['warned']:.0%} | {got['warned_among_false']:.0%} | "
            f"{min(own):.1%} to {max(own):.1%} |"
        )
    rows += ["", "| | found | 95 % interval |", "|---|---|---|"]

    def line(what: str, got: dict[str, float]) -> None:
        rows.append(f"| {what} | {got['rate']:.2%} | {got['low']:.2%} to {got['high']:.2%} |")

    for name, got in record["power"].items():
        line(f"power, one arm better by {100 * got['effect']:.2f} points: {name}", got)
    for name, got in record["equivalent_at_the_margin"].items():
        line(f'"equivalent" at the margin: {name}', got)
    line("paired t, half of the variance shared by seed: improvement", record["paired"]["improvement"])
    line("the same campaigns by Welch's t: improvement", record["paired"]["improvement_by_welch"])
    for count, got in record["skewed_and_unequal_by_seeds"].items():
        line(f"skewed and unequal, {count} seeds: improvement", got)
    for name, got in record["bootstrap_coverage"].items():
        line(f"coverage of the IQM's bootstrap interval: {name}", got)
    return "\n".join(rows) + "\n"


BLOCK = re.compile(r"(?<=<!-- rates -->\n).*?(?=<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--campaigns", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if args.page:
        made = tables(json.loads(STORED.read_text()))
        PAGE.write_text(BLOCK.sub(lambda _: made, PAGE.read_text()))
        return 0
    start = time.process_time()
    record = simulate(args.campaigns, args.seed)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))
    for bar in record["bars"]:
        print(
            f"{'holds ' if bar['holds'] else 'MISSED'} {bar['what']}: {bar['found']:.4f} in [{bar['least']}, {bar['most']}]"
        )
    print(f"{time.process_time() - start:.0f} s of CPU time")
    return 0 if all(bar["holds"] for bar in record["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
