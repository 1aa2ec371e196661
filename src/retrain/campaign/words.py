"""What a campaign's report says in words and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from retrain.campaign import findings as found
from retrain.campaign import manifest
from retrain.campaign.figures import Curves, band, shown_ends
from retrain.campaign.findings import Findings
from retrain.campaign.outcomes import counts
from retrain.campaign.statistics import Analysis, Verdict
from retrain.report.content import Fact, Table
from retrain.report.figures import number
from retrain.report.gather import clock
from retrain.report.parts import Item, Tone
from retrain.report.thinning import spark

_TONES: dict[Verdict, Tone] = {"improvement": "good", "degradation": "bad", "incomplete": "warn"}


def headline(campaign: Findings) -> tuple[Fact, ...]:
    """What was declared, how far it is, and what it took."""
    declared = campaign.declared
    states = counts(campaign.outcomes)
    done, planned = states.get("done", 0), len(campaign.outcomes)
    others = ", ".join(f"{n} {state}" for state, n in states.items() if state != "done")
    conditions, seeds = len(declared.conditions), len(campaign.manifest.seeds)
    seconds, tokens = total(run.seconds for run in campaign.outcomes), total(run.tokens for run in campaign.outcomes)
    return (
        Fact("Runs done", f"{done:,} of {planned:,}", others or "all done"),
        Fact("Design", f"{conditions} conditions x {seeds} seeds", f"{declared.max_steps:,} steps each"),
        Fact("Baseline", declared.baseline, "every other condition is compared with it"),
        Fact("Primary outcome", _outcome(campaign), outcome_note(campaign)),
        Fact(
            "Smallest effect of interest", f"{points(declared.smallest_effect, sign=False)} points",
            f"alpha {declared.alpha:g}, {test(campaign)}",
        ),
        Fact("Look", _look(campaign), _looks_note(campaign)),
        Fact("Time in runs", clock(seconds), f"{tokens:,.0f} tokens sampled" if tokens else ""),
        Fact("Where", str(campaign.directory.absolute()), f"declared {declared.created}"),
    )  # fmt: skip


def _look(campaign: Findings) -> str:
    number, looks = campaign.analysis.look, len(campaign.declared.looks)
    return f"{number} of {looks}" if number else f"none of {looks} yet"


def _looks_note(campaign: Findings) -> str:
    sizes = ", ".join(map(str, campaign.declared.looks))
    if len(campaign.declared.looks) == 1:
        return f"declared at {sizes} seeds"
    return f"declared at {sizes} seeds, each judged at alpha / {len(campaign.declared.looks)}"


def _outcome(campaign: Findings) -> str:
    return "Held-out accuracy" if campaign.declared.outcome == "eval/accuracy" else "Correct rate in training"


def outcome_note(campaign: Findings) -> str:
    """How a run's outcome is made from its evaluations."""
    rows = "evaluations" if campaign.declared.outcome == "eval/accuracy" else "steps"
    return f"mean over the {rows} of the last {manifest.LAST_SHARE:.0%} of steps"


def test(campaign: Findings) -> str:
    """The declared test."""
    others = len(campaign.declared.conditions) - 1
    kind = "paired t by seed" if campaign.declared.test == "paired" else "Welch t"
    return f"{kind}, Holm over {others} comparisons" if others > 1 else kind


def conclusion(campaign: Findings) -> str:
    """What the verdicts below rest on, or why there are none."""
    declared, analysis = campaign.declared, campaign.analysis
    seeds, ended, runs = campaign.awaited()
    if not campaign.is_readable:
        return (
            f"No verdict is read before {seeds} seeds of every condition are done ({ended} of {runs} runs are). "
            "What is shown until then describes single runs and conditions, and compares nothing."
        )
    told = f"Judged at look {analysis.look} of {len(declared.looks)}, on {len(analysis.seeds)} seeds of every condition."
    if analysis.look < len(declared.looks):
        told += f" The next declared look is at {seeds} seeds ({ended} of {runs} runs are done)."
    if len(declared.conditions) < 2:
        told += " One condition has nothing to be compared with: there is a mean, and no verdict."
    return told


def verdicts(analysis: Analysis) -> tuple[Item, ...]:
    """Every comparison with the baseline in words."""
    return tuple(Item(each.label, each.text, _TONES.get(each.verdict, "")) for each in analysis.comparisons)


def before(campaign: Findings) -> str:
    """What earlier looks said, "" where there were none."""
    told: dict[int, list[str]] = {}
    for look, label, verdict in campaign.analysis.said_before:
        told.setdefault(look, []).append(f"{label}: {verdict}")
    return " ".join(
        f"Look {look} ({campaign.declared.looks[look - 1]} seeds) had said {'; '.join(said)}." for look, said in told.items()
    )


def warnings(campaign: Findings) -> tuple[Item, ...]:
    """What a reader must know before believing the rest."""
    return tuple(Item("Warning", text, "warn") for text in campaign.warnings)


def comparisons(analysis: Analysis, level: float) -> Table:
    """The numbers behind each verdict."""
    arms = {arm.label: arm for arm in analysis.arms}
    rows: list[tuple[str, ...]] = []
    for each in analysis.comparisons:
        arm = arms[each.label]
        rows.append((
            each.label, str(each.n), _share(arm.mean), points(each.difference), _ends(each.low, each.high), _p(each.p),
            _p(each.p_holm), _p(each.p_equivalence), each.verdict,
            "n/a" if each.visible is None else points(each.visible, sign=False),
        ))  # fmt: skip
    for arm in analysis.arms:
        if all(each.label != arm.label for each in analysis.comparisons):
            rows.insert(0, (arm.label, str(arm.n), _share(arm.mean), *["baseline"], *["n/a"] * 4, "n/a", "n/a"))
    columns = (
        "Condition", "Runs", "Mean", "Difference, points", f"{100 * level:.4g} % interval", "p", "Holm p", "Equivalence p",
        "Verdict", "Visible, points",
    )  # fmt: skip
    note = (
        "Intervals belong to the primary test and are not widened for the number of comparisons; Holm p is. A verdict of a "
        "difference needs a Holm p, one of equivalence an equivalence p, at or below the look's alpha. Visible: the smallest "
        "true difference that this campaign would have seen with 80 % power, from its own deviations."
    )
    return Table(columns, tuple(rows), frozenset({1, 2, 3, 4, 5, 6, 7, 9}), note)


def sensitivity(analysis: Analysis, level: float) -> Table:
    """Other ways to look at the same differences."""
    rows = tuple(
        (
            each.label, _p(each.p_sign_flip), _p(each.p_sign_flip_least), points(each.iqm_difference),
            _ends(each.iqm_low, each.iqm_high), "yes" if each.skewed_and_unequal else "no",
        )
        for each in analysis.comparisons
    )  # fmt: skip
    columns = (
        "Condition", "Sign-flip p", "Least p that flips allow", "IQM difference, points",
        f"{100 * level:.4g} % bootstrap interval", "Skewed and unequal",
    )  # fmt: skip
    note = (
        "Sensitivity: none of this decides. The sign-flip p flips the differences by seed; the least that it can be is 2 / 2^k "
        "with k seeds at which the two conditions differ, as a difference of 0 has no sign. IQM: mean of the middle half of the "
        "runs; its bootstrap interval is too narrow for few runs. Skewed and unequal: whether the runs of all conditions "
        "together are lopsided and unequally spread, beyond what chance does in normal ones; only both at once mislead the t "
        "test."
    )
    return Table(columns, rows, frozenset({1, 2, 3, 4}), note)


def arms(analysis: Analysis, level: float) -> Table:
    """Every condition by itself."""
    rows = tuple(
        (
            arm.label, str(arm.n), _share(arm.mean), share_interval(arm.low, arm.high), points(arm.sd, sign=False),
            _share(arm.iqm), *(_share(v) for v in _extremes(arm.values)),
        )
        for arm in analysis.arms
    )  # fmt: skip
    columns = (
        "Condition", "Runs", "Mean", f"{100 * level:.4g} % interval", "Deviation, points", "IQM", "Lowest", "Highest",
    )  # fmt: skip
    return Table(columns, rows, frozenset(range(1, 8)))


def metrics(campaign: Findings) -> Table:
    """Other metrics by condition, without verdicts."""
    rows: list[tuple[str, ...]] = []
    for each in found.metrics(campaign):
        share = each.unit == "share"
        unit = f", {each.unit}" if each.unit and not share else ""
        ends = shown_ends(each.low, each.high, each.unit)
        middle = "n/a" if math.isnan(sum(ends)) else " to ".join(number(v, share=share) for v in ends)
        rows.append((
            each.title + unit, each.condition, str(each.n), number(each.mean, share=share), middle,
            *_change(each.difference, each.difference_low, each.difference_high, share=share),
        ))  # fmt: skip
    columns = ("Metric", "Condition", "Runs", "Mean", "95 % interval", "Minus baseline", "95 % interval of it")
    note = (
        "Nothing was declared for these: intervals of single metrics, no verdict, and with so many some lie beside 0 by chance. "
        "Means over the last fifth of a run's steps; a run that broke off stays in with its own last ones. Metrics that were the "
        "same in all runs are left out."
    )
    return Table(columns, tuple(rows), frozenset({2, 3, 4, 5, 6}), note if rows else "")


def _change(difference: float, low: float, high: float, *, share: bool) -> tuple[str, str]:
    if math.isnan(difference):
        return "", ""
    if share:
        return f"{points(difference)} points", _ends(low, high)
    middle, *ends = (f"{'+' if v > 0 else ''}{number(v)}" for v in (difference, low, high))
    return middle, "n/a" if math.isnan(low + high) else " to ".join(ends)


def pairs(campaign: Findings) -> Table:
    """Differences of the outcome between conditions of which neither is the baseline."""
    rows = tuple(
        (f"{one} minus {other}", points(difference), _ends(low, high))
        for one, other, difference, low, high in found.pairs(campaign)
    )
    note = "Only the comparisons with the baseline were declared: these have an interval and no verdict."
    return Table(("Pair", "Difference, points", "95 % interval"), rows, frozenset({1, 2}), note if rows else "")


def variance(campaign: Findings) -> tuple[Table | None, str]:
    """Where the spread of the outcome comes from, and which to buy more of."""
    split = campaign.analysis.variance
    if split is None:
        return None, "The variance is not split: nothing varies, or the evaluations' own sampling variance is not known."
    rows = (
        ("All, over seeds within conditions", points(math.sqrt(split.total), sign=False), "100 %"),
        ("Evaluation, at most", points(math.sqrt(split.evaluation), sign=False), f"{split.share:.0%}"),
        ("Training seeds, at least", points(math.sqrt(split.seed), sign=False), f"{1 - split.share:.0%}"),
    )
    note = (
        f"95 % interval of the deviation over seeds: {points(math.sqrt(split.low), sign=False)} to "
        f"{points(math.sqrt(split.high), sign=False)} points."
    )
    return Table(("Part", "Deviation, points", "Share of the variance"), rows, frozenset({1, 2}), note), split.advice


def threshold(campaign: Findings) -> Table:
    """Steps until the threshold, censored where it was not reached."""
    rows = tuple(
        (
            label, f"{each.reached} of {each.n}", str(each.n - each.reached - each.broke_off), str(each.broke_off),
            "not reached by half" if each.median is None else f"{each.median:,}", number(each.mean),
            "n/a" if math.isnan(each.low + each.high) else f"{number(each.low)} to {number(each.high)}",
        )
        for label, each in found.reaches(campaign).items()
    )  # fmt: skip
    level = campaign.declared.threshold
    columns = (
        "Condition", "Reached", "Not by the end", "Broke off before", "Median steps", "Mean steps, up to the end",
        "95 % interval",
    )  # fmt: skip
    note = (
        f"Completed steps at the first evaluation at or above {level:.1%}. Runs that did not reach it are censored, not dropped: "
        f"the median is Kaplan and Meier's, and the mean counts them with all {campaign.declared.max_steps:,} steps. No verdict."
        if level is not None
        else ""
    )
    return Table(columns, rows, frozenset(range(1, 7)), note if rows else "")


def sparks(metric: Curves, share: bool) -> Table:
    """A metric's means over seeds in characters, for where there are no plots."""
    rows: list[tuple[str, ...]] = []
    for label, values in metric.values.items():
        if not len(values) or np.isnan(values).all():
            continue
        mean, low, high, _ = band(values)
        known = np.flatnonzero(~np.isnan(mean))
        last = int(known[-1])
        text = [number(float(mean[i]), share=share) for i in (known[0], last)]
        ends = float(low[last]), float(high[last])
        ends = shown_ends(*ends, metric.unit)
        spread = "n/a" if math.isnan(sum(ends)) else " to ".join(number(v, share=share) for v in ends)
        rows.append((label, *text, spread, spark(mean)))
    columns = ("Condition", "First", "Last", "95 % interval", "Over the steps")
    return Table(columns, tuple(rows), frozenset({1, 2, 3}))


def _extremes(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (math.nan, math.nan)


def total(values: Iterable[float | None]) -> float:
    """Sum of what is known."""
    return sum(value for value in values if value is not None)


def _share(value: float) -> str:
    return number(value, share=True)


def share_interval(low: float, high: float) -> str:
    """Ends of the interval of a share, as far as a share goes."""
    low, high = shown_ends(low, high, "share")
    return "n/a" if math.isnan(low + high) else f"{low:.1%} to {high:.1%}"


def points(value: float, *, sign: bool = True) -> str:
    """A difference of shares in points; two significant decimals are enough for what seeds can tell."""
    if math.isnan(value):
        return "n/a"
    return f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}".rstrip("0").rstrip(".")


def _ends(low: float, high: float) -> str:
    return "n/a" if math.isnan(low + high) else f"{points(low)} to {points(high)}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "n/a"
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"
