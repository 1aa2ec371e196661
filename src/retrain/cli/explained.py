"""What ``retrain explain`` says of an estimate: parts of its record, and the record as text for 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from retrain.cards import Device
    from retrain.estimate import Estimate, Interval
    from retrain.training.probe import Probe

_WIDTH = 100
_INDENT = "  "
_MB = 10**6
_VALUE = 40
"""Characters of a setting's value that stand beside its origin."""


def device_record(device: Device) -> dict[str, Any]:
    return {
        "name": device.name, "kind": device.kind, "here": device.here, "bytes": device.bytes,
        "flops_bf16": device.flops_bf16 or None, "flops_fp32": device.flops_fp32 or None,
        "bandwidth": device.bandwidth or None, "note": device.note, "guessed": device.guessed,
    }  # fmt: skip


def memory_record(made: Estimate) -> dict[str, Any]:
    memory = made.memory
    return {
        "kept": memory.kept, "sampling": memory.sampling, "learning": memory.learning, "peak": memory.peak,
        "low": memory.low, "high": memory.high, "certain": memory.certain, "device": made.device.bytes,
    }  # fmt: skip


def time_record(config: Any, made: Estimate, *, measured: bool) -> dict[str, Any] | None:
    step = made.step_seconds
    if step is None or made.seconds is None:
        return None
    return {
        "phases": {name: _ends(span) for name, span in made.seconds.items()},
        "step": _ends(step),
        "evaluation": made.evaluation and _ends(made.evaluation),
        "evaluations": made.evaluations,
        "run": _ends(made.run_seconds(config.training.max_steps)),
        "lengths": "as the probe saw them" if measured else "from a fifth of max_tokens to all of it",
    }


def _ends(span: Interval | None) -> dict[str, float] | None:
    return span and {
        name: float(f"{end:.3g}")
        for name, end in (("low", span.low), ("middle", span.middle), ("high", span.high))
    }


def disk_record(config: Any, made: Estimate | None) -> dict[str, Any] | None:
    if made is None:
        return None
    every, steps, keep = (
        config.training.save_every,
        config.training.max_steps,
        config.training.keep_checkpoints,
    )
    count = min(keep, max(1, -(-steps // every)) if every else 1)
    # Measured on runs of both model sizes of benches/estimate.py.
    rollouts = 10 * steps * made.step.sampled if config.logging.rollouts else 0
    if config.logging.rollouts_mb:
        rollouts = min(rollouts, config.logging.rollouts_mb * _MB)
    return {
        "checkpoint": 12 * made.trainable, "checkpoints_kept": count, "adapter": 4 * made.trainable,
        "rollouts_at_most": rollouts,
    }  # fmt: skip


def probed_record(found: Probe) -> dict[str, Any]:
    return {
        "tasks": found.tasks, "rollouts": found.rollouts, "silent": found.silent.to_json(),
        "truncated": found.truncated.to_json(), "length": found.length.to_json(), "median_length": found.median,
        "p95_length": found.p95, "prompt": found.prompt, "reward": found.reward.to_json(), "errors": found.errors,
        "seconds": found.seconds,
    }  # fmt: skip


def sepa_record(config: Any) -> dict[str, Any] | None:
    """Lambda of the linear schedule, where the credit uses it."""
    from retrain.training.ahead import lambdas

    found = lambdas(config)
    return found and {
        "first": found.first, "middle": found.middle, "last": found.last, "never": found.never,
        "schedule": config.sepa.schedule, "correct_rate_gate": config.sepa.correct_rate_gate,
    }  # fmt: skip


def text(record: Mapping[str, Any]) -> str:
    """The record in words. A campaign comes before the run of it that is told of in detail."""
    worth = _list("Worth knowing", [*record["announcements"], *record["advice"]])
    campaign = record["campaign"]
    parts = [
        _settings(record), *([_list("Campaign", campaign["lines"]), worth] if campaign else []),
        _step(record), _memory(record), _time(record), _sizes(record), _probe(record), _credit(record), _directory(record),
        *([] if campaign else [worth]), _list("Not known", record["unknown"]),
    ]  # fmt: skip
    return "\n\n".join("\n".join(line.rstrip() for line in part) for part in parts if part)


def seconds(value: float) -> str:
    """A time in the unit that reads best."""
    if value < 1:
        return f"{value:.2g} s"
    if value < 120:
        return f"{value:.3g} s"
    if value < 7200:
        return f"{value / 60:.3g} min"
    if value < 172_800:
        return f"{value / 3600:.3g} h"
    days = value / 86_400
    return f"{days:.3g} days" if days < 730 else f"{days / 365.25:,.{0 if days > 36_525 else 1}f} years"


def size(value: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return (
                f"{value / scale:,.1f} {unit}"
                if value < 10 * scale or unit == "GiB"
                else f"{value / scale:,.0f} {unit}"
            )
    return f"{value:,.0f} B"


def _span(ends: Mapping[str, float], *, middle: bool = False) -> str:
    between = f", middle {seconds(ends['middle'])}" if middle else ""
    return f"{seconds(ends['low'])} to {seconds(ends['high'])}{between}"


def _wrapped(line: str, first: str = _INDENT, then: str = _INDENT) -> list[str]:
    return textwrap.wrap(
        line,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=then,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(w for line in lines for w in _wrapped(line, "  - ", "    "))] if lines else []


def _settings(record: Mapping[str, Any]) -> list[str]:
    from retrain.config.fields import literal

    rows = [
        (s["key"], "unset" if s["value"] is None else literal(s["value"]), s["origin"])
        for s in record["settings"]
    ]
    lines = [f"{record['configuration']}: settings and where they come from"]
    if not any(s["kind"] == "default" for s in record["settings"]):
        lines[0] = f"{record['configuration']}: settings that are not defaults, and where they come from"
    key = max((len(r[0]) for r in rows), default=0)
    value = max((len(r[1]) for r in rows if len(r[1]) <= _VALUE), default=0)
    whole = {s["key"]: s["value"] for s in record["settings"]}
    for name, shown, origin in rows:
        if len(shown) > value:
            listed = whole[name] if len(shown) > _WIDTH - key - 4 and isinstance(whole[name], list | tuple) else None
            items = [shown] if listed is None else [literal(item) for item in cast("Sequence[object]", listed)]
            indent = " " * (key + 4)
            found = [line for item in items for line in _wrapped(item, indent, f"{indent}  ")]
            lines += [f"{_INDENT}{name:<{key}}  {found[0].lstrip()}", *found[1:]]
            lines.append(f"{_INDENT}{'':<{key}}  {'':<{value}}  {origin}")
        else:
            lines.append(f"{_INDENT}{name:<{key}}  {shown:<{value}}  {origin}")
    for name, shown in record["environment"].items():
        lines.append(f"{_INDENT}{name:<{key}}  {shown:<{value}}  environment")
    return lines


def _step(record: Mapping[str, Any]) -> list[str]:
    step, model = record["step"], record["model"]
    lines = [
        _whose(record),
        f"{_INDENT}rollouts     {step['tasks']:,} tasks x {step['group_size']:,} answers = {step['rollouts']:,}"
        + (
            f", up to {step['oversampled_rollouts_at_most']:,} where too few groups carry a signal"
            if step["oversampled_rollouts_at_most"] > step["rollouts"]
            else ""
        ),
        f"{_INDENT}tokens       at most {step['sampled_tokens_at_most']:,} sampled ({step['max_tokens']:,} an answer)",
    ]
    if "prompt_tokens" in step:
        words = {"data": "the longest, measured", "probe": "on average, measured", "assumed": "assumed, not measured"}
        lines.append(f"{_INDENT}prompts      {step['prompt_tokens']:,} tokens ({words[step['prompt_from']]})")
    if "rows_at_once" in step:
        lines.append(f"{_INDENT}sampling     at most {step['rows_at_once']:,} answers at once")
        again = ", activations computed twice" if step["checkpointing"] else ""
        lines.append(
            f"{_INDENT}updates      {step['updates']:,}, in at most {_count(step['microbatches_at_most'], 'microbatch')} of "
            f"up to {step['microbatch_tokens']:,} tokens{again}"
        )
    else:
        lines.append(f"{_INDENT}updates      {step['updates']:,}")
    if model:
        lines.append(
            f"{_INDENT}trainable    {record['trainable_parameters']:,} parameters beside {model['parameters']:,} frozen ones of "
            f"{model['name']}"
        )
        lines.append(f"{_INDENT}{'':<13}(shape from {model['source']})")
    return [w for line in lines for w in (_wrapped(line, "", " " * 15) if len(line) > _WIDTH else [line])]


def _whose(record: Mapping[str, Any]) -> str:
    """Whose step it is."""
    if not record["campaign"]:
        return "A step"
    shown = record["campaign"]["shown"]
    return f"A step of {shown['run']}" + (", which needs the most memory" if shown["largest"] else "; others need as much memory")


def _count(n: int, word: str) -> str:
    plural = f"{word}es" if word.endswith("ch") else f"{word}s"
    return f"{n:,} {word if n == 1 else plural}"


def _memory(record: Mapping[str, Any]) -> list[str]:
    memory, device = record["memory"], record["device"]
    if not memory:
        return []
    sampling, learning = sum(memory["sampling"].values()), sum(memory["learning"].values())
    lines = [
        f"Memory on {device['name']}, which has {size(device['bytes'])}, where every answer reaches its longest"
    ]
    for title, parts, counted in (
        ("", memory["kept"], True),
        ("while sampling", memory["sampling"], sampling >= learning),
        ("while learning", memory["learning"], learning > sampling),
    ):
        if title:
            other = "" if counted else "   (not at the same time: the larger counts)"
            lines.append(f"{_INDENT}{title:<22}{size(sum(parts.values())):>10}{other}")
        lines += [
            f"{_INDENT}{'  ' if title else ''}{name:<{20 if title else 22}}{size(n):>10}"
            for name, n in parts.items()
        ]
    lines.append(
        f"{_INDENT}{'peak':<22}{size(memory['peak']):>10}   between {size(memory['low'])} and {size(memory['high'])}"
    )
    fits = record["fits"]["verdict"]
    words = {
        "yes": "yes" + (" (the CPU: no GPU was found)" if device["guessed"] else ""),
        "perhaps": "most likely; see below",
        "not at its longest": "only while answers stay shorter than their longest; see below",
        "cannot": f"no: weights, adapter and optimizer alone need {size(memory['certain'])}",
        "too long": "no: prompts and answers exceed the model's positions",
        "unknown": "not known: no GPU was found here, and the CPU is too small",
    }  # fmt: skip
    lines.append(f"{_INDENT}{'fits':<22}{words[fits]}")
    return lines


def _time(record: Mapping[str, Any]) -> list[str]:
    time, disk = record["time"], record["disk"]
    lines: list[str] = []
    if time:
        speed = "measured now" if record["device"]["kind"] == "cpu" else record["device"]["note"]
        lines = [f"Time on {record['device']['name']} ({speed}), with answers {time['lengths']}"]
        lines += [f"{_INDENT}{name:<13}{_span(ends)}" for name, ends in time["phases"].items()]
        lines.append(f"{_INDENT}{'a step':<13}{_span(time['step'], middle=True)}")
        if time["evaluations"]:
            lines.append(
                f"{_INDENT}{'evaluation':<13}{_span(time['evaluation'])}, {time['evaluations']} times"
            )
        lines.append(
            f"{_INDENT}{'the run':<13}{_span(time['run'])} for {_count(record['step']['steps'], 'step')}, "
            f"middle {seconds(time['run']['middle'])}"
        )
        lines.append(f"{_INDENT}{'':<13}(middle: the geometric mean of the two ends, no forecast)")
    if disk:
        kept = f"{_count(disk['checkpoints_kept'], 'checkpoint')} of {size(disk['checkpoint'])}, adapter {size(disk['adapter'])}"
        stored = f", rollouts up to {size(disk['rollouts_at_most'])}" if disk["rollouts_at_most"] else ""
        lines.append(f"{_INDENT}{'disk':<13}{kept}{stored}")
    return [w for line in lines for w in (_wrapped(line, "", " " * 15) if len(line) > _WIDTH else [line])]


def _sizes(record: Mapping[str, Any]) -> list[str]:
    """Of a run whose batch size follows the clock."""
    found, time = record["sizes"], record["time"]
    if not found:
        return []
    least, most, group = found["least"], found["most"], found["group_size"]
    how = "your controller chooses it" if found["own"] else "it follows measured throughput, so no two runs are the same"
    lines = [
        "Back pressure",
        f"  batch size   {least:,} to {most:,} tasks ({least * group:,} to {most * group:,} answers) a step: {how}",
    ]
    if found["warmup"]:
        lines.append(f"  warm-up      goes up through {', '.join(map(str, found['warmup']))} tasks and measures; then it settles")
    elif not found["own"]:
        lines.append("  warm-up      none: the size stays as it is unless an engine reports a queue")
    if found["memory"]:
        memory = found["memory"]
        lines.append(
            f"  memory       at {most:,} tasks {size(memory['peak'])}, between {size(memory['low'])} and {size(memory['high'])}, "
            f"of {size(memory['device'])}"
        )
    if found["time"] and time:
        step, run = found["time"]["step"], found["time"]["run"]
        lines.append(f"  a step       at {most:,} tasks {seconds(step['low'])} to {seconds(step['high'])}")
        lines.append(
            f"  the run      {seconds(min(run['low'], time['run']['low']))} to {seconds(run['high'])}, from all steps at "
            f"{record['step']['tasks']:,} to all at {most:,} tasks"
        )
    return [w for line in lines for w in (_wrapped(line, "", " " * 15) if len(line) > _WIDTH else [line])]


def _probe(record: Mapping[str, Any]) -> list[str]:
    probe = record["probe"]
    if not probe:
        return []

    def spread(name: str, form: str) -> str:
        r = probe[name]
        if r["low"] is None:
            return f"{r['value']:{form}} (one task: no interval)"
        low = r["low"] if name == "reward" else max(0.0, r["low"])
        mean = " on average" if name == "length" else ""
        return f"{r['value']:{form}}{mean}, 95 % interval {low:{form}} to {r['high']:{form}}"

    lines = [
        f"Sampled now: {_count(probe['tasks'], 'task')}, {probe['rollouts']:,} answers, in {seconds(probe['seconds'])}",
        f"{_INDENT}groups without signal  {spread('silent', '.0%')}",
        f"{_INDENT}answers cut            {spread('truncated', '.0%')}",
        f"{_INDENT}tokens an answer       {spread('length', '.0f')}; "
        f"median {probe['median_length']:.0f}, 95th percentile {probe['p95_length']:.0f}",
        f"{_INDENT}reward                 {spread('reward', '.3f')}",
        f"{_INDENT}tokens a prompt        {probe['prompt']:.0f}",
    ]
    if probe["errors"]:
        lines.append(f"{_INDENT}failed                 {probe['errors']} answers or rewards")
    return lines


def _credit(record: Mapping[str, Any]) -> list[str]:
    sepa, references, ignored = record["sepa"], record["references"], record["generation_config_not_used"]
    lines = ["Credit and data"]
    of = record["campaign"]["sepa"] if record["campaign"] else {"": sepa} if sepa else {}
    for label, found in of.items():
        named = f"{label}: " if label else ""
        lines.append(f"{_INDENT}SEPA's lambda      {named}{_lambda(found, record['step']['steps'])}")
    if references["read"]:
        share = references["whole_numbers"] / max(1, references["tasks"])
        lines.append(
            f"{_INDENT}references         {references['tasks']:,} read, {share:.1%} of them whole numbers"
        )
    else:
        lines.append(f"{_INDENT}references         not read: {references['note']}")
    if ignored is not None:
        listed = ", ".join(f"{k} = {v}" for k, v in ignored.items()) or "nothing to set"
        lines.append(f"{_INDENT}generation_config  {listed}" + (" (not used)" if ignored else ""))
    return [w for line in lines for w in (_wrapped(line, "", " " * 21) if len(line) > _WIDTH else [line])]


def _lambda(found: Mapping[str, Any], steps: int) -> str:
    if found["never"]:
        return f"0 at all {steps:,} steps: it never acts"
    gate = f", 0 before the correct rate reaches {found['correct_rate_gate']:g}" if found["correct_rate_gate"] > 0 else ""
    auto = " at least (schedule auto)" if found["schedule"] == "auto" else ""
    first, middle, last = (f"{found[name]:.2f}" for name in ("first", "middle", "last"))
    return f"{first} at the first step, {middle} at the middle, {last} at the last{auto}{gate}"


def _directory(record: Mapping[str, Any]) -> list[str]:
    place = record["run_directory"]
    words = {
        "new": "a new campaign" if record["campaign"] else "a new run",
        "overwrite": "replaces the run there",
        "resume": "goes on with the run there",
    }
    lines = ["Run directory", f"{_INDENT}{place['path']}: {words.get(place['how'], 'refused')}"]
    if "holds" in place:
        held = place["holds"]
        step = f", {held['step']} of {held['max_steps']} steps" if held["step"] is not None else ""
        lines.append(f"{_INDENT}a run stands there: {held['state']}{step}")
    return lines + (_wrapped(place["note"]) if place["note"] else [])
