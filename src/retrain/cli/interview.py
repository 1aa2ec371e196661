"""``retrain init --interactive``: a few questions, each answer checked at once, and a configuration that loads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from retrain.config import names, templates
from retrain.errors import ConfigError, DataError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from retrain.config.schema import Config

GOALS: dict[str, tuple[str, str]] = {
    "demo": ("tiny", "see it learn on this machine's CPU, in minutes"),
    "quickstart": ("quickstart", "check the whole path on a GPU, 20 short steps"),
    "experiment": ("experiment", "a long run with every setting of SEPA written out"),
    "robust": ("robust", "a starting point for a real run, to sweep from"),
    "own": ("robust", "train on my own problems (a JSONL file)"),
}
"""What one may want, the template that this starts from, and in words."""

_ABOUT = {
    "default": "a full run",
    "quickstart": "a short run that shows that everything works, not that the model learns",
    "experiment": "every setting of SEPA written out, to change one at a time",
    "robust": "its rates are for 1.5 to 8 billion weights, to be swept from, the learning rate first",
    "tiny": "sizes that the embedded model learns with in minutes",
}
"""What a template's values are, whatever model and data the answers name."""

_SMALL_EVAL = {"eval.every": 10, "eval.examples": 64}
"""Of a template that holds nothing out, where its source has a test split: little beside the steps themselves."""

_STOPPED = "Nothing was written."


class Stopped(Exception):
    """The user left: Ctrl-D or Ctrl-C."""


def interview(path: str, template: str = "") -> str:
    """Ask, and return the TOML text for ``path``; ``Stopped`` when the user leaves.

    UsageError where nobody can answer: stdin is not a terminal and holds too few lines.
    """
    try:
        return _interview(path, template)
    except (EOFError, KeyboardInterrupt):
        raise Stopped from None


def _interview(path: str, template: str) -> str:
    print(f"A few questions; Enter takes what stands in brackets, Ctrl-D leaves. {path} is written at the end.\n")
    goal = template
    if not goal:
        goal = _choice("What do you want?", {name: text for name, (_, text) in GOALS.items()}, "demo")
    base = GOALS[goal][0] if goal in GOALS else goal
    changes: dict[str, Any] = {}
    folder = os.path.dirname(os.path.abspath(path))
    if base != "tiny":
        model = _ask("Model (Hugging Face id or local folder)", _value(base, "model.model"), lambda text: _model(text, goal))
        if model == names.TINY_MODEL:
            base = "tiny"
        changes["model.model"] = model
        changes["training.max_tokens"] = _max_tokens(base, model, folder)
        changes["backend.devices"] = _device(model)
    changes.update(_own_data(folder, base) if goal == "own" else _held_out(base))
    if goal == "own" or base != "tiny":
        changes.update(_reward(_value(base, "reward.type")))
    steps = str(_value(base, "training.max_steps"))
    changes["training.max_steps"] = _ask("Training steps", steps, lambda text: _setting("training.max_steps", text))
    trackers = {"none": "files only", **dict.fromkeys(names.BUILT["sink"][1:], "")}
    tracker = _choice("Experiment tracker besides the run directory?", trackers, "none")
    if tracker != "none":
        changes["logging.trackers"] = [tracker]
    default = "logs/own" if goal == "own" else _value(base, "logging.log_dir")
    changes["logging.log_dir"] = _ask("Run directory", default, lambda text: _setting("logging.log_dir", text))
    changes = {**_ramp(base, changes["training.max_steps"]), **changes}
    text = _headed(_changed(templates.read(base), changes), base, path)
    _load(text, folder)
    return text


def _device(model: str) -> str:
    """The device, by default one that is here; says what a large model on the CPU means."""
    from retrain import cards

    default = "cpu"
    if model != names.TINY_MODEL:
        if cards.present("gpu:0", speed=False).kind == "cuda":
            default = "gpu:0"
        else:
            print("  No GPU was found here.")
    device = _ask("Device (gpu:0 or cpu)", default, lambda text: _setting("backend.devices", text))
    if device == "cpu" and model != names.TINY_MODEL:
        print("  On the CPU large models are slow, a step may take hours: `retrain explain` says how long.")
    return device


def _positions(model: str, folder: str) -> int:
    """Tokens that a model can hold, by its config.json or the table of well-known ones; 0 where neither says."""
    from pathlib import Path

    from retrain import cards
    from retrain.errors import ModelError

    try:
        found = getattr(cards.look_up(model, beside=Path(folder)).config, "max_position_embeddings", None)
    except ModelError:
        return 0
    return found if type(found) is int and found > 0 else 0


def _max_tokens(base: str, model: str, folder: str) -> int:
    """The template's longest answer, or what leaves a quarter of the model's positions to the problem."""
    wanted: int = _value(base, "training.max_tokens")
    positions = _positions(model, folder)
    return min(wanted, max(1, positions * 3 // 4)) if positions else wanted


def _own_data(folder: str, base: str) -> dict[str, Any]:
    """[data] and [eval] of one's own files; the template's held-out tasks say nothing about them."""
    found = _ask("Your JSONL file, one problem a line", "", lambda text: _data(text, folder))
    changes: dict[str, Any] = {"data.source": "jsonl", "data.path": found, "data.levels": None}
    if base == "tiny":
        from retrain.environments.arithmetic import TINY_INSTRUCTION

        # The wording that the embedded model was trained with.
        changes["data.instruction"] = TINY_INSTRUCTION
    fields = _fields(_first_row(found, folder))
    held = _ask(
        "Held-out JSONL file, problems that training does not see (none: no accuracy is measured)",
        found if _has_split(found, folder) else "none", lambda text: _held_file(text, found, folder, fields),
    )  # fmt: skip
    return changes | fields | ({"eval.source": "jsonl", "eval.path": held} if held else {"eval": None})


def _held_file(text: str, trained: str, folder: str, fields: Mapping[str, str]) -> str:
    """The path of held-out problems, "" for none; ValueError for the trained ones, or for other fields."""
    if text == "none":
        return ""
    row = _first_row(text, folder, "test")
    if os.path.realpath(_file(text, folder, "test")) == os.path.realpath(_file(trained, folder)):
        raise ValueError("that is the file that is trained on: its accuracy would not be a held-out one.")
    wanted = [fields.get(f"data.fields.{ours}", ours) for ours in ("question", "answer")]
    missing = [name for name in wanted if name not in row]
    if missing:
        raise ValueError(f"it needs the same fields: the first row has no {' and no '.join(missing)}.")
    return text


def _has_split(text: str, folder: str) -> bool:
    """Is it a folder that holds test problems as well?"""
    try:
        return _file(text, folder, "test") != _file(text, folder)
    except ValueError:
        return False


def _held_out(base: str) -> dict[str, Any]:
    """[eval] of a built-in source with a test split, where the template has none."""
    source = _value(base, "data.source")
    if _value(base, "eval.source") or source not in ("math", "gsm8k", "arithmetic"):
        return {}
    return {"eval.source": source, **_SMALL_EVAL}


def _reward(default: str) -> dict[str, Any]:
    kinds = {
        "math": "the last \\boxed{...} must have the reference's value",
        "match": "the last \\boxed{...} must equal the reference as text",
        "custom": "a Python function of mine",
    }
    kind = _choice("How is an answer judged?", kinds, default)
    if kind != "custom":
        return {"reward.type": kind}
    return {
        "reward.type": kind,
        "reward.custom_module": _ask("Module with your function score(response, reference)", "", _module),
    }


def _ramp(base: str, steps: int) -> dict[str, int]:
    """Warm-up and SEPA's ramp, shortened with the run where they would no longer fit into it."""
    whole: int = _value(base, "training.max_steps")
    if steps >= whole:
        return {}
    config = _template(base)
    lengths: dict[str, int] = {}
    if 2 * config.training.warmup_steps > steps:
        lengths["training.warmup_steps"] = config.training.warmup_steps
    if config.algorithm.transform_mode.startswith("gtpo_sepa") and config.sepa.delay_steps + config.sepa.steps > steps:
        lengths |= {"sepa.delay_steps": config.sepa.delay_steps, "sepa.steps": config.sepa.steps}
        if config.sepa.schedule == "auto":
            lengths["sepa.warmup_updates"] = config.sepa.warmup_updates
    least = {"sepa.steps": 1, "sepa.warmup_updates": 1}
    return {key: max(least.get(key, 0), length * steps // whole) for key, length in lengths.items()}


def _headed(text: str, base: str, path: str) -> str:
    """The text under a header about what it says now: the template's own speaks of its model, data and sizes."""
    import tomlkit

    document: Any = tomlkit.parse(text)
    data = document["data"]
    learns = data["path"] if data["source"] == "jsonl" else f"the source {data['source']}"
    start = "retrain" if path == "retrain.toml" else f"retrain {path}"
    lines = text.splitlines(keepends=True)
    body = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return (
        f"# {document['model']['model']} on {learns}, {document['training']['max_steps']} steps on"
        f" {document['backend']['devices']}. Start it with: {start}\n"
        f"# From the template {base}: {_ABOUT[base]}.\n"
        "# Every setting with its range: retrain man --topic options\n" + "".join(lines[body:])
    )


def _input(prompt: str) -> str:
    answer = input(prompt)
    if not answer.isprintable():
        raise ValueError("that holds characters that cannot be shown.")
    return answer.strip()


def _ask(question: str, default: Any, check: Callable[[str], Any]) -> Any:
    """Ask until ``check`` takes the answer; it returns the value or raises ValueError with what is wrong."""
    shown = f" [{default}]" if default != "" else ""
    while True:
        try:
            return check(_input(f"{question}{shown}: ") or str(default))
        except ValueError as error:
            print(f"  {error}")


def _choice(question: str, choices: dict[str, str], default: str) -> str:
    print(question)
    for number, (name, text) in enumerate(choices.items(), start=1):
        print(f"  {number}  {name:<12}{text}".rstrip())

    def check(answer: str) -> str:
        listed = list(choices)
        if answer.isdecimal() and 1 <= int(answer) <= len(listed):
            return listed[int(answer) - 1]
        fitting = [name for name in listed if answer and name.startswith(answer.lower())]
        if len(fitting) == 1 or answer.lower() in fitting:
            return answer.lower() if answer.lower() in fitting else fitting[0]
        raise ValueError(f"answer with a number from 1 to {len(listed)}, or a name.")

    return _ask("Your choice", default, check)


def _value(template: str, key: str) -> Any:
    """What a template, or else the default, says."""
    from retrain.config.idle import get

    return get(_template(template), key)


def _template(name: str) -> Config:
    from retrain.config.load import load

    return load(templates.path_of(name)).config


def _setting(key: str, text: str) -> Any:
    """A setting's value from text; ValueError in the loader's own words."""
    from retrain.config.fields import settings
    from retrain.config.load import Override, load
    from retrain.config.options import value_of

    value = value_of(settings()[key], text)
    try:
        load({"model": {"model": names.TINY_MODEL}, "data": {"source": "arithmetic"}}, [Override.of(key, value, " ")])
    except ConfigError as error:
        lines = [line.removeprefix(" : ").strip() for line in str(error).splitlines()]
        raise ValueError(next((line for line in lines if key in line), lines[-1])) from None
    return value


def _model(text: str, goal: str) -> str:
    if text == names.TINY_MODEL and goal != "own":
        raise ValueError(f"{text} only knows short sums, not these problems; `retrain init --template tiny` is for it.")
    if not text or any(c.isspace() for c in text):
        raise ValueError("that is neither an id such as Qwen/Qwen3-4B-Instruct-2507 nor a folder.")
    folder = os.path.expanduser(text)
    if os.path.isdir(folder):
        if not os.path.exists(os.path.join(folder, "config.json")):
            raise ValueError(f"{text} holds no config.json, so it is no model.")
        return text
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(f"there is no folder {text}, and an id has the form name/model.")
    return _setting("model.model", text)


def _data(text: str, folder: str) -> str:
    """The path as given, when it holds a first row that can be read."""
    if not text:
        raise ValueError("name a file, such as problems.jsonl.")
    _first_row(text, folder)
    return text


def _file(text: str, folder: str, split: str = "train") -> Path:
    """The file that ``data.path`` names in a configuration in ``folder``; ValueError where a run finds none."""
    from retrain.environments.reading import split_file

    beside = os.path.join(folder, os.path.expanduser(text))
    try:
        return split_file(beside if os.path.exists(beside) else text, split)
    except DataError as error:
        raise ValueError(error.message.removeprefix("data.path = ")) from None


def _first_row(text: str, folder: str, split: str = "train") -> dict[str, Any]:
    """The first row of that file, read as a run does; ValueError for what a run would refuse."""
    from retrain.environments.reading import rows

    file = _file(text, folder, split)
    try:
        for _, row in rows(file):
            return row
    except DataError as error:
        raise ValueError(error.message) from None
    raise ValueError(f"{file} holds no row.")


def _fields(row: Mapping[str, Any]) -> dict[str, str]:
    """Which fields of the first row hold question and answer, asked for where they have other names than ours."""
    found: dict[str, str] = {}
    for ours, usual in (
        ("question", ("question", "problem", "prompt", "input")), ("answer", ("answer", "reference", "solution", "output")),
    ):  # fmt: skip
        if ours in row:
            continue
        likely = next((name for name in usual if name in row), "")

        def check(text: str) -> str:
            if text not in row:
                raise ValueError(f"the first row has {', '.join(map(str, row)) or 'no fields'}.")
            return text

        found[f"data.fields.{ours}"] = _ask(f"Field that holds the {ours}", likely, check)
    return found


def _module(text: str) -> str:
    if not all(part.isidentifier() for part in text.split(".")):
        raise ValueError("that is no name of a module; my_reward stands for plugins/my_reward.py.")
    return text


def _changed(text: str, changes: dict[str, Any]) -> str:
    """The template with other values, its comments kept where they still hold; None takes a section or a key out."""
    import tomlkit

    document: Any = tomlkit.parse(text)
    fields: dict[str, str] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if value is None:
            (document.get(section, {}) if name else document).pop(name or section, None)
            continue
        if name.startswith("fields."):
            fields[name.removeprefix("fields.")] = value
            continue
        table = document.setdefault(section, tomlkit.table())
        if table.get(name) == value:
            continue
        table[name] = value
        table[name].trivia.comment_ws, table[name].trivia.comment = "", ""
    if fields:
        inline: Any = tomlkit.inline_table()
        inline.update(fields)
        document["data"]["fields"] = inline
    return tomlkit.dumps(document).rstrip("\n") + "\n"


def _load(text: str, folder: str) -> None:
    """Prove that the text loads; what does not is a defect of the questions, and is said."""
    import tempfile
    from pathlib import Path

    from retrain.config.load import load

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "retrain.toml"
        path.write_text(text, encoding="utf-8")
        load(path, label=os.path.join(folder, "retrain.toml"))


def run(path: str, template: str, create: Callable[[str], None]) -> int:
    """Ask, write by ``create``, and say what comes next; 130 when the user left."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("--interactive asks questions, and there is nobody to answer.", fix="name a --template.")
    try:
        text = interview(path, template)
    except Stopped:
        print(f"\n{_STOPPED}", file=sys.stderr)
        return 130
    try:
        create(text)
    except UsageError:
        print(f"\n{text}\nThat is what your answers say.", flush=True)
        raise
    shown = "" if path == "retrain.toml" else f" {path}"
    print(f"\nWrote {path}.\nNext: retrain explain{shown}, then start it with: retrain{shown}")
    return 0
