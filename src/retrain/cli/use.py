"""``retrain eval``, ``retrain sample`` and ``retrain export``: what one does with a run, an adapter or a model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.cli import streams
from retrain.cli.verb import at_once_on_interrupt, own_flags, quiet_loading, whole_number
from retrain.errors import UsageError

if TYPE_CHECKING:
    from retrain.cli.streams import Results
    from retrain.config.load import LoadedConfig
    from retrain.opened import Answer, Talker
    from retrain.subject import Subject

USAGE = {
    "eval": """\
Usage: retrain eval RUN_OR_MODEL [--source S] [--flag value ...]

Accuracy on held-out tasks, with a 95 % interval clustered by task. RUN_OR_MODEL is a run directory, a folder of a PEFT
adapter, a model folder, a model id on Hugging Face, or retrain/tiny. A run's own [eval] is the default, also
for what retrain squeeze wrote of it. Nothing is written.

  --source S --path P --split S --levels L    the tasks (a run's own without --source)
  --examples N --samples K --seed S           how many, how often each, which
  --temperature T --max-tokens M              how they are sampled
  --reward-type R                             what counts as correct: the run's, else math
  --checkpoint C                              of a run: newest (default), best, or a number of steps
  --json                                      print one JSON object
Any other setting that an evaluation looks at has its usual flag: retrain man --topic options.
""",
    "sample": """\
Usage: retrain sample RUN_OR_MODEL [--prompt TEXT] [--flag value ...]

Talks to a model. Without --prompt, --task and --index: a conversation on a terminal (/reset, /quit), one prompt per
line from a pipe. A run's system text and instruction go with the first message of a conversation.

  --prompt TEXT                    one prompt
  --task ID | --index N            a task of the run's training data, with its reference and reward
  --n N                            answers to each prompt
  --raw                            the text alone: no chat template, no instruction
  --temperature T --max-tokens M --seed S
  --checkpoint C                   of a run: newest (default), best, or a number of steps
  --json                           one JSON object per answer
""",
    "export": """\
Usage: retrain export RUN_OR_ADAPTER --output DIR [--merged] [--dtype D]

Writes an adapter for PEFT, or with --merged a whole model for transformers, vLLM and others, computed in float32.

  --output DIR       a new or empty folder
  --merged           base model and adapter in one, with tokenizer and generation config
  --dtype D          of merged weights: auto (the model's own), float32, bf16 or float16
  --checkpoint C     of a run: newest (default), best, or a number of steps
  --overwrite        replace an earlier export in DIR (the files that its retrain_export.json lists); others stay
  --json             print one JSON object
""",
}

_EVAL_ALIASES = {
    f"--{name}": f"--eval.{name}"
    for name in ("source", "path", "split", "examples", "samples", "temperature", "seed", "levels")
}
_DTYPES = {
    "auto": "auto", "float32": "fp32", "fp32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "float16": "fp16", "fp16": "fp16"
}  # fmt: skip
_SAMPLE_ALIASES = {"--split": "--data.split"}


def evaluate(arguments: Sequence[str]) -> int:
    """The command ``eval``."""
    own, rest = own_flags("eval", arguments, values=("--checkpoint",), switches=("--json",))
    with streams.results(alone="--json" in own) as out, quiet_loading():
        from retrain import opened
        from retrain.tracking.run_log import to_json

        target, loaded = _target("eval", rest, own, _EVAL_ALIASES, opened.EVAL_KEYS)

        def show(done: int, total: int, seconds: float) -> None:
            if seconds:
                _show_progress(done, total, seconds)
            else:
                _say(f"{_CLEAR}Evaluating {target.title} on {total} tasks ...")

        _show("loading ...")
        with at_once_on_interrupt(), _line_cleared():
            record = opened.evaluate(target, loaded.config, search_paths=loaded.search_paths, progress=show)
        if "--json" in own:
            out.record(to_json(record))
        else:
            out.line(_report(record))
    return 0


def _report(record: Mapping[str, Any]) -> str:
    metrics, rows = record["metrics"], list[tuple[str, str]]()
    for prefix in (key.removesuffix("/accuracy") for key in metrics if key.endswith("/accuracy")):
        part = {k[len(prefix) + 1 :]: v for k, v in metrics.items() if k.rpartition("/")[0] == prefix}
        rows += _rows(part, record["settings"]["reward"])
    weights = record["weights"]
    adapter = f", adapter {weights['adapter']}" if weights["adapter"] else ""
    rows.append(("weights", f"base {weights['base']}{adapter}, {weights['dtype']} on {record['device']}"))
    return "\n".join(
        [*(f"{name:<12} {text}" for name, text in rows), *(f"note: {n}" for n in record["notes"])]
    )


def _rows(m: Mapping[str, Any], reward: str) -> Generator[tuple[str, str]]:
    yield "tasks", f"{m['source']}, {m['tasks']} x {m['samples'] or 'varying'}"
    if m["accuracy"] is None:
        yield "accuracy", "unknown: rewards outside [0, 1] need --correct-at"
    else:
        interval = f"{m['accuracy_low']:.1%} to {m['accuracy_high']:.1%}"
        yield "accuracy", f"{m['accuracy']:.1%}, 95 % interval {interval}, clustered by task"
    for key, value in m.items():
        if key.startswith(("mean@", "pass@")) and not key.endswith("@1") and value is not None:
            yield key, f"{value:.1%}"
    if m["mean_reward"] is not None:
        yield "mean reward", f"{m['mean_reward']:.4f} ({reward})"
    if m.get("mean_length") is not None:
        yield "mean length", f"{m['mean_length']:.1f} tokens; {m['max_token_hit_rate']:.1%} cut at max_tokens"
    yield "errors", str(m["errors"])
    yield "time", f"{m['time_s']:.1f} s"


def sample(arguments: Sequence[str]) -> int:
    """The command ``sample``."""
    own, rest = own_flags(
        "sample",
        arguments,
        values=("--checkpoint", "--prompt", "--task", "--index", "--n"),
        switches=("--json", "--raw"),
    )
    chosen = [flag for flag in ("--prompt", "--task", "--index") if flag in own]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]} exclude each other.", fix="give one of them.")
    if "--raw" in own and chosen[:1] in (["--task"], ["--index"]):
        raise UsageError(f"--raw samples a text, and {chosen[0]} a task.", fix="leave --raw out.")
    n = whole_number(own.get("--n", "1"), "--n", least=1)
    index = whole_number(own["--index"], "--index", least=0) if "--index" in own else None
    with streams.results(alone="--json" in own) as out, quiet_loading():
        import secrets

        from retrain import opened
        from retrain.config.load import Override
        from retrain.subject import is_text

        if not is_text(own.get("--prompt", "")):
            raise UsageError("--prompt is not valid UTF-8.", fix="correct its bytes.")
        seeded = any(
            flag.partition("=")[0] in ("--seed", "--training-seed", "--training.seed") for flag in rest
        )
        drawn = () if seeded else (Override.of("training.seed", secrets.randbelow(2**31), "--seed"),)
        target, loaded = _target("sample", rest, own, _SAMPLE_ALIASES, opened.SAMPLE_KEYS, drawn)
        wanted = own.get("--task", index)
        task = None if wanted is None else opened.task_of(target, loaded.config, wanted)
        typed = not chosen and streams.is_terminal()
        failed = False
        with (
            at_once_on_interrupt(),
            opened.talker(target, loaded.config, search_paths=loaded.search_paths) as talker,
        ):
            if task is not None:
                messages = [{"role": m.role, "content": m.content} for m in task.messages]
                _print(out, talker, {"task": task.id, "messages": messages}, talker.attempts(task, n), own)
            elif "--prompt" in own:
                _one(out, talker, own["--prompt"], n, own)
            elif typed:
                _converse(out, talker, n, own)
            else:
                failed = _each_line(out, talker, n, own)
    return 1 if failed else 0


def _one(out: Results, talker: Talker, prompt: str, n: int, own: Mapping[str, str]) -> None:
    conversation = prompt if "--raw" in own else talker.opening(prompt)
    _print(out, talker, {"prompt": prompt}, talker.answers(conversation, n), own)


def _each_line(out: Results, talker: Talker, n: int, own: Mapping[str, str]) -> bool:
    """Answers to every line of stdin; True when some could not be asked, which the output says in their place."""
    from retrain.tracking.run_log import to_json

    failed = False
    for number, prompt, valid in streams.lines():
        try:
            if not valid:
                raise UsageError("the prompt is not valid UTF-8.")
            _one(out, talker, prompt, n, own)
        except UsageError as error:
            failed = True
            if "--json" in own:
                seed = talker.config.training.seed
                said = {"prompt": prompt, "seed": seed, "line": number, "text": None, "error": error.message}
                out.record(to_json({**talker.identity, **said}))
            else:
                out.line(f"[failed: line {number}: {error.message}]")
    return failed


def _print(
    out: Results,
    talker: Talker,
    question: Mapping[str, Any],
    answers: Sequence[Answer],
    own: Mapping[str, str],
) -> None:
    from dataclasses import asdict

    from retrain.tracking.run_log import to_json

    for member, answer in enumerate(answers):
        if "--json" in own:
            found = {k: v for k, v in asdict(answer).items() if k != "reference" or v is not None}
            seed = talker.config.training.seed
            out.record(to_json({**talker.identity, **question, "seed": seed, "member": member, **found}))
            continue
        if len(answers) > 1:
            out.line(f"--- {member + 1} of {len(answers)}")
        out.line(answer.text)
        cut = [f"cut after {answer.tokens} tokens"] if answer.stop == "length" else []
        scored = [f"reference {answer.reference}"] if answer.reference is not None else []
        if answer.reward is not None:
            scored.append(f"reward {answer.reward:g}{' (correct)' if answer.correct else ''}")
        failed = [f"failed: {answer.error}"] if answer.error else []
        if cut or scored or failed:
            out.line(f"[{'; '.join([*scored, *cut, *failed])}]")


def _converse(out: Results, talker: Talker, n: int, own: Mapping[str, str]) -> None:
    """A conversation on a terminal; the model sees all of it, and of several answers the last."""
    from retrain.types import Message

    print("/reset begins anew, /quit or Ctrl-D ends.")
    messages: list[Message] = []
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("that was not valid UTF-8.")
            continue
        if prompt == "/quit":
            return
        if prompt == "/reset":
            messages = []
        elif prompt:
            try:
                asked = [*messages, Message("user", prompt)] if messages else talker.opening(prompt)
                answers = talker.answers(prompt if "--raw" in own else asked, n)
            except UsageError as error:
                streams.Results(sys.stdout).line(
                    f"{error.message} /reset begins anew." if messages else f"{error}"
                )
                continue
            messages = [*asked, Message("assistant", answers[-1].text)]
            _print(out, talker, {"prompt": prompt}, answers, own)


def export(arguments: Sequence[str]) -> int:
    """The command ``export``."""
    own, rest = own_flags(
        "export",
        arguments,
        values=("--checkpoint", "--output", "--dtype"),
        switches=("--json", "--merged", "--overwrite"),
    )
    if not own.get("--output"):
        raise UsageError("export needs --output.", fix="name a new folder: --output DIR.")
    dtype = own.get("--dtype", "auto")
    if "--dtype" in own and "--merged" not in own:
        raise UsageError("--dtype is that of a merged model.", fix="add --merged, or leave it out.")
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype} is unknown.", fix="use auto, float32, bf16 or float16.")
    with streams.results(alone="--json" in own) as out, quiet_loading():
        from retrain import opened
        from retrain.tracking.run_log import to_json

        target, loaded = _target(
            "export", rest, own, {}, ("model.model", "model.revision", "backend.devices")
        )
        with at_once_on_interrupt():
            record = opened.export(
                target,
                loaded.config,
                Path(own["--output"]),
                merged="--merged" in own,
                dtype=_DTYPES[dtype],
                overwrite="--overwrite" in own,
            )
        if "--json" in own:
            out.record(to_json(record))
        else:
            out.line(f"Wrote {record['output']} ({record['subject']}).\n{record['use']}")
    return 0


def _target(
    command: str,
    rest: Sequence[str],
    own: Mapping[str, str],
    aliases: Mapping[str, str],
    acting: Sequence[str],
    more: Sequence[Any] = (),
) -> tuple[Subject, LoadedConfig]:
    """What the command is pointed at, and the configuration to use it with."""
    from retrain.cli import dotenv
    from retrain.config.options import parse
    from retrain.subject import configure, find, with_its_run

    line = parse(
        rest, aliases, positional="run or adapter" if command == "export" else "run, adapter or model"
    )
    if line.config is None:
        what = (
            "a run directory or an adapter folder"
            if command == "export"
            else "a run directory, an adapter folder or a model"
        )
        raise UsageError(
            f"retrain {command} needs {what}.", fix=f"retrain {command} logs/train, for example."
        )
    with contextlib.redirect_stdout(sys.stderr):
        dotenv.load()
    target = find(line.config, own.get("--checkpoint", ""))
    if command == "eval":
        target = with_its_run(target)
    return target, configure(target, [*line.overrides, *more], acting, command)


def _say(text: str) -> None:
    print(text if sys.stderr.isatty() else text.removeprefix(_CLEAR), file=sys.stderr, flush=True)


_CLEAR = "\r\033[K"
_shown = {"at": 0.0}


def _show(text: str) -> None:
    """A line that the next one replaces, on a terminal only."""
    if sys.stderr.isatty():
        print(f"{_CLEAR}{text} ", end="", file=sys.stderr, flush=True)


@contextmanager
def _line_cleared() -> Generator[None]:
    try:
        yield
    finally:
        if sys.stderr.isatty():
            print(_CLEAR, end="", file=sys.stderr, flush=True)


def _show_progress(done: int, total: int, seconds: float) -> None:
    """Every second in place on a terminal, every half minute as a line elsewhere."""
    text = f"{done} of {total} rollouts, {seconds:.0f} s"
    _show(text)
    if not sys.stderr.isatty() and seconds - _shown["at"] >= 30:
        _shown["at"] = seconds
        _say(text)
