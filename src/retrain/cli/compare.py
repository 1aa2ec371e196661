"""``retrain diff``, ``why`` and ``replay``: what differs, what a step did, and what another algorithm would have done."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from retrain.cli import streams
from retrain.cli.verb import at_once_on_interrupt, own_flags, quiet_loading
from retrain.errors import UsageError

if TYPE_CHECKING:
    from retrain.replay.credit import Replay
    from retrain.replay.differences import StepComparison
    from retrain.replay.gradients import Regradient

USAGE = {
    "diff": """\
Usage: retrain diff A B [--json]

What differs between A and B: settings with their origins, code and versions, data, results, and the first step in which
two runs part. A and B are run directories, TOML files, or folders of runs. Nothing is written.

  --json    print one JSON object
""",
    "why": """\
Usage: retrain why RUN STEP [--json]

What a step of a run did: which groups trained, which were dropped and why, rewards and lengths, the tokens with the
largest credit, the update, alarms, and the checkpoints around it. STEP counts from 0; last is the last one.

  --json    print one JSON object
""",
    "replay": """\
Usage: retrain replay RUN [--steps A..B] [--flag value ...] [--learner] [--json]

Computes the credit of a run's stored rollouts under another algorithm, without a model or an engine, and compares it
with the run's own. Without a flag the run's own algorithm is replayed: its credit must come back bit for bit.

  --steps A..B              0-based, both included; also A, A.. and ..B (default: every stored step)
  --advantage-mode M --transform-mode M --algorithm-mode M --uncertainty-kind K
  --beta B --alpha A --sepa-steps N ...     any setting of [algorithm], [gtpo], [hicra], [sepa] and [planning],
                            logging.strategic_grams, reward.correct_at and training.truncated
  --learner                 with the run's own algorithm: also compute the gradient of every step that begins at a
                            checkpoint, and compare it with the recorded hash (loads the model)
  --json                    print one JSON object
Exit status 1 when the run's own credit or gradient does not come back.
""",
}

_ROWS = 20
_WIDTH = 100


def diff(arguments: Sequence[str]) -> int:
    """The command ``diff``."""
    own, rest = own_flags("diff", arguments, values=(), switches=("--json",))
    a, b = _positionals("diff", rest, ("A", "B"), "retrain diff logs/first logs/second")
    with streams.results(alone="--json" in own) as out, quiet_loading(), at_once_on_interrupt():
        from retrain.comparison.difference import Side, difference
        from retrain.tracking.run_log import to_json

        record = difference(Side.of(a), Side.of(b))
        if "--json" in own:
            out.record(to_json(record))
        else:
            out.line("\n".join(_difference(record)))
    return 0


def why(arguments: Sequence[str]) -> int:
    """The command ``why``."""
    own, rest = own_flags("why", arguments, values=(), switches=("--json",))
    name, step = _positionals("why", rest, ("RUN", "STEP"), "retrain why logs/train 3")
    with streams.results(alone="--json" in own) as out, quiet_loading(), at_once_on_interrupt():
        from retrain.comparison.step import explain_step
        from retrain.tracking.intact import intact
        from retrain.tracking.read import RunRecord
        from retrain.tracking.run_log import to_json

        run = intact(RunRecord.at(name))
        if step == "last":
            step = str(max((int(row["step"]) for row in run.steps), default=0))
        if not step.isdecimal():
            raise UsageError(f"{step} is no step.", fix="steps are counted from 0; last is the last one.")
        record = explain_step(run, int(step))
        if "--json" in own:
            out.record(to_json(record))
        else:
            out.line("\n".join(_step(record)))
    return 0


def replay(arguments: Sequence[str]) -> int:
    """The command ``replay``."""
    own, rest = own_flags("replay", arguments, values=("--steps",), switches=("--json", "--learner"))
    with streams.results(alone="--json" in own) as out, quiet_loading(), at_once_on_interrupt():
        from retrain.config.options import parse
        from retrain.replay import credit
        from retrain.tracking.intact import intact
        from retrain.tracking.read import RunRecord
        from retrain.tracking.run_log import to_json

        line = parse(rest, {"--alpha": "--hicra-alpha"}, positional="run")
        if line.config is None:
            raise UsageError("retrain replay needs a run.", fix="retrain replay logs/train, for example.")
        run = intact(RunRecord.at(line.config))
        before, now = credit.settings(run, line.overrides)
        steps = credit.steps_in(own.get("--steps", ""), run.path)
        said = credit.announced(now, line.overrides)
        found = credit.replay(run, before, now.config, steps, announcements=said, progress=_progress)
        _clear()
        if "--learner" in own and found.changed:
            raise UsageError(
                "--learner reproduces the run's own gradients, and other settings of credit are given.",
                fix="leave out either.",
            )
        gradients: list[Regradient] = []
        if "--learner" in own:
            from retrain.replay.gradients import regradients

            gradients = regradients(run, before, steps)
        if "--json" in own:
            from dataclasses import asdict

            out.record(to_json({**found.record(), "gradients": [asdict(g) for g in gradients]}))
        else:
            out.line("\n".join([*_replay(found), *_gradients(gradients, asked="--learner" in own)]))
        failed = not found.total.reproduced or any(g.outcome == "differs" for g in gradients)
    return 1 if failed else 0


def _positionals(command: str, rest: Sequence[str], names: tuple[str, str], example: str) -> tuple[str, str]:
    unknown = [word for word in rest if word.startswith("-") and word != "-"]
    if unknown:
        raise UsageError(
            f"{unknown[0].partition('=')[0]} is not an option of {command}.", fix=f"retrain {command} --help."
        )
    if len(rest) != 2:
        raise UsageError(
            f"retrain {command} needs {names[0]} and {names[1]}{', and nothing else' if len(rest) > 2 else ''}.",
            fix=f"{example}, for example.",
        )
    return rest[0], rest[1]


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and done and done % 20 == 0:
        print(f"\r\033[K{done} of {total} steps ", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# In words.


def _columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows with aligned columns: the first ``left`` to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _n(value: Any, digits: int = 4) -> str:
    if value is None:
        return "n/a"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _quoted(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _in_context(entry: Mapping[str, Any]) -> str:
    before, token, after = (_quoted(entry[key]) for key in ("before", "token", "after"))
    room = max(20, _WIDTH - 16 - len(token))
    before = before if len(before) <= room else "..." + before[3 - room :]
    return f"      {before}[{token}]{after[:40]}"


def _value(value: Any) -> str:
    from retrain.config.fields import literal

    if value is None:
        return "unset"
    try:
        return str(literal(value))
    except (TypeError, ValueError):
        return repr(value)


def _difference(record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"A  {record['a']['name']} ({record['a']['kind']})",
        f"B  {record['b']['name']} ({record['b']['kind']})",
    ]
    lines += ["", "Settings"]
    if not record["settings"]:
        lines.append("  none differs")
    for entry in record["settings"]:
        lines.append(f"  {entry['key']}")
        for side in ("a", "b"):
            origin = entry[f"{side}_origin"]
            lines.append(f"    {side.upper()}  {_value(entry[side])}{f'  ({origin})' if origin else ''}")
    if record["results"]:
        lines += ["", "Code, machine and data"]
        if not record["facts"]:
            lines.append("  nothing recorded differs")
        for fact in record["facts"]:
            what = f"{fact['about']}: {fact['what']}"
            lines.append(f"  {what:<28} A  {_fact(fact['a'])}")
            lines.append(f"  {'':<28} B  {_fact(fact['b'])}")
        lines += _results(record["results"])
    folders = cast("list[dict[str, Any]]", record["runs"] or [])
    for side, members in zip("AB", folders, strict=False):
        lines += ["", f"Runs of {side}"]
        rows: list[tuple[str, ...]] = [("run", "condition", "seed", "state", "steps", "accuracy")]
        rows += [
            (m["run"], str(m["condition"]), _n(m["seed"]), m["state"], str(m["steps"]), _share(m["accuracy"]))
            for m in members["runs"]
        ]
        lines += [f"  {line}" for line in _columns(rows, left=2)]
        for name, mean in members["conditions"].items():
            spread = f", from {mean['low']:.1%} to {mean['high']:.1%}" if mean["runs"] > 1 else ""
            count = f"{mean['runs']} run{'s' if mean['runs'] > 1 else ''}"
            lines.append(f"  {name}: mean {mean['mean']:.1%} of {count}{spread}")
    return [*lines, "", *(f"note: {note}" for note in record["notes"])] if record["notes"] else lines


def _fact(value: Any) -> str:
    text = "not recorded" if value is None else str(value)
    return (text[:16] + " ...") if len(text) == 64 else text or "none"


def _results(results: Mapping[str, Any]) -> list[str]:
    lines = ["", "Where they part", f"  {_parted(results['diverged'])}"]
    values = list(results["diverged"]["values"].items())
    for key, pair in values[:4]:
        lines.append(f"    {key:<22} A  {_n(pair['a'], 9)}   B  {_n(pair['b'], 9)}")
    if len(values) > 4:
        lines.append(f"    and {len(values) - 4} more")
    lines += ["", "Results"]
    both = results["time"]["a"], results["time"]["b"]
    rows = [("", "A", "B")]
    rows += [(name, *(str(results[name][side]) for side in "ab")) for name in ("state", "steps")]
    for entry in results["evaluations"]:
        name = (
            "accuracy" if entry["suite"] == "eval" else f"accuracy ({entry['suite'].removeprefix('eval/')})"
        )
        rows.append((name, *(_accuracy(entry[s]) for s in "ab")))
        if _earlier(entry):
            rows.append(("  compared", *(_accuracy(entry["common"][s]) for s in "ab")))
    rows += [
        ("steps took", *(f"{t['steps_s']:.1f} s" for t in both)),
        ("evaluations took", *(f"{t['evaluations_s']:.1f} s" for t in both)),
        ("sampled tokens", *(f"{t['tokens']:,}" for t in both)),
        ("sampling speed", *(f"{t['tokens_per_second']:.0f} tokens/s" if t["tokens_per_second"] else "n/a" for t in both)),
    ]  # fmt: skip
    lines += [f"  {line}" for line in _columns(rows, left=3)]
    for entry in results["evaluations"]:
        gap = entry["difference"]
        if gap:
            where = "" if entry["suite"] == "eval" else f" in {entry['suite']}"
            where += f" after {entry['common']['a']['step']} steps" if _earlier(entry) else ""
            lines.append(
                f"  B - A{where}: {100 * gap['value']:+.1f} points, "
                f"95 % interval {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}"
            )
    if results["curves"]:
        table: list[tuple[str, ...]] = [("step", "reward A", "B", "correct A", "B")]
        for row in results["curves"]:
            rewards = (_n(row["mean_reward"][side], 3) for side in "ab")
            table.append((str(row["step"]), *rewards, *(_share(row["correct_rate"][side]) for side in "ab")))
        lines += ["", *(f"  {line}" for line in _columns(table, left=0))]
    return lines


def _earlier(entry: Mapping[str, Any]) -> bool:
    """Are other evaluations of the suite compared than the last ones?"""
    common = entry["common"]
    return bool(common) and any(common[side] != entry[side] for side in "ab")


def _parted(found: Mapping[str, Any]) -> str:
    if not found["common"]:
        return "they have no step in common"
    if found["step"] is None:
        return (
            f"nowhere: all {found['common']} common rows of metrics.jsonl are identical, clock readings aside"
        )
    what = f"the evaluation after {found['step']} steps" if found["evaluation"] else f"step {found['step']}"
    if not found["identical"]:
        return f"from the start: {what} differs"
    return f"{what} is the first that differs; everything before it is identical"


def _accuracy(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "none"
    interval = (
        f" ({entry['low']:.1%} to {entry['high']:.1%})"
        if entry["low"] is not None and entry["high"] is not None
        else ""
    )
    return f"{entry['accuracy']:.1%}{interval} after {entry['step']} steps"


def _step(record: Mapping[str, Any]) -> list[str]:
    sampled, update = record["sampled"], record["update"]
    lines = [f"{record['run']}, step {record['step']} ({record['condition']})", ""]
    groups = cast("list[dict[str, Any]]", record["groups"])
    if groups:
        trained = sum(g["outcome"] == "trained" for g in groups)
        lines.append(f"Groups: {trained} of {len(groups)} trained")
        rows = [("task", "outcome", "rewards", "lengths")]
        rows += [
            (g["task"], g["why"] or "trained", _counted(g["rewards"]), _range(g["lengths"])) for g in groups
        ]
        lines += [f"  {line}" for line in _columns(rows, left=4)]
        errors = [(g["task"], error) for g in groups for error in g["errors"]]
        lines += [f"  error in {task}: {_quoted(error)[:_WIDTH]}" for task, error in errors[:5]]
        if len(errors) > 5:
            lines.append(f"  and {len(errors) - 5} more errors")
    lines += [
        "",
        f"Sampled: reward {_n(sampled['mean_reward'], 3)}, correct {_share(sampled['correct_rate'])}, length "
        f"{_n(sampled['mean_length'], 3)}, cut {_share(sampled['max_token_hit_rate'])}, entropy {_n(sampled['entropy_mean'], 3)}",
    ]
    gate = "" if record["sepa_gate_open"] else ", its gate closed"
    lines.append(f"SEPA: lambda {_n(record['sepa_lambda'])}{gate}")
    lines += _update(update)
    if record["tokens"]:
        kept = "" if record["tokens_from"] == "rollouts" else " of the rollouts that were written as text"
        lines += ["", f"Tokens with the largest |A|{kept}, at most one a rollout"]
        for entry in record["tokens"]:
            more = ["planning"] if entry["planning"] else []
            more += ["all tokens of the rollout alike"] if entry["alike"] else []
            lines.append(
                f"  A {entry['advantage']:+.3g}  {entry['task']}, member {entry['member']}, token {entry['position']}, "
                f"p {_p(entry['logprob'])}{''.join(f', {m}' for m in more)}"
            )
            lines.append(_in_context(entry))
    lines.append("")
    lines += [f"alarm: {a['message']} {a['advice']}" for a in record["alarms"]] or [
        "No alarm was raised in this step."
    ]
    around = record["checkpoints"]
    begins = around["before"] == record["step"]
    before = (
        "none"
        if around["before"] is None
        else f"after {around['before']} steps{', where this one begins' if begins else ''}"
    )
    after = "none" if around["after"] is None else f"after {around['after']} steps"
    lines.append(f"Checkpoints: before it {before}; after it {after}.")
    return [*lines, *(f"missing: {text}" for text in record["missing"])]


def _p(logprob: float) -> str:
    import math

    return f"{math.exp(min(0.0, logprob)):.3g}"


def _update(update: Mapping[str, Any]) -> list[str]:
    if not update["num_updates"]:
        return ["Update: none, no group had a signal"]
    if update["skipped_update"]:
        reason = f" because {update['skipped_because']}" if update["skipped_because"] else ""
        return [f"Update: skipped{reason}"]
    clipped = (
        f", clipped to {update['grad_clip']:g}" if update["grad_clipped"] and update["grad_clip"] else ""
    )
    ratio = ", ".join(f"{_n(update[f'ratio_{key}'], 6)}" for key in ("min", "mean", "max"))
    return [
        f"Update: loss {_n(update['loss'])}, gradient norm {_n(update['grad_norm'])}{clipped}, {update['num_datums']} rollouts, "
        f"lr {_n(update['lr'])}",
        f"  ratio to the sampler (min, mean, max): {ratio}; KL {_n(update['approx_kl'], 3)} nats/token",
    ]


def _counted(rewards: Sequence[float | None]) -> str:
    """``2 x 1, 6 x 0``: values with how often they occur, the highest first."""
    from collections import Counter

    known = Counter(r for r in rewards if r is not None)
    if len(known) > 4:
        values = sorted(known)
        text = f"{values[0]:g} to {values[-1]:g}, mean {sum(v * n for v, n in known.items()) / known.total():.3g}"
    else:
        text = ", ".join(f"{known[v]} x {v:g}" for v in sorted(known, reverse=True))
    failed = sum(r is None for r in rewards)
    return text + (f"{', ' if text else ''}{failed} failed" if failed else "")


def _range(lengths: Sequence[int]) -> str:
    return f"{min(lengths)} to {max(lengths)}, mean {sum(lengths) / len(lengths):.0f}"


def _replay(found: Replay) -> list[str]:
    first, last = found.steps[0].step, found.steps[-1].step
    of = f"{len(found.steps)} step{'s' if len(found.steps) > 1 else ''} ({first} to {last})"
    if not found.changed:
        lines = [f"{found.run}: {found.own}, {of}"]
        if found.total.reproduced:
            lines.append(
                f"Credit came back bit for bit in every step ({found.total.tokens:,} tokens with credit)."
            )
        return [*lines, *(f"note: {note}" for note in found.notes)]
    lines = [f"{found.run}: {found.own} replayed as {found.other}, {of}"]
    lines += [f"  {line}" for line in found.changed]
    shown = list(found.steps)
    if len(shown) > _ROWS:
        shown = [shown[round(i * (len(shown) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
    head = (
        "step",
        "tokens",
        "sign changed",
        "Pearson",
        "Spearman",
        "|A| planning",
        "|A| execution",
        "groups",
        "lambda",
    )
    rows = [head, *(_row(str(s.step), s) for s in shown), _row("all", found.total)]
    lines += ["", *_columns(rows), ""]
    if len(shown) < len(found.steps):
        lines.append(f"{len(shown)} of {len(found.steps)} steps are shown; --json has all of them.")
    lines.append(
        "own > other: mean |A| of planning and of execution tokens, groups that train, SEPA's lambda. Over all steps Spearman "
        "is the steps' mean."
    )
    total = found.total
    if total.flipped_groups:
        lines.append(f"{total.flipped_groups} of {total.groups} groups train under one of the two only.")
    if found.largest:
        lines += ["", "Largest differences, at most one token a rollout"]
        for d in found.largest:
            planning = {
                (True, True): ", planning",
                (True, False): ", planning > execution",
                (False, True): ", execution > planning",
            }.get((d.own_planning, d.other_planning), "")
            lines.append(
                f"  {d.own:+.3g} > {d.other:+.3g}  step {d.step}, {d.task}, member {d.member}, token {d.position}{planning}"
            )
            lines.append(_in_context({"before": d.before, "token": d.token, "after": d.after}))
    return [*lines, *(f"note: {note}" for note in found.notes)]


def _row(name: str, s: StepComparison) -> tuple[str, ...]:
    return (
        name,
        f"{s.tokens:,}",
        _share(s.sign_changed),
        "n/a" if s.pearson is None else f"{s.pearson:.3f}",
        "n/a" if s.spearman is None else f"{s.spearman:.3f}",
        f"{_n(s.own_planning, 3)} > {_n(s.other_planning, 3)}",
        f"{_n(s.own_execution, 3)} > {_n(s.other_execution, 3)}",
        f"{s.own_trains} > {s.other_trains}",
        f"{s.own_lambda:.2f} > {s.other_lambda:.2f}",
    )


def _gradients(found: Sequence[Regradient], *, asked: bool) -> list[str]:
    if not asked:
        return []
    if not found:
        return [
            "Gradients: none of these steps has a recorded hash: a run writes one where a step begins at training.save_every."
        ]
    lines: list[str] = []
    for g in found:
        if g.outcome == "reproduced":
            lines.append(f"Gradient of step {g.step}: reproduced bit for bit (sha256 {g.hash[:16]} ...)")
        elif g.outcome == "differs":
            lines.append(
                f"Gradient of step {g.step}: differs; its norm was {_n(g.stored_norm, 8)} and is {_n(g.norm, 8)}. "
                f"{'; '.join(g.reasons)}."
            )
        else:
            lines.append(f"Gradient of step {g.step}: not computed, {g.outcome}")
    return lines
