"""A training run from the command line: finds the configuration, asks what must be asked, handles Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from retrain.cli import dotenv
from retrain.config import templates
from retrain.config.load import LoadedConfig, Override, Source, load
from retrain.config.options import CommandLine, parse
from retrain.config.squeezes import is_squeeze
from retrain.errors import ConfigError, ResumeError, UsageError
from retrain.tracking import layout
from retrain.types import RunResult

DEFAULT_CONFIG = Path("retrain.toml")
DEMO_DIR = Path("logs/demo")

EXIT_INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """``retrain [CONFIG] [--flag value ...]``."""
    if arguments and not arguments[0].startswith("-"):
        _check_is_file(arguments[0], arguments[1:])
    line = parse(arguments)
    dotenv.load()
    source = _source(line)
    if source is None:
        return _no_config()
    loaded = load(source, line.overrides)
    if loaded.config.campaign is not None:
        return _campaign(loaded, line)
    if is_squeeze(loaded.config):
        from importlib import import_module

        from retrain.cli.commands import COMMANDS

        module, _, name = COMMANDS["squeeze"][0].partition(":")
        return getattr(import_module(module), name)(arguments)
    if _is_new_run_in_a_used_directory(loaded, line) and sys.stdin.isatty() and sys.stdout.isatty():
        choice = _ask_about(loaded.config.logging.log_dir)
        if choice == "q":
            return 2
        if choice == "r":
            continued = Override.of("resume.from", loaded.config.logging.log_dir, "--resume")
            loaded = load(source, [*line.overrides, continued])
        line.switches |= {"f": {"--fork"}, "o": {"--overwrite"}}.get(choice, set())
    return _exit_code(_execute(loaded, line))


def _campaign(loaded: LoadedConfig, line: CommandLine) -> int:
    """Many runs as one: a new campaign, or the one that --resume names."""
    for switch in ("--overwrite", "--fork"):
        if switch in line.switches:
            raise UsageError(
                f"{switch} is for one run: a campaign always has a folder of its own.", fix="leave it out."
            )
    stop = threading.Event()
    with _signals(stop):
        from retrain.campaign.run import execute, keeps, stored

        resumed = loaded.config.resume.from_
        if resumed and keeps(directory := _home_expanded(resumed, "resume.from"), loaded.path):
            loaded = stored(directory, line.overrides)
        result = execute(loaded, plain="--plain" in line.switches, stop=stop)
    left = sum(count for state, count in result.counts.items() if state != "done")
    if left:
        print(f"{left} of {sum(result.counts.values())} runs are not done. Go on with: {_program()} --resume {result.directory}")
    print(f"Look at it: {_program()} report {result.directory}")
    return {"done": 0, "failed": 1, "interrupted": EXIT_INTERRUPTED}[result.status]


def demo(arguments: Sequence[str]) -> int:
    """``retrain demo [--flag value ...]``: the template ``tiny``, with a fixed seed, in a free folder."""
    line = parse(arguments)
    if line.config is not None:
        raise UsageError(f"unexpected argument {line.config!r}.", fix="retrain demo takes only --flag value.")
    dotenv.load()
    if any(o.path == ("resume", "from") for o in line.overrides):
        return run(arguments)
    if (
        not any(o.path == ("logging", "log_dir") for o in line.overrides)
        and "--overwrite" not in line.switches
    ):
        place = _free_directory(DEMO_DIR)
        if place != DEMO_DIR:
            print(f"{DEMO_DIR} holds a run already: this one goes to {place}.")
            line.overrides.append(Override.of("logging.log_dir", str(place)))
    loaded = load(Path(templates.path_of("tiny")), line.overrides, label="template tiny")
    result = _execute(loaded, line)
    if result.status == "done":
        print(_demo_summary(Path(result.run_dir)))
        return 0
    return _exit_code(result)


def _source(line: CommandLine) -> Source:
    if line.config is not None:
        _check_is_file(line.config, ())
        return Path(line.config)
    resumed = next((o.value for o in line.overrides if o.path == ("resume", "from")), None)
    if resumed:
        directory = _home_expanded(str(resumed), "--resume")
        # os.path answers False where Path raises: no permission, a name that is too long.
        if not os.path.isfile(directory / layout.CONFIG):
            raise ResumeError(
                f"--resume: {directory} holds no run (there is no {layout.CONFIG} in it).",
                fix="name the log_dir of an earlier run.",
            )
        return directory / layout.CONFIG
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def _check_is_file(word: str, rest: Sequence[str]) -> None:
    """A word that is neither a file nor looks like a path was most likely meant as a command; a folder may be a run."""
    if os.path.isdir(word) and layout.holds_run(Path(word)):
        raise UsageError(
            f"{word} is a run, not a configuration.",
            fix=f"retrain --resume {word} goes on with it, retrain status {word} and retrain report {word} show it.",
        )
    if os.path.exists(word) or os.path.basename(word) != word or word.endswith(".toml"):
        return
    named = next((w for w in rest if not w.startswith("-")), "")
    if word in ("train", "run"):
        raise UsageError(f"there is no command {word!r}: a run needs none.", fix=f"retrain {named or 'my.toml'}.")
    if word == "resume":
        raise UsageError("there is no command 'resume'.", fix=f"retrain --resume {named or 'logs/my-run'}.")
    import difflib

    from retrain.cli.commands import COMMANDS, LATER

    near = difflib.get_close_matches(word, [*COMMANDS, *LATER], n=1)
    hint = f"did you mean retrain {near[0]}?" if near else "`retrain --help` lists the commands."
    raise UsageError(f"there is no command and no file {word!r}.", fix=hint)


def _no_config() -> int:
    if sys.stdin.isatty() and sys.stdout.isatty():
        from retrain.cli import create

        print(f"There is no {DEFAULT_CONFIG} here. Templates:\n{create.listing()}")
        answer = _answer(f"Write one as {DEFAULT_CONFIG}? Name a template, or press Enter for none: ")
        if answer:
            return create.init(["--template", answer])
    raise UsageError(
        f"no configuration: there is no {DEFAULT_CONFIG} here and none was named.",
        fix="`retrain demo` trains the embedded model, `retrain init` writes a configuration, "
        "`retrain path/to/config.toml` runs one, `retrain man` explains.",
    )


def _answer(question: str) -> str:
    """What the user types; nothing when the input ends."""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


def _is_new_run_in_a_used_directory(loaded: LoadedConfig, line: CommandLine) -> bool:
    config = loaded.config
    if config.resume.from_:
        _home_expanded(config.resume.from_, "resume.from")
        return False
    directory = _home_expanded(config.logging.log_dir, "logging.log_dir")
    return not line.switches & {"--overwrite", "--fork"} and layout.holds_run(directory)


def _home_expanded(path: str, key: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{key} = {path!r}: there is no such home directory.", fix="write the path in full."
        ) from error


def _ask_about(log_dir: str) -> str:
    print(f"{log_dir} already holds a run.")
    choices = {"r": "resume it", "f": "start beside it, in a new folder", "o": "overwrite it", "q": "quit"}
    while True:
        for key, meaning in choices.items():
            print(f"  {key}  {meaning}")
        answer = _answer("What should happen? ").lower()[:1] or "q"
        if answer in choices:
            return answer


def _execute(loaded: LoadedConfig, line: CommandLine) -> RunResult:
    stop = threading.Event()
    with _signals(stop):
        # Importing the runner's parts takes seconds; a Ctrl-C meanwhile is remembered.
        from retrain.runner import execute

        return execute(
            loaded,
            overwrite="--overwrite" in line.switches,
            fork="--fork" in line.switches,
            debug="--debug" in line.switches,
            plain="--plain" in line.switches,
            stop=stop,
        )


def _exit_code(result: RunResult) -> int:
    if result.status == "interrupted":
        print(f"Interrupted after {result.steps} steps. Continue with: {_program()} --resume {result.run_dir}")
    elif result.status == "done":
        print(f"Look at it: {_program()} report {result.run_dir}, or status, sample, eval, export.")
    return {"done": 0, "failed": 1, "interrupted": EXIT_INTERRUPTED}[result.status]


@contextmanager
def _signals(stop: threading.Event) -> Generator[None]:
    """The first Ctrl-C or SIGTERM sets ``stop``; the second ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            # No clean-up: a running kernel or a lock would keep exit handlers waiting.
            launchers = sys.modules.get("retrain.campaign.launchers")
            if launchers is not None:
                launchers.kill_all()
            os.write(2, b"\nStopped at once; the newest checkpoint is what is left.\n")
            os._exit(EXIT_INTERRUPTED)
        stop.set()
        note = "Finishing this step and saving. Press Ctrl-C again to stop at once."
        live = sys.modules.get("retrain.live")
        if live is None or not live.say(note):
            os.write(2, f"\n{note}\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _free_directory(directory: Path) -> Path:
    place, number = directory, 1
    while layout.holds_run(place):
        number += 1
        place = directory.with_name(f"{directory.name}-{number}")
    return place


def _program() -> str:
    """What to type for this program: after `make demo` it stands in an environment that is not on PATH."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "retrain" and shutil.which("retrain") is None else "retrain"


def _demo_summary(directory: Path) -> str:
    """Held-out accuracy before and after, where the results are, and what to try next."""
    found: list[str] = []
    with (directory / layout.METRICS).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    accuracies = [row for row in rows if row.get("eval/accuracy") is not None]
    for name, row in zip(("before", "after"), (accuracies[:1] + accuracies[-1:]), strict=False):
        low, high = row.get("eval/accuracy_low"), row.get("eval/accuracy_high")
        interval = f" [{low:.1%}, {high:.1%}]" if low is not None and high is not None else ""
        found.append(f"  {name:<8}{row['eval/accuracy']:.1%}{interval}")
    header = ["", "Held-out accuracy, with its 95 % interval:", *found] if found else [""]
    return "\n".join(
        [
            *header,
            "",
            f"Run directory: {directory}",
            "Try next:",
            f"  {_program()} demo --transform-mode none --seed 1    another condition or seed",
            f"  {_program()} report {directory!s:<31}    curves and every token's credit, as a page",
            f"  {_program()} sample {directory!s:<31}    talk to what was trained",
            f"  {_program()} init --interactive                     your own run",
            f"  {_program()} man                                    everything else",
        ]
    )
