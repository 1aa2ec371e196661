"""``retrain trace``, ``doctor``, ``resume-check``, ``backends`` and ``plugins``: what can be known without a run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retrain.cli import streams
from retrain.cli.verb import at_once_on_interrupt, own_flags, quiet_loading, whole_number
from retrain.errors import UsageError

if TYPE_CHECKING:
    from retrain.checkup import Check
    from retrain.config.load import LoadedConfig
    from retrain.continuation import Continuation
    from retrain.walk import Member, Walk

USAGE = {
    "trace": """\
Usage: retrain trace [CONFIG] [--task N|ID] [--step N] [--flag value ...]

Follows one task of CONFIG (./retrain.toml, else the embedded model's) through a whole step, without a model: the prompt
as the model gets it, made-up answers (the task's own reference, a wrong one, one without a box, one that is cut), their
rewards, advantages and per-token credit, and what would be trained. All of it is computed by the code of a run.

  --task N|ID      a task by its id, or by its number in the data's order from 0 (the first that a run draws)
  --step N         the step that schedules stand at (the last)
  --tokens N       tokens of each answer to show (24)
  --json           print one JSON object, with every token
Every setting of a run has its usual flag: retrain trace --transform-mode gtpo.
""",
    "doctor": """\
Usage: retrain doctor [CONFIG] [--tasks] [--flag value ...]

Checks this machine: Python, packages and their versions, devices, memory, disk, the Hugging Face cache, clock and file
locks. With CONFIG also what a run of it needs: directory, plug-ins, data, tokenizer, prompt lengths, reward. One line
each: ok, warning or problem, and what to do. Exit code 1 where there is a problem.

  --tasks          score the reference of every task: does the reward accept the data's own answers?
  --json           print one JSON object
""",
    "resume-check": """\
Usage: retrain resume-check RUN [--flag value ...]

Says whether the run in a directory can be continued, from which checkpoint (every checksum is verified), with which
settings, and whether the result will be byte-exact. Nothing is written. Exit code 1 where it cannot be continued.

  --weights        load the base model as well and compare it with the run's
  --json           print one JSON object
Settings are given as to the run: retrain resume-check logs/train --max-steps 200.
""",
    "backends": """\
Usage: retrain backends [--json]

Learners (backend.backend) and samplers (inference.engine): which this version builds, what each can do, and whether
its packages are installed.
""",
    "plugins": """\
Usage: retrain plugins [KIND] [--config CONFIG] [--json]

Everything that a configuration can name: the built-in names of every kind, or of one, what installed packages add, and
what stands in the folders of plugins.search_paths (of CONFIG, else of ./retrain.toml). Nothing is imported.
""",
}

_SHOWN_TOKENS = 24
_LAST_TOKENS = 3
_WIDTH = 118


def trace(arguments: Sequence[str]) -> int:
    """The command ``trace``."""
    own, rest = own_flags("trace", arguments, values=("--task", "--step", "--tokens"), switches=("--json",))
    step = whole_number(own["--step"], "--step", least=0) if "--step" in own else None
    shown = whole_number(own.get("--tokens", str(_SHOWN_TOKENS)), "--tokens", least=1)
    with streams.results(alone="--json" in own) as out, quiet_loading():
        loaded = _loaded("trace", rest, else_tiny=True)
        if loaded is None:
            raise ValueError("no configuration")
        from retrain.walk import follow

        with at_once_on_interrupt():
            walk = follow(loaded, own.get("--task", ""), step)
        if "--json" in own:
            _record(out, walk)
        else:
            out.line(_walk_text(walk, shown))
    return 0


def _record(out: streams.Results, value: Any) -> None:
    """A dataclass, or a mapping, as one JSON object."""
    from dataclasses import asdict

    from retrain.tracking.run_log import to_json

    out.record(to_json(cast("Mapping[str, Any]", value if isinstance(value, dict) else asdict(value))))


def _loaded(command: str, rest: Sequence[str], *, else_tiny: bool) -> LoadedConfig | None:
    """The configuration that a command looks at; UsageError for a squeeze, of which it has nothing to say."""
    from retrain.config.squeezes import refuse

    found = _named(command, rest, else_tiny=else_tiny)
    if found is not None:
        refuse(found.config, command)
    return found


def _named(command: str, rest: Sequence[str], *, else_tiny: bool) -> LoadedConfig | None:
    """The configuration that is named, ./retrain.toml without one, else the tiny template or None."""
    from retrain.cli import dotenv
    from retrain.config import templates
    from retrain.config.load import load
    from retrain.config.options import parse

    line = parse(rest)
    for flag in sorted(line.switches - {"--debug"}):
        raise UsageError(
            f"{flag} is not an option of {command}.", fix=f"leave it out; retrain {command} --help."
        )
    with contextlib.redirect_stdout(sys.stderr):
        dotenv.load()
    if line.config is not None:
        if not os.path.exists(line.config) and not line.config.endswith(".toml"):
            raise UsageError(
                f"there is no file {line.config!r}.", fix=f"name a configuration: retrain {command} CONFIG."
            )
        return load(Path(line.config), line.overrides)
    if else_tiny:
        if os.path.exists("retrain.toml"):
            return load(Path("retrain.toml"), line.overrides)
        return load(Path(templates.path_of("tiny")), line.overrides, label="template tiny")
    if line.overrides:
        raise UsageError(
            f"{line.overrides[0].flag} is a setting of a configuration, and none is named.",
            fix=f"retrain {command} retrain.toml {line.overrides[0].flag} ...",
        )
    return None


def _walk_text(walk: Walk, shown: int) -> str:
    task, prompt, algorithm, batch = walk.task, walk.prompt, walk.algorithm, walk.batch
    lines = [
        f"task       {task['id']}, of {task['tasks']:,} tasks; reference {task['reference']!r}",
        *(f"           {m['role']}: {_quoted(m['content'])}" for m in task["messages"]),
        f"prompt     {prompt['tokens']} tokens, {_template(prompt)}",
        *([f"           {_quoted(prompt['text'])}"] if prompt["text"] else []),
        f"ends at    {_ends(prompt, walk.sampling)}",
        "",
        f"{'answer':<28}{'tokens':>7}  {'stop':<7}{'reward':>8}  {'correct':<8}{'A':>8}{'mean u':>9}",
    ]
    for m in walk.members:
        reward = "failed" if m.reward is None else f"{m.reward:g}"
        verdict = "unknown" if m.correct is None else "yes" if m.correct else "no"
        advantage = "" if m.advantage is None else f"{m.advantage:+.3f}"
        mean = sum(t.uncertainty for t in m.tokens) / max(1, len(m.tokens))
        lines.append(
            f"{m.name:<28}{len(m.tokens):>7}  {m.stop:<7}{reward:>8}  {verdict:<8}{advantage:>8}{mean:>9.3f}{_parts(m)}"
        )
    if walk.skipped:
        lines.append(f"           skipped ({walk.skipped}): A is 0 everywhere")
    lam = algorithm["sepa_lambda"]
    sepa = "" if lam is None else f"; SEPA's lambda {lam:g} at step {algorithm['step']}"
    name = algorithm["algorithm"] or f"{algorithm['advantage']}, then {algorithm['transform']}"
    lines += [
        "",
        f"credit     {name}{sepa}",
        f"           uncertainty {algorithm['uncertainty']}, planning tokens (*) by {algorithm['planning']}",
        "           tokens with the A that trains them",
    ]
    for m in walk.members:
        lines += [f"  {m.name}", *_wrapped(_credit(m, shown))]
    lines += [
        "",
        f"trained    {batch['rows']} rows of {', '.join(map(str, batch['row_tokens'])) or '0'} tokens; "
        f"{batch['trained_tokens']} sampled tokens, {batch['tokens_with_advantage']} of them with A other than 0",
        f"loss       {batch['loss']}, {batch['agg']}: the sum over tokens is divided by {batch['denominator']:,}; "
        f"lr {batch['lr']:g}",
        f"           a step of the run has {batch['step_rollouts']} rollouts, this group has {len(walk.members)}",
        *(f"note       {note}" for note in walk.notes),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _template(prompt: Mapping[str, Any]) -> str:
    if prompt["error"]:
        return f"failed: {prompt['error']}"
    form = (
        "by the chat template" if prompt["chat_template"] else "as plain text: the model has no chat template"
    )
    return form + (f"; the model has {prompt['context']:,} positions" if prompt["context"] else "")


def _ends(prompt: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
    named = [f"{text} ({i})" for i, text in prompt["stop_tokens"].items()]
    return ", ".join([*named, *map(repr, sampling["stop"]), f"or after {sampling['max_tokens']:,} tokens"])


def _parts(member: Member) -> str:
    if member.error:
        return f"  {member.error}"
    return f"  ({', '.join(f'{k} {v:g}' for k, v in member.parts.items())})" if member.parts else ""


def _quoted(text: str, limit: int = 800) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\\\\", "\\")
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _credit(member: Member, shown: int) -> list[str]:
    """Runs of tokens with one A and one mark, as words: ``[text] +0.50``, ``[text]* +0.50`` for planning."""
    tokens, words = member.tokens, list[str]()
    left_out = len(tokens) - shown - _LAST_TOKENS if len(tokens) > shown + _LAST_TOKENS else 0
    run, before = "", None
    for i, token in enumerate(tokens):
        if left_out and shown <= i < shown + left_out:
            if i == shown and before is not None:
                words.append(_word(run, *before))
                words.append(f"... {left_out} more ...")
                run, before = "", None
            continue
        key = (f"{token.advantage:+.2f}", token.planning)
        if before is not None and key != before:
            words.append(_word(run, *before))
            run = ""
        run, before = run + token.text.replace("\n", "\\n"), key
    return [*words, _word(run, *before)] if before is not None else words


def _word(run: str, advantage: str, planning: bool) -> str:
    return f"[{run}]{'*' if planning else ''} {advantage}"


def _wrapped(words: Sequence[str]) -> list[str]:
    lines, line = list[str](), "   "
    for word in words:
        if len(line) + len(word) > _WIDTH and line.strip():
            lines.append(line)
            line = "   "
        line += f" {word} "
    return [*lines, line] if line.strip() else lines


def doctor(arguments: Sequence[str]) -> int:
    """The command ``doctor``."""
    own, rest = own_flags("doctor", arguments, values=(), switches=("--json", "--tasks"))
    with streams.results(alone="--json" in own) as out, quiet_loading():
        loaded = _loaded("doctor", rest, else_tiny=False)
        if loaded is None and "--tasks" in own:
            raise UsageError("--tasks needs a configuration.", fix="retrain doctor retrain.toml --tasks.")
        from retrain import checkup

        with at_once_on_interrupt():
            checks = checkup.machine_checks(loaded)
            if loaded is not None:
                checks += checkup.config_checks(loaded, every_task="--tasks" in own, progress=_progress)
        if "--json" in own:
            _record(out, checkup.summary(checks, loaded))
        else:
            out.line(_checks_text(checks))
    return 1 if any(check.status == "problem" for check in checks) else 0


def _checks_text(checks: Sequence[Check]) -> str:
    lines: list[str] = []
    area = ""
    for check in checks:
        if check.area != area:
            lines += ["", check.area] if lines else [check.area]
            area = check.area
        lines.append(f"  {check.status:<8} {check.name:<16} {check.what}")
        if check.fix:
            lines.append(f"  {'':<8} {'':<16} fix: {check.fix}")
    count = {s: sum(c.status == s for c in checks) for s in ("ok", "warning", "problem")}
    lines += ["", ", ".join(f"{n} {s if n == 1 or s == 'ok' else s + 's'}" for s, n in count.items())]
    return "\n".join(line.rstrip() for line in lines)


def _progress(done: int, total: int) -> None:
    """In place on a terminal; elsewhere a line for every tenth."""
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[K{done} of {total} tasks {end}", end="", file=sys.stderr, flush=True)
    elif done == total or (done * 10 // total) > ((done - 1) * 10 // total):
        print(f"{done} of {total} tasks", file=sys.stderr, flush=True)


def resume_check(arguments: Sequence[str]) -> int:
    """The command ``resume-check``."""
    own, rest = own_flags("resume-check", arguments, values=(), switches=("--json", "--weights"))
    with streams.results(alone="--json" in own) as out, quiet_loading():
        from retrain.cli import dotenv
        from retrain.config.options import parse

        line = parse(rest, positional="run directory")
        for flag in sorted(line.switches - {"--debug"}):
            raise UsageError(f"{flag} is not an option of resume-check.", fix="leave it out.")
        if line.config is None:
            raise UsageError(
                "resume-check needs a run directory.", fix="retrain resume-check logs/train, for example."
            )
        with contextlib.redirect_stdout(sys.stderr):
            dotenv.load()
        from retrain.continuation import look

        with at_once_on_interrupt():
            found = look(line.config, line.overrides, weights="--weights" in own)
        if "--json" in own:
            _record(out, found)
        else:
            out.line(_continuation_text(found))
    return 0 if found.possible else 1


def _continuation_text(found: Continuation) -> str:
    rows = [("run", f"{found.run}: {found.state}, {found.steps_logged} of {found.max_steps} steps logged")]
    for checkpoint in found.checkpoints:
        if checkpoint.damage:
            rows.append(("torn", f"{checkpoint.name}: {checkpoint.damage}"))
        else:
            size = f"{checkpoint.files} files, {checkpoint.bytes / 1e6:.1f} MB, checksums verified"
            rows.append(("resumes from" if checkpoint.used else "older", f"{checkpoint.name} ({size})"))
    rows += [("changed", change) for change in found.changed]
    rows += [("compared", ", ".join(found.compared))] if found.compared else []
    rows += [("not compared", text) for text in found.not_compared]
    if found.possible:
        left = found.max_steps - (found.step or 0)
        rows.append(
            ("can resume", f"yes, {left} steps are left" if left else "yes, and nothing is left to train")
        )
        because = "no, because " + "; ".join(found.inexact) + "." if found.inexact else "yes"
        rows.append(("byte-exact", because))
        rows.append(("continue", found.command))
    else:
        rows.append(("can resume", f"no: {found.because}"))
        rows += [("fix", found.fix)] if found.fix else []
    return "\n".join(f"{name:<13} {text}" for name, text in rows)


def backends(arguments: Sequence[str]) -> int:
    """The command ``backends``."""
    own, rest = own_flags("backends", arguments, values=(), switches=("--json",))
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}.", fix="retrain backends [--json].")
    with streams.results(alone="--json" in own) as out:
        from retrain.cli import inventory

        found = inventory.backends()
        if "--json" in own:
            _json(out, found)
        else:
            out.line(inventory.backends_text(found))
    return 0


def plugins(arguments: Sequence[str]) -> int:
    """The command ``plugins``."""
    own, rest = own_flags("plugins", arguments, values=("--config",), switches=("--json",))
    wrong = [word for word in rest if word.startswith("-")] or rest[1:]
    if wrong:
        raise UsageError(f"unexpected argument {wrong[0]!r}.", fix="retrain plugins [KIND] [--json].")
    with streams.results(alone="--json" in own) as out:
        from retrain.cli import inventory

        found = inventory.listing(rest[0] if rest else "", own.get("--config", ""))
        if "--json" in own:
            _json(out, found)
        else:
            out.line(inventory.listing_text(found, alone=bool(rest)))
    return 0


def _json(out: streams.Results, value: Mapping[str, Any]) -> None:
    import json

    out.record(json.dumps(value, ensure_ascii=False))
