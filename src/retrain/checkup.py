"""What a run would meet, looked at without one: every cheap check of a configuration on this machine. Each finding is a
``Check``; the checks themselves are those of a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from retrain import estimate, machine, plugins, preflight
from retrain.adapter_settings import check_start_adapter
from retrain.algorithms import credit
from retrain.config.load import LoadedConfig
from retrain.config.names import TINY_MODEL
from retrain.config.own import named_plugins
from retrain.config.schema import Config
from retrain.config.tables import rewards_by_source
from retrain.environments.mixture import training_tasks
from retrain.errors import ConfigError, ModelError, RetrainError, RunError
from retrain.machine import Check, Status
from retrain.protocols import Renderer, Reward
from retrain.training import build, dry
from retrain.training.own_parts import make_environment
from retrain.training.rollout import EventLoop
from retrain.training.self_check import Report, check_references, try_credit
from retrain.types import Message, Task

T = TypeVar("T")

_SAMPLE = 8
"""Tasks whose reference is scored without ``--tasks``."""
_BAD_SHARE = 0.05
"""Share of refused references from which data and reward do not fit each other."""
_FOREVER = 1e9
_UNKNOWN = "retrain CONFIG --debug shows where it is raised."
_NOT_TRIED = ("backend", "engine", "loss", "sink")
"""Kinds of plug-in that only a run can try: they want a device, a model or an account."""

log = logging.getLogger("retrain")


def machine_checks(loaded: LoadedConfig | None) -> list[Check]:
    """The machine's own checks, for runs in the configuration's directory or in ``logs``."""
    directory = Path(loaded.config.logging.log_dir if loaded else "logs")
    with contextlib.suppress(
        RuntimeError
    ):  # a home directory that does not exist is found by the run's own check
        directory = directory.expanduser()
    torch = machine.ask_torch()
    found = machine.checks(directory, torch)
    if loaded is not None and loaded.config.backend.backend == "local":
        found += _device(loaded.config, torch)
    return found


def _device(config: Config, torch: Mapping[str, Any]) -> list[Check]:
    wanted, count = config.backend.devices, len(torch["devices"])
    index = int(wanted.partition(":")[2] or 0) if wanted != "cpu" else -1
    what = f"backend.devices = {wanted!r}"
    if not torch.get("version") or index < 0:
        return []
    if count == 0:
        return [Check("run", "device", "warning", f"{what}: no CUDA device here, the run would use the CPU",
                      'write backend.devices = "cpu" if that is meant.')]  # fmt: skip
    if index >= count:
        return [Check("run", "device", "problem", f"{what}: this machine has {count} CUDA devices",
                      f'write backend.devices = "gpu:{count - 1}".')]  # fmt: skip
    return [Check("run", "device", "ok", f"{what}: {torch['devices'][index]['name']}")]


class _Checklist:
    """Runs one check after the other and keeps what each found, errors and warnings included."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def add(self, name: str, status: Status, what: str, fix: str = "") -> None:
        """Keep a finding."""
        self.checks.append(Check("run", name, status, what.strip(), fix))

    def ask(
        self, name: str, work: Callable[[], T], say: Callable[[T], str], *, fix: str = _UNKNOWN
    ) -> T | None:
        """What ``work`` returns, described by ``say``; None where it raised, which is then a problem, with ``fix`` for what
        only a library or a plug-in can have raised."""
        with dry.held_warnings() as warned:
            try:
                result = work()
            except ConfigError as error:
                for line in error.problems or (str(error),):
                    what, _, fix = line.partition(" Fix: ")
                    self.add(name, "problem", what, fix)
                return None
            except RetrainError as error:
                self.add(name, "problem", error.message, error.fix)
                return None
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one check that breaks must not hide the others
                first = str(error).strip().partition("\n")[0]
                self.add(name, "problem", f"{type(error).__name__}: {first}".removesuffix(": "), fix)
                return None
        text = say(result)
        if text:
            self.add(name, "ok", text)
        for line in warned:
            self.add(name, "warning", line)
        return result


def config_checks(
    loaded: LoadedConfig, *, every_task: bool, progress: Callable[[int, int], None] | None = None
) -> list[Check]:
    """Every cheap check of a run of ``loaded``; ``every_task`` scores the reference of every task, with ``progress``."""
    with dry.without_torch():
        return _config_checks(loaded, every_task=every_task, progress=progress)


def _config_checks(
    loaded: LoadedConfig, *, every_task: bool, progress: Callable[[int, int], None] | None
) -> list[Check]:
    config, checklist = loaded.config, _Checklist()
    for line in loaded.announcements:
        checklist.add("settings", "warning", line)
    if not loaded.announcements:
        checklist.add("settings", "ok", f"{loaded.path or 'the configuration'} loads")
    checklist.ask("run directory", lambda: _directory(config), str)
    plugins.add_search_paths(loaded.search_paths)
    checklist.ask("plug-ins", lambda: preflight.check_plugins(config), lambda _: _named(config))
    checklist.ask("trackers", lambda: dry.check_trackers(config), str)
    checklist.ask("start adapter", lambda: check_start_adapter(config), lambda found: "fits" if found else "")
    checklist.ask("base model", lambda: _weights(config), str)
    renderer = checklist.ask("tokenizer", lambda: dry.load_renderer(config), _describe)
    checklist.ask("memory", lambda: _memory(config), str)
    if renderer is not None and not renderer.stop_ids and not config.training.stop:
        checklist.add("tokenizer", "warning", "the model names no end token: every answer runs to training.max_tokens",
                      "set training.stop, or use the model's instruct version.")  # fmt: skip
    dealt = checklist.ask("training tasks", lambda: training_tasks(config), lambda d: _counted(d[0]))
    tasks = dealt[0] if dealt else []
    held_out: Sequence[Task] = ()
    if renderer is not None:
        held_out = checklist.ask("held-out tasks", lambda: _held_out(config, renderer), _counted) or ()
        if tasks:
            _prompts(checklist, config, renderer, [*tasks, *held_out])
            _advice(checklist, config, renderer, tasks, held_out)
    # Which tokenizer it is hardly matters to what follows, so that one that is not here hides nothing.
    some = renderer or dry.load_renderer(_with_tiny(config))
    sample = (
        tasks[0] if tasks else Task("made-up", (Message("user", "6 * 7 = ?"),), "42", config.data.source, 0)
    )
    checklist.ask("environment", lambda: make_environment(config, some), lambda _: _environment(config))
    checklist.ask("algorithm", lambda: _algorithm(config, some, sample), str)
    _rewards(checklist, config, some, tasks, every_task=every_task, progress=progress)
    return checklist.checks


def _with_tiny(config: Config) -> Config:
    model = config.model.model_copy(update={"model": TINY_MODEL, "revision": ""})
    data = config.data.model_copy(update={"template_args": {}})
    return config.model_copy(update={"model": model, "data": data})


def summary(checks: Sequence[Check], loaded: LoadedConfig | None) -> dict[str, Any]:
    """The checks as one record."""
    count = {s: sum(c.status == s for c in checks) for s in ("ok", "warning", "problem")}
    return {
        "config": str(loaded.path) if loaded and loaded.path else None,
        "ok": count["problem"] == 0,
        "counts": count,
        "checks": [asdict(check) for check in checks],
    }


def _directory(config: Config) -> str:
    place = preflight.choose_directory(config, overwrite=False, fork=False)
    preflight.check_writable(place.directory, "logging.log_dir", make=False)
    if config.backend.adapter_path:
        target = preflight.expanded(config.backend.adapter_path, "backend.adapter_path")
        preflight.check_writable(target, "backend.adapter_path", make=False)
    return place.note or f"{place.directory}, {'continued' if place.how == 'resume' else 'free'}"


def _named(config: Config) -> str:
    own = [
        f"{kind} {name}{' (not tried)' if kind in _NOT_TRIED else ''}" for kind, name in named_plugins(config)
    ]
    return ", ".join(own) or "none named"


def _memory(config: Config) -> str:
    if config.backend.backend != "local":
        return f"not known for backend {config.backend.backend}"
    try:
        estimate.model_of(config)
    except ModelError:
        return "not known: the model's config.json is not here"
    preflight.check_fit(config)
    return "weights, adapter and optimizer fit; retrain explain says what else is needed"


def _weights(config: Config) -> str:
    name = config.model.model
    if name == TINY_MODEL:
        return "the embedded model"
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        if not files:
            raise ModelError(
                f"model {name!r}: the folder holds no weights.", fix="copy its *.safetensors into it."
            )
        return f"{folder}, {sum(p.stat().st_size for p in files) / 1e9:.2f} GB"
    held = [*_cached(config).glob("snapshots/*/*.safetensors")]
    if held:
        return f"{name}, {sum(p.stat().st_size for p in held) / 1e9:.2f} GB in the cache"
    if offline := machine.is_offline():
        raise ModelError(
            f"model {name!r} is not in the cache, and {offline} is set.",
            fix=f"download it once (hf download {name}), or unset {offline}.",
        )
    return f"{name}, to be downloaded"


def _cached(config: Config) -> Path:
    return machine.hub_cache() / f"models--{config.model.model.replace('/', '--')}"


def _describe(renderer: Any) -> str:
    ends = ", ".join(renderer.shown(i) for i in renderer.stop_ids) or "nothing"
    form = (
        "with a chat template" if renderer.has_template else "without a chat template: prompts are plain text"
    )
    return f"{renderer.vocab_size:,} tokens, {form}, ends at {ends}"


def _counted(tasks: Sequence[Task]) -> str:
    if not tasks:
        return ""
    sources = list(dict.fromkeys(t.source for t in tasks))
    counts = [f"{sum(t.source == s for t in tasks):,} of {s}" for s in sources]
    return ", ".join(counts)


def _held_out(config: Config, renderer: Renderer) -> Sequence[Task]:
    found = build.evaluator(config, renderer)
    return found.tasks if found else ()


def _prompts(checklist: _Checklist, config: Config, renderer: Any, tasks: Sequence[Task]) -> None:
    context: int | None = renderer.context_length

    def say(_: None) -> str:
        longest = sorted(tasks, key=lambda t: -sum(len(m.content) for m in t.messages))[:16]
        tokens = max(len(renderer.encode(t.messages)) for t in longest)
        room = f"has {context:,} positions" if context else "does not say how many positions it has"
        return f"at most {tokens:,} tokens, and an answer of {config.training.max_tokens:,}; the model {room}"

    # What else can break there is a chat template that refuses the messages: every rollout would.
    checklist.ask(
        "prompts",
        lambda: preflight.check_lengths(config, renderer, tasks, context),
        say,
        fix="change data.system, or use another model.",
    )


def _advice(
    checklist: _Checklist, config: Config, renderer: Any, tasks: Sequence[Task], held_out: Sequence[Task]
) -> None:
    def ask() -> list[str]:
        for line in preflight.advice(config, tasks, held_out, {}):
            log.warning("%s", line)
        # With nothing to say about tasks, what is left is about the model's own settings.
        quiet = set(preflight.advice(config, (), (), {}))
        return [
            n
            for n in preflight.advice(config, (), (), renderer.ignored_generation_settings)
            if n not in quiet
        ]

    checklist.ask("settings", ask, " ".join)


def _environment(config: Config) -> str:
    return config.environment.provider or "one question, one answer"


def _algorithm(config: Config, renderer: Renderer, task: Task) -> str:
    found = credit.build(config, renderer)
    credit.build_schedule(config)
    sampling = build.sampling_of(config, renderer, temperature=config.training.temperature)
    members = max(2, config.training.group_size)
    try:
        try_credit(found, renderer, task, members=members, with_entropies=sampling.want_entropy)
    except RunError as error:
        if not isinstance(error.__cause__, KeyError):
            raise
        # What a made-up score lacks: parts, which only the reward gives.
        log.warning("%s On a made-up group, without the reward's parts: see retrain trace.", error.message)
    name = found.whole_name or f"{found.advantage_name}, then {found.transform_name}"
    return f"{name}; uncertainty {found.uncertainty_name}, planning tokens by {found.detector_name}"


def _rewards(
    checklist: _Checklist, config: Config, renderer: Renderer, tasks: Sequence[Task],
    *, every_task: bool, progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    def make() -> Reward:
        made: Reward = plugins.load("reward", "routed")(config, renderer)
        try:
            build.check_bounds(config, getattr(made, "bounds", None))
        except RetrainError:
            dry.close(made)
            raise
        return made

    reward = checklist.ask("reward", make, lambda _: config.reward.type)
    if reward is None:
        return
    loop = EventLoop()
    try:
        chosen = list(tasks) if every_task else list(tasks)[:: max(1, len(tasks) // _SAMPLE)][:_SAMPLE]
        threshold = 0.5 if config.reward.correct_at is None else config.reward.correct_at
        work = check_references(
            chosen, reward, config.reward.type, threshold=threshold, by_source=rewards_by_source(config),
            progress=progress if every_task else None,
        )  # fmt: skip
        report = checklist.ask(
            "references",
            lambda: loop.run(work, phase="scoring", deadline_s=_FOREVER),
            lambda _: "",
            fix="correct the reward.",
        )
        if chosen and report is not None:
            _judge(checklist, config, report, every_task=every_task)
    finally:
        loop.close()
        dry.close(reward)


def _judge(checklist: _Checklist, config: Config, report: Report, *, every_task: bool) -> None:
    judged = report.tasks - report.without_reference
    which = "" if every_task else " of a sample"
    lines = report.lines()
    if report.ok:
        checklist.add("references", "ok", f"{lines[0].rstrip('.')}{which}.")
    elif len(report.failed) > config.reward.max_error_rate * judged:
        checklist.add("references", "problem", f"{lines[0].rstrip('.')}{which}.",
                      "correct the reward: it fails on the data's own answers.")  # fmt: skip
    else:
        # A reward of one's own may want a form of answer that nobody can guess.
        known = {config.reward.type, *rewards_by_source(config).values()} <= {
            "match",
            "math",
            "reasoning_gym",
        }
        bad = len(report.refused) > _BAD_SHARE * judged and known
        fix = (
            "use a reward that fits the data, or correct the references."
            if every_task
            else "retrain doctor CONFIG --tasks tells for how many tasks that is so."
        )
        checklist.add("references", "problem" if bad else "warning", f"{lines[0].rstrip('.')}{which}.", fix)
    for line in lines[1:]:
        checklist.add("references", "ok" if report.ok else "warning", line)
