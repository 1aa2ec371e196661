"""A subject opened for use: evaluated on held-out tasks as its run was, sampled from, or exported. Never writes into
what it opens."""

# torch and safetensors are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import importlib
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrain import export_folder, plugins, preflight
from retrain.algorithms.credit import correct
from retrain.config.schema import Config
from retrain.environments.arithmetic import TINY_INSTRUCTION
from retrain.environments.mixture import training_tasks
from retrain.environments.reading import DEFAULT_INSTRUCTION
from retrain.environments.sources import digest_of
from retrain.errors import ModelError, RunError, UsageError
from retrain.protocols import Renderer
from retrain.renderer import model_path
from retrain.subject import Subject, is_text
from retrain.training.build import evaluator, facts, sampling_of
from retrain.training.evaluate import Answers
from retrain.training.own_parts import make_environment
from retrain.training.rollout import EventLoop, RewardErrors, collect
from retrain.types import Completion, IntArray, Message, NoiseKey, SharedWeights, Task

Progress = Callable[[int, int, float], None]
"""Called about once a second with ended rollouts, all rollouts, and the seconds since sampling began; once before that,
when everything is loaded, with 0, the number of tasks, and 0."""

EVAL_KEYS = (
    "eval.source", "eval.path", "eval.split", "eval.levels", "eval.examples", "eval.skip", "eval.samples", "eval.temperature",
    "eval.max_tokens", "eval.seed", "eval.suites", "data.", "reward.",
    "model.model", "model.revision", "model.quantization", "backend.devices",
    "inference.",
    "plugins.", "environment.", "training.max_tokens", "training.top_p", "training.temperature", "training.stop",
    "training.deterministic",
)  # fmt: skip
"""Settings that an evaluation looks at."""

SAMPLE_KEYS = (
    "data.", "reward.", "model.model", "model.revision", "model.quantization", "backend.devices", "inference.", "plugins.",
    "environment.", "training.max_tokens", "training.top_p", "training.temperature", "training.stop", "training.seed",
    "training.deterministic",
)  # fmt: skip
"""Settings that sampling looks at."""

SAMPLE_STEP = -2
"""The step number in the noise of ``retrain sample``: a stream that neither training nor evaluation uses."""

_DEADLINE_S = 30 * 86400.0
"""No deadline but the user's patience: progress is shown and Ctrl-C costs nothing."""


@dataclass(frozen=True, slots=True)
class _Model:
    """A loaded policy and the sampler over it."""

    engine: Any
    backend: Any
    weights: SharedWeights


@contextmanager
def _model(subject: Subject, config: Config, renderer: Renderer) -> Generator[_Model]:
    """Load base model and adapter; ModelError when model, tokenizer and adapter do not belong together."""
    import torch

    config = _with(config, "lora", init_from="")
    if "devices" not in config.backend.model_fields_set and not torch.cuda.is_available():
        config = _with(config, "backend", devices="cpu")
    with ExitStack() as stack:
        # An adapter is in PEFT's format whichever backend trained it, and one of the user's own may hide its weights.
        backend = plugins.load("backend", "local")(config, renderer)
        stack.callback(backend.close)
        policy = backend.policy
        rows = int(policy.model.get_input_embeddings().weight.shape[0])
        size = getattr(renderer, "vocab_size", 0)
        if size > rows:
            raise ModelError(
                f"the tokenizer has {size} tokens, and the model {config.model.model!r} knows {rows}.",
                fix="put the tokenizer that belongs to the model beside it.",
            )
        now = backend.facts()
        if subject.facts.get("dtype") == now["dtype"] and subject.facts.get("weights") != now["weights"]:
            raise ModelError(
                f"the weights of {config.model.model!r} are not those that the run was trained on.",
                fix="restore the model (or model.revision) as it was.",
            )
        if subject.adapter is not None:
            _read_adapter(policy.adapter, subject.adapter, config)
        engine = plugins.load("engine", "pytorch")(config, renderer)
        stack.callback(engine.close)
        weights = backend.publish()
        engine.load(weights)
        yield _Model(engine, backend, weights)


def _read_adapter(parameters: Any, directory: Path, config: Config) -> None:
    """Copy an adapter's tensors; layers that it leaves alone keep their zero update."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, name = directory / "adapter_model.safetensors", config.model.model
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} cannot be read: {error}", fix="choose another checkpoint or adapter."
        ) from error
    extra = sorted(set(tensors) - set(parameters))
    if extra or not tensors:
        why = f"the model has no place for {extra[0]}" if extra else "it is empty"
        raise ModelError(
            f"{directory}: the adapter does not fit {name!r}: {why}.",
            fix="name the model that it was trained on: --model.",
        )
    with torch.no_grad():
        for key, value in tensors.items():
            if value.shape != parameters[key].shape:
                raise ModelError(
                    f"{directory}: the adapter does not fit {name!r}: {key} has shape {tuple(value.shape)}, not "
                    f"{tuple(parameters[key].shape)}.",
                    fix="name the model that it was trained on: --model.",
                )
            parameters[key].copy_(value)


def _renderer(subject: Subject, config: Config) -> Any:
    renderer = plugins.load("renderer", "chat")(
        config.model.model, revision=config.model.revision, template_args=config.data.template_args
    )
    if subject.facts.get("tokenizer", renderer.fingerprint) != renderer.fingerprint:
        raise ModelError(
            f"the tokenizer or chat template of {config.model.model!r} is not the one that the run was trained with.",
            fix="restore the model's files (or model.revision) as they were.",
        )
    return renderer


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _fitting(config: Config, renderer: Any, tasks: Sequence[Task]) -> Config:
    """The default of ``max_tokens`` cut to what the model's positions leave; a number that someone chose is refused."""
    if "max_tokens" not in config.training.model_fields_set and renderer.context_length:
        longest = sorted(tasks, key=lambda t: -sum(len(m.content) for m in t.messages))[:16]
        room = renderer.context_length - max(len(renderer.encode(t.messages)) for t in longest)
        config = _with(config, "training", max_tokens=max(1, min(config.training.max_tokens, room)))
    preflight.check_lengths(config, renderer, tasks, renderer.context_length)
    return config


def evaluate(
    subject: Subject, config: Config, *, search_paths: Sequence[Path], progress: Progress,
    answers: Answers | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the evaluation that ``config.eval`` describes; a JSON-serialisable record of result and circumstances.

    ``metrics`` has the keys of an evaluation's line in metrics.jsonl: for a run's own evaluation, at the step of the
    checkpoint and on the same machine, all but the time equal that line. ``answers`` is told every task's.
    """
    if not config.eval.source and not config.eval.suites:
        raise UsageError(
            f"{subject.title} has no evaluation of its own.",
            fix="name tasks: --source gsm8k, or --source jsonl --path FILE.",
        )
    plugins.add_search_paths(search_paths)
    with ExitStack() as stack:
        renderer = _renderer(subject, config)
        held_out = evaluator(config, renderer)
        assert held_out is not None  # tasks are named
        fitted = _fitting(config, renderer, held_out.tasks)
        if fitted is not config:
            config, held_out = fitted, evaluator(fitted, renderer)
            assert held_out is not None
        events = EventLoop()
        stack.callback(events.close)
        reward = _reward(config, renderer, stack)
        environment = make_environment(config, renderer)
        model = stack.enter_context(_model(subject, config, renderer))
        progress(0, len(held_out.tasks), 0.0)
        with _watched(model.engine, progress):
            metrics, _ = held_out.run(
                events, environment, reward, model.engine,
                deadline_s=_DEADLINE_S, max_error_rate=config.reward.max_error_rate, answers=answers,
            )  # fmt: skip
        return {
            **_identity(subject, config, model),
            "metrics": metrics,
            "settings": {
                "eval": {k: v for k, v in config.eval.model_dump().items() if k != "every"},
                "temperature": config.eval.temperature or config.training.temperature,
                "top_p": config.training.top_p,
                "max_tokens": config.eval.max_tokens or config.training.max_tokens,
                "stop": list(config.training.stop),
                "reward": config.reward.type,
                "correct_at": config.reward.correct_at,
                "instruction": config.data.instruction,
                "system": config.data.system,
                "template_args": dict(config.data.template_args),
            },
            "tasks": digest_of(held_out.tasks),
            "tokenizer": renderer.fingerprint,
            "versions": facts(),
            "notes": _notes(subject, config),
        }


def _reward(config: Config, renderer: Any, stack: ExitStack) -> Any:
    reward = plugins.load("reward", "routed")(config, renderer)
    if close := getattr(reward, "close", None):
        stack.callback(close)
    return reward


def _identity(subject: Subject, config: Config, model: _Model) -> dict[str, Any]:
    now = model.backend.facts()
    return {
        "subject": subject.title,
        "kind": subject.kind,
        "model": config.model.model,
        "adapter": str(subject.adapter) if subject.adapter else None,
        "step": subject.step,
        "weights": {
            "base": now["weights"],
            "adapter": model.weights.fingerprint if subject.adapter else None,
            "dtype": now["dtype"],
        },
        "device": now["device"],
    }


def _notes(subject: Subject, config: Config) -> list[str]:
    found: list[str] = []
    data, held_out = config.data, config.eval
    own = subject.settings.get("data", {})
    path = held_out.path or (data.path if held_out.source == data.source else "")
    same = (held_out.source, path) == (own.get("source"), own.get("path", ""))
    if (
        (subject.kind == "run" or subject.settings_of)
        and same
        and (held_out.split == own.get("split", "train") or path.endswith(".jsonl"))
    ):
        found.append("these are the training tasks of the run: the accuracy is not a held-out one.")
    if subject.settings_of:
        found.append(f"evaluated with the settings of {subject.settings_of}, the run that it was squeezed from.")
    elif subject.kind == "adapter":
        limit = held_out.max_tokens or config.training.max_tokens
        temperature = config.training.temperature if held_out.temperature is None else held_out.temperature
        found.append(
            f"scored by the reward {config.reward.type} with max_tokens {limit} and temperature {temperature:g}; the run that "
            "made this adapter may have used others, and its accuracies are then not comparable."
        )
    if subject.selected:
        found.append(f"this checkpoint was {subject.selected}; quote an accuracy of other tasks.")
    return found


@contextmanager
def _watched(engine: Any, progress: Progress) -> Generator[None]:
    """Report the engine's count of ended rollouts while the body runs; engines without one report nothing."""
    over, begun = threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(1.0):
            asked = int(getattr(engine, "asked", 0))
            if asked:
                progress(int(engine.finished), asked, time.monotonic() - begun)

    thread = threading.Thread(target=watch, name="retrain-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled text. ``reward`` and ``reference`` belong to a task, None without one."""

    text: str
    stop: str
    tokens: int
    mean_logprob: float
    reference: str | None = None
    reward: float | None = None
    correct: bool | None = None
    error: str = ""


class Talker:
    """Samples answers from an opened model: to a conversation, to bare text, or to a task of the run's data."""

    def __init__(
        self, subject: Subject, config: Config, renderer: Any, model: _Model, events: EventLoop
    ) -> None:
        self.identity = _identity(subject, config, model)
        self.config = config
        self._renderer = renderer
        self._engine = model.engine
        self._events = events
        self._draws = 0
        self._instruction = _instruction(subject, config)

    def opening(self, prompt: str) -> list[Message]:
        """The messages of a conversation that begins with ``prompt``, with the run's system text and instruction."""
        system = [Message("system", self.config.data.system)] if self.config.data.system else []
        return [*system, Message("user", prompt + self._instruction)]

    def answers(self, messages: Sequence[Message] | str, n: int) -> list[Answer]:
        """``n`` answers to a conversation, or continuations of a bare text; UsageError for one that cannot be asked."""
        for text in [messages] if isinstance(messages, str) else [m.content for m in messages]:
            if not is_text(text):
                raise UsageError("the prompt is not valid UTF-8.", fix="correct its bytes.")
        try:
            prompt = (
                self._renderer.encode_text(messages)
                if isinstance(messages, str)
                else self._renderer.encode(messages)
            )
        except ValueError as error:
            raise UsageError(str(error), fix="--raw samples without the template.") from error
        if len(prompt) == 0:
            raise UsageError("the prompt has no tokens.", fix="write something.")
        completions = self._generate(prompt, n)
        return [
            Answer(
                self._renderer.decode(c.token_ids_T), c.stop, len(c.token_ids_T), float(c.logprobs_T.mean())
            )
            for c in completions
        ]

    def _generate(self, prompt: IntArray, n: int) -> list[Completion]:
        sampling = sampling_of(self.config, self._renderer, temperature=self.config.training.temperature)
        context = self._renderer.context_length
        if context:
            if len(prompt) >= context:
                raise UsageError(
                    f"the prompt has {len(prompt)} tokens, and the model {context} positions.",
                    fix="shorten it.",
                )
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, context - len(prompt)))
        noise = NoiseKey(self.config.training.seed, SAMPLE_STEP, self._draws)
        self._draws += 1
        request = self._engine.generate(prompt, n, replace(sampling, want_entropy=False, noise=noise))
        return self._events.run(request, phase="sampling", deadline_s=_DEADLINE_S)

    def attempts(self, task: Task, n: int) -> list[Answer]:
        """``n`` attempts at a task, scored as in training."""
        config = _fitting(self.config, self._renderer, [task])
        with ExitStack() as stack:
            reward = _reward(config, self._renderer, stack)
            environment = make_environment(config, self._renderer)
            got = collect(
                self._events, [task], n, environment, reward, self._engine,
                sampling_of(config, self._renderer, temperature=config.training.temperature),
                seed=config.training.seed, step=SAMPLE_STEP, deadline_s=_DEADLINE_S, errors=RewardErrors(1.0),
            )  # fmt: skip
        group, found = got.groups_P[0], list[Answer]()
        for rollout, score in zip(group.rollouts_G, group.scores_G, strict=True):
            logprobs = rollout.logprobs_T[rollout.sampled_T]
            error = rollout.error or score.error
            found.append(
                Answer(
                    rollout.text,
                    rollout.stop,
                    rollout.num_sampled,
                    float(logprobs.mean()) if len(logprobs) else 0.0,
                    task.reference,
                    None if error else score.reward,
                    None if error else correct(score, config.reward.correct_at),
                    error,
                )
            )
        return found


def _instruction(subject: Subject, config: Config) -> str:
    """What follows a prompt: the run's instruction; nothing for weights that come without a run."""
    data = config.data
    join = "\n" if data.source == "arithmetic" else "\n\n"
    if data.instruction:
        return join + data.instruction
    if subject.kind != "run":
        return ""
    return join + (TINY_INSTRUCTION if data.source == "arithmetic" else DEFAULT_INSTRUCTION)


@contextmanager
def talker(subject: Subject, config: Config, *, search_paths: Sequence[Path]) -> Generator[Talker]:
    """The model opened for sampling; closed at the end."""
    plugins.add_search_paths(search_paths)
    with ExitStack() as stack:
        renderer = _renderer(subject, config)
        events = EventLoop()
        stack.callback(events.close)
        model = stack.enter_context(_model(subject, config, renderer))
        yield Talker(subject, config, renderer, model, events)


def task_of(subject: Subject, config: Config, wanted: str | int) -> Task:
    """A task of the run's data by id or 0-based index; UsageError when there is none."""
    if subject.kind != "run":
        raise UsageError(f"{subject.title} has no data.", fix="give a --prompt, or name a run directory.")
    tasks, _ = training_tasks(config)
    if isinstance(wanted, int):
        if not 0 <= wanted < len(tasks):
            raise UsageError(
                f"--index {wanted}: the data has {len(tasks)} tasks.", fix=f"use 0 to {len(tasks) - 1}."
            )
        return tasks[wanted]
    with contextlib.suppress(StopIteration):
        return next(t for t in tasks if t.id == wanted)
    import difflib

    near = difflib.get_close_matches(wanted, [t.id for t in tasks[:20000]], n=1)
    raise UsageError(
        f"--task {wanted}: no task has that id.", fix=f"ids look like {(near or [tasks[0].id])[0]}."
    )


def export(
    subject: Subject, config: Config, output: Path, *, merged: bool, dtype: str, overwrite: bool
) -> dict[str, Any]:
    """Write the subject's adapter, or base and adapter merged, into ``output``; says what was written and how to load it.

    A folder that holds something is refused; with ``overwrite`` the files of an earlier export, which its marker lists, are
    replaced and others stay.
    """
    if subject.adapter is None:
        raise UsageError(
            f"{subject.title} has no adapter to export.", fix="name a run directory or an adapter folder."
        )
    output = preflight.expanded(str(output), "--output").absolute()
    facts = {"subject": subject.title, "step": subject.step, "model": config.model.model, "merged": merged}
    try:
        export_folder.check(output, subject, config.model.model, overwrite=overwrite)
        new = not output.exists()
        preflight.check_writable(output, "--output")
        try:
            with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as made:
                if merged:
                    _renderer(subject, config)  # refuses another tokenizer before the weights load
                models: Any = importlib.import_module("retrain.models")
                models.export(config, subject.adapter, Path(made), merged=merged, dtype=dtype)
                files = export_folder.place(Path(made), output, facts)
        except BaseException:
            with contextlib.suppress(OSError):
                if new:
                    output.rmdir()  # only when nothing is in it
            raise
    except OSError as error:
        raise RunError(
            f"{output} cannot be written: {error.strerror or error}.", fix="make room, and export again."
        ) from error
    base = model_path(config.model.model)
    use = (
        f'Load it: AutoModelForCausalLM.from_pretrained("{output}", dtype="auto") in transformers, or: vllm serve {output}'
        if merged
        else f'Load it: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{output}")'
    )
    return {
        "output": str(output), "subject": subject.title, "step": subject.step, "model": base, "merged": merged,
        "dtype": dtype if merged else None, "files": files, "use": use,
    }  # fmt: skip
