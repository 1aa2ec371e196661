"""What a campaign's runs allow one to conclude: its conditions against the baseline, under what was declared beforehand.

The unit is the run (one condition, one seed). Pure functions of numbers: tests and verdicts come from procedure.py, what
stands beside them from sensitivity.py, what would have been visible from power.py. docs/statistics.md says why each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from retrain.campaign.power import attainable, detectable, equivalence_power, seeds_for, shortfalls, visible
from retrain.campaign.procedure import VERDICTS, Decided, Values, Verdict, decide, moments, t_critical
from retrain.campaign.reach import Reach, reach, reach_difference
from retrain.campaign.sensitivity import iqm, iqm_difference, sign_flip, skewed_and_unequal
from retrain.campaign.variance import VarianceSplit, split_variance

__all__ = [
    "Analysis",
    "Arm",
    "Comparison",
    "Design",
    "Reach",
    "VarianceSplit",
    "Verdict",
    "analyse",
    "attainable",
    "detectable",
    "equivalence_power",
    "reach",
    "reach_difference",
    "seeds_for",
    "shortfalls",
    "split_variance",
]


@dataclass(frozen=True, slots=True)
class Design:
    """What was fixed before the first run.

    ``alpha`` bounds the rate of false differences over all comparisons and looks, in (0, 1); each of ``looks`` is judged
    at ``alpha / looks``. ``margin`` is the smallest effect of interest, in the outcome's unit. ``paired`` takes the t test
    of differences seed by seed. ``at`` holds the numbers of seeds at which there is a look, rising, one for each of
    ``looks``; empty: all seeds, however many there are.
    """

    alpha: float = 0.05
    margin: float = 0.02
    paired: bool = False
    looks: int = 1
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or not self.margin > 0 or self.looks < 1:
            raise ValueError("alpha lies in (0, 1), the margin above 0, and there is at least one look.")
        if self.at and (len(self.at) != self.looks or sorted(set(self.at)) != list(self.at)):
            raise ValueError(f"at: {self.looks} rising numbers of seeds, not {self.at}.")

    @property
    def alpha_look(self) -> float:
        """The level of one look."""
        return self.alpha / self.looks


@dataclass(frozen=True, slots=True)
class Arm:
    """One condition's runs. ``values`` are in the order of the analysis' seeds, None where a run has no outcome yet; the
    other numbers are of those that have one (NaN where there are too few). ``low`` and ``high``: t interval of the mean at
    the level of a look; it describes this arm and decides nothing."""

    label: str
    n: int
    mean: float
    sd: float
    low: float
    high: float
    iqm: float
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A condition minus the baseline, in the outcome's unit; NaN and None where there is no test.

    ``low`` and ``high`` are the primary test's t interval of 1 - ``alpha_look``, uncorrected for other comparisons.
    ``p_equivalence`` belongs to the two one-sided tests. ``visible`` is the smallest true difference that is seen with
    80 % power at ``alpha_look`` / comparisons, from the deviations found. ``p_sign_flip`` (of differences by seed) with the
    least value it could take, ``iqm_*`` with a bootstrap interval, and ``skewed_and_unequal`` (a warning
    about all conditions together) never decide.
    """

    label: str
    baseline: str
    n: int
    n_baseline: int
    difference: float
    low: float
    high: float
    df: float
    p: float
    p_holm: float
    p_equivalence: float
    verdict: Verdict
    exploratory: bool
    text: str
    visible: float | None
    p_sign_flip: float
    p_sign_flip_least: float
    iqm_difference: float
    iqm_low: float
    iqm_high: float
    skewed_and_unequal: bool


@dataclass(frozen=True, slots=True)
class Analysis:
    """All comparisons at the last look that can be read.

    ``look`` counts from 1; 0: the runs of the first one are not all there. ``seeds`` are those that were used (at look 0
    all that were given, and only the arms have numbers). ``said_before``: (look, label, verdict) of earlier looks.
    """

    look: int
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]
    variance: VarianceSplit | None
    said_before: tuple[tuple[int, str, Verdict], ...]


Outcomes = Mapping[str, Mapping[int, float | None]]


def analyse(
    values: Outcomes,
    *,
    baseline: str,
    design: Design,
    exploratory: bool = False,
    evaluation: Outcomes | None = None,
) -> Analysis:
    """Judge every condition against ``baseline``.

    ``values[label][seed]`` is a run's primary outcome; None (or not finite): planned, and not there yet. Failed runs are
    the caller's to count. Seeds stand in the order in which they were declared. A look is read when all of its runs have
    an outcome, in every condition; with ``exploratory``, seeds were added to the declared ones, and once all are there
    they are used and every verdict says that it is exploratory. ``evaluation`` holds the sampling variances of the
    outcomes, for the split of their variance. ValueError for a baseline that is not among the conditions.
    """
    if baseline not in values:
        raise ValueError(f"the baseline {baseline!r} is none of {', '.join(values)}.")
    labels = (baseline, *(label for label in values if label != baseline))
    seeds = tuple(dict.fromkeys(seed for label in values for seed in values[label]))
    looks = [seeds[:count] for count in design.at or (len(seeds),) if count <= len(seeds)]
    readable = [used for used in looks if len(used) >= 2 and not _missing(values, used)]
    added = exploratory and len(seeds) >= 2 and not _missing(values, seeds)
    if not readable and not added:
        return _unreadable(values, labels, seeds, looks[0] if looks else (), design)
    said: list[tuple[int, str, Verdict]] = []
    for number, used in enumerate(readable if added and design.at else readable[:-1], start=1):
        told = _decide(values, labels, used, design)
        said.extend((number, label, _verdict(told, i)) for i, label in enumerate(labels[1:]))
    used = seeds if added else readable[-1]
    arms = {label: np.array([values[label][seed] for seed in used], np.float64) for label in labels}
    # One number of ``at`` is one look; without them there is a single reading of all seeds.
    look = len(readable) if design.at else design.looks
    comparisons = _compare(arms, _decide(values, labels, used, design), design, added)
    shown = tuple(values)
    return Analysis(
        look=look,
        seeds=used,
        arms=tuple(_arm(label, used, values, design) for label in shown),
        comparisons=tuple(sorted(comparisons, key=lambda each: shown.index(each.label))),
        warnings=tuple(_warnings(values, seeds, used, comparisons, design)),
        variance=split_variance(list(arms.values()), _mean_of(evaluation, labels, used)),
        said_before=tuple(said),
    )


def _missing(values: Outcomes, seeds: Sequence[int]) -> int:
    """How many of the runs with these seeds have no outcome."""
    return sum(not _known(arm.get(seed)) for arm in values.values() for seed in seeds)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _decide(values: Outcomes, labels: Sequence[str], seeds: Sequence[int], design: Design) -> Decided | None:
    arms = [np.array([values[label][seed] for seed in seeds], np.float64) for label in labels]
    return decide(arms, design.alpha_look, design.margin, by_seed=design.paired) if len(arms) > 1 else None


def _verdict(decided: Decided | None, index: int) -> Verdict:
    return VERDICTS[int(cast("Decided", decided).verdict[index])]


def _compare(
    arms: Mapping[str, Values], decided: Decided | None, design: Design, exploratory: bool
) -> list[Comparison]:
    if decided is None:
        return []
    (base, against), *others = arms.items()
    made: list[Comparison] = []
    tested = decided.tested
    suspect = bool(skewed_and_unequal(list(arms.values())))
    for i, (label, runs) in enumerate(others):
        error, df = float(tested.error[i]), float(tested.df[i])
        p_flip, least = sign_flip(runs - against) if len(runs) == len(against) else (math.nan, math.nan)
        middle, middle_low, middle_high = iqm_difference(runs, against, design.alpha_look)
        verdict = _verdict(decided, i)
        seen = None if math.isnan(df) else visible(error, df, design.alpha_look / len(others))
        made.append(
            Comparison(
                label=label,
                baseline=base,
                n=len(runs),
                n_baseline=len(against),
                difference=float(tested.difference[i]),
                low=float(tested.low[i]),
                high=float(tested.high[i]),
                df=df,
                p=float(tested.p[i]),
                p_holm=float(decided.p_holm[i]),
                p_equivalence=float(decided.p_equivalence[i]),
                verdict=verdict,
                exploratory=exploratory,
                text=f"{'exploratory: ' * exploratory}{_say(verdict, decided, i, runs, against, base, design, seen)}",
                visible=seen,
                p_sign_flip=p_flip,
                p_sign_flip_least=least,
                iqm_difference=middle,
                iqm_low=middle_low,
                iqm_high=middle_high,
                skewed_and_unequal=suspect,
            )
        )  # fmt: skip
    return made


def _say(
    verdict: Verdict,
    decided: Decided,
    i: int,
    runs: Values,
    against: Values,
    base: str,
    design: Design,
    seen: float | None,
) -> str:
    """The verdict in words, in points (hundredths of the outcome)."""
    tested = decided.tested
    difference, low, high = float(tested.difference[i]), float(tested.low[i]), float(tested.high[i])
    digits = _digits((high - low) / 2)
    if verdict == "identical":
        if np.ptp(runs) == 0:
            return f"identical: all {len(runs) + len(against)} runs of both conditions came to {_share(runs[0])}; no test."
        return f"identical: both conditions came to the same value for each of {len(runs)} seeds; no test."
    if verdict == "constant":
        where = (
            "runs of a condition do not differ at all"
            if not design.paired
            else "the difference is the same for every seed"
        )
        return (
            f"constant: {_signed(difference, digits)} points over {base}, but {where}, so there is no variance to test "
            "it against. Check that the seed reaches the run."
        )
    level = f"{100 * (1 - design.alpha_look):.3g} % interval"
    found = f"{_signed(difference, digits)} points over {base} ({level} {_signed(low, digits)} to {_signed(high, digits)}"
    p_holm = float(decided.p_holm[i])
    if verdict in ("improvement", "degradation"):
        return f"{verdict}: {found}; Holm p {_p(p_holm)})."
    margin = f"{100 * design.margin:.3g} points"
    if verdict == "equivalent":
        text = f"equivalent: {found}; equivalence p {_p(float(decided.p_equivalence[i]))}), inside the {margin} that matter."
        if p_holm <= design.alpha_look:
            side = "above" if difference > 0 else "below"
            text += f" It is reliably {side} the baseline (Holm p {_p(p_holm)}), by less than was declared to matter."
        return text
    return (
        f"not enough evidence: {found}; Holm p {_p(p_holm)}). A true difference of {100 * (seen or 0.0):.{digits}f} points "
        f"would have been seen with 80 % power; equivalence within {margin} is not shown either."
    )


def _digits(half: float) -> int:
    """Decimals of points with which half an interval has two significant digits, 1 to 4."""
    return 2 if not half > 0 else min(4, max(1, 1 - math.floor(math.log10(100 * half))))


def _signed(value: float, digits: int) -> str:
    return f"{100 * value:+.{digits}f}"


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _unreadable(
    values: Outcomes, labels: Sequence[str], seeds: tuple[int, ...], first: tuple[int, ...], design: Design
) -> Analysis:
    """Nothing can be judged yet: the runs that there are, and how many are lacking."""
    wanted = first or seeds
    planned, missing = len(labels) * len(wanted), _missing(values, wanted)
    if len(wanted) < 2:
        why = f"{len(wanted)} seed{'s' * (len(wanted) != 1)} a condition: no variance can be estimated."
    elif design.at and design.at[0] > len(seeds):
        why = f"{len(seeds)} of the {design.at[0]} seeds of the first look are there."
    else:
        why = f"{missing} of the {planned} planned runs {'has' if missing == 1 else 'have'} no outcome yet."
    nan = math.nan
    arms = {label: _arm(label, seeds, values, design) for label in values}
    comparisons = tuple(
        Comparison(
            label=label, baseline=labels[0], n=arms[label].n, n_baseline=arms[labels[0]].n, difference=nan, low=nan,
            high=nan, df=nan, p=nan, p_holm=nan, p_equivalence=nan, verdict="incomplete", exploratory=False,
            text=f"incomplete: {why} No verdict is read before.", visible=None, p_sign_flip=nan, p_sign_flip_least=nan,
            iqm_difference=nan, iqm_low=nan, iqm_high=nan, skewed_and_unequal=False,
        )
        for label in labels[1:]
    )  # fmt: skip
    return Analysis(0, seeds, tuple(arms.values()), comparisons, (f"Incomplete: {why}",), None, ())


def _arm(label: str, seeds: Sequence[int], values: Outcomes, design: Design) -> Arm:
    listed = [values[label].get(seed) for seed in seeds]
    there = np.array([value for value in listed if _known(value)], np.float64)
    n = len(there)
    mean = sd = half = math.nan
    if n:
        mean = float(there.mean())
    if n >= 2:
        exact, variance = moments(there)
        mean, sd = float(exact), math.sqrt(float(variance))
        half = float(t_critical(design.alpha_look / 2, float(n - 1))) * sd / math.sqrt(n)
    shown = tuple(value if _known(value) else None for value in listed)
    return Arm(label, n, mean, sd, mean - half, mean + half, iqm(there) if n else math.nan, shown)


def _mean_of(evaluation: Outcomes | None, labels: Sequence[str], seeds: Sequence[int]) -> float | None:
    """Mean of what is known; None where something is not."""
    if evaluation is None:
        return None
    found = [evaluation.get(label, {}).get(seed) for label in labels for seed in seeds]
    known = [value for value in found if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known and len(known) == len(found) else None


def _warnings(
    values: Outcomes,
    seeds: Sequence[int],
    used: Sequence[int],
    comparisons: Sequence[Comparison],
    design: Design,
) -> list[str]:
    found: list[str] = []
    if len(used) < len(seeds):
        missing = _missing(values, seeds)
        found.append(
            f"Judged on the first {len(used)} of {len(seeds)} seeds; of all planned runs {missing} "
            f"{'has' if missing == 1 else 'have'} no outcome yet."
        )
    if any(each.skewed_and_unequal for each in comparisons):
        found.append(
            "The runs look skewed, and the variances of the conditions differ: together they can raise the rate of false "
            "verdicts well above alpha. Look at the single runs before believing one; more seeds help."
        )
    if comparisons and any(each.exploratory for each in comparisons):
        found.append(
            "Seeds were added after results could be seen: these verdicts are exploratory, a new campaign confirms."
        )
    level = design.alpha_look / max(1, len(comparisons))
    least = attainable(len(used), paired=True)
    if comparisons and least > level:
        found.append(
            f"With {len(used)} seeds the exact sign-flip p cannot fall below {least:.3g}: beside a test at "
            f"{level:.3g} it can confirm nothing."
        )
    return found
