"""Experiment trackers: wandb, trackio and tensorboard, each told the numbers that metrics.jsonl holds.

Their files lie under ``trackers/`` of the run directory. What a tracker holds already cannot be cut back, so each
remembers its last steps in ``trackers.json``; after a resume it is told everything again, and skips those.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, cast

from retrain.config.load import dump_toml
from retrain.config.schema import Config, Logging
from retrain.config.secret import names_secret
from retrain.errors import ConfigError, PluginError, RetrainError, RunError
from retrain.tracking import layout
from retrain.tracking.run_log import write_atomically

log = logging.getLogger("retrain")

Kind = Literal["train", "eval"]

DEFAULT_PROJECT: Final = "retrain"
COLUMNS: Final = ("step", "task", "member", "prompt", "completion", "reward", "parts", "advantage_mean")
"""Columns of the table of generations that a tracker shows."""

_CREDIT = tuple(
    f"{who}_{what}_{stat}"
    for who in ("exec", "plan")
    for what in ("entropy", "surprisal")
    for stat in ("mean", "var")
)


def tracker_key(key: str) -> str:
    """The tracker's name of a key of metrics.jsonl: ``eval/...`` stays, everything else goes under ``train/``."""
    if key.startswith("eval/"):
        return key
    if key.startswith("bp_"):
        return f"train/backpressure/{key.removeprefix('bp_')}"
    return f"train/entropy/{key}" if key in _CREDIT else f"train/{key}"


def numbers(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """What a tracker is sent of one row: finite numbers as they are, bools as 0 or 1; texts and nulls stay out."""
    sent: dict[str, float | int] = {}
    for key, value in metrics.items():
        if isinstance(value, bool):
            sent[tracker_key(key)] = int(value)
        elif isinstance(value, int | float) and math.isfinite(value):
            sent[tracker_key(key)] = value
    return sent


def kind_of(metrics: Mapping[str, Any]) -> Kind:
    """Whether a row is a training step (x: the 0-based step) or an evaluation (x: completed steps)."""
    return "eval" if any(key.startswith("eval/") for key in metrics) else "train"


def shown_config(config: Config) -> dict[str, Any]:
    """The resolved configuration for a tracker, with the condition's label and without anything secret."""
    return {"condition": condition(config), **_public(config.model_dump(mode="json"))}


def condition(config: Config) -> str:
    """``maxrl+gtpo_sepa``: advantage and transform, the run's name unless it has one."""
    section = config.algorithm
    return f"{section.advantage_mode}+{section.transform_mode}"


def table(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of generations.jsonl as a tracker's table: ``COLUMNS``, parts as JSON, None for a reward that failed."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append({name: row[name] for name in COLUMNS})
        failed = row["reward"] is None or not math.isfinite(row["reward"])
        found[-1] |= {"parts": json.dumps(row["parts"]), "reward": None if failed else row["reward"]}
    return found


def _public(value: Any) -> Any:
    """The value without entries that are named or look like a secret. The loader refuses these already."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {k: _public(v) for k, v in items if not names_secret(k, v)}
    if isinstance(value, list):
        return [_public(v) for v in cast("list[Any]", value)]
    return value


class Held:
    """What one tracker holds of a run, in ``trackers.json``: its id there, how many records, the last steps.

    A record counts as held ``settle_s`` seconds after it was sent: after a kill, one that was still on its way is
    sent once more rather than lost.
    """

    def __init__(self, run_dir: Path, name: str, *, settle_s: float = 0.0) -> None:
        self._path = run_dir / layout.TRACKERS
        self._name = name
        self._settle_s = settle_s
        found = self._all().get(name, {})
        self.id: str = str(found.get("id") or secrets.token_hex(6))
        self.continues = "id" in found
        self.records = int(found.get("records", 0))
        self._last: dict[Kind, int] = {
            "train": int(found.get("train", -1)),
            "eval": int(found.get("eval", -1)),
        }
        self._saved: dict[str, Any] = {"records": self.records, **self._last}
        self._pending: list[tuple[float, dict[str, Any]]] = []
        self._save()

    def rename(self, id: str) -> None:
        """Take the id that the tracker itself gave to a new run."""
        self.id = id
        self._save()

    def holds(self, kind: Kind, step: int) -> bool:
        """Is the record there from before a resume?"""
        return step <= self._last[kind]

    def sent(self, kind: Kind, step: int) -> None:
        """Note a record that was handed over, and write down those that have settled."""
        self.records += 1
        self._last[kind] = step
        self._pending.append((time.monotonic(), {"records": self.records, **self._last}))
        self.settle(all_of_them=not self._settle_s)

    def settle(self, *, all_of_them: bool) -> None:
        """Write down the newest record that has settled; every one at a clean end."""
        now = time.monotonic()
        done = [facts for at, facts in self._pending if all_of_them or now - at >= self._settle_s]
        if done:
            self._pending = self._pending[len(done) :]
            self._saved = done[-1]
            self._save()

    def _all(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _save(self) -> None:
        facts = {**self._all(), self._name: {"id": self.id, **self._saved}}
        write_atomically(self._path, json.dumps(facts, indent=1) + "\n", durable=False)


class Pace:
    """Which steps' generations a tracker is shown: the first, every ``training.save_every`` and the last."""

    def __init__(self, config: Config) -> None:
        self._every = config.training.save_every
        self._steps = config.training.max_steps

    def due(self, step: int) -> bool:
        """``step`` is 0-based."""
        done = step + 1
        return step == 0 or done == self._steps or bool(self._every and done % self._every == 0)


class WandbSink:
    """Weights & Biases. ``WANDB_MODE``, ``WANDB_API_KEY`` and ``WANDB_BASE_URL`` are read by wandb itself."""

    replays = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        with _starting("wandb"):
            import wandb
        self._wandb = cast("Any", wandb)
        self._pace = Pace(config)
        self._code = 1
        settings = config.logging
        with _starting("wandb", fix="check the network, or set WANDB_MODE=offline and upload later."):
            _check_login(self._wandb)
            # Its file is written every tenth of a second, so that a killed run loses at most that.
            self._held = Held(run_dir, "wandb", settle_s=1.0)
            self._run: Any = self._wandb.init(
                **_init_arguments(settings),
                name=settings.wandb_run_name or condition(config),
                id=self._held.id,
                resume="allow",
                reinit="create_new",
                dir=str(_folder(run_dir)),
                config=shown_config(config),
                settings=self._wandb.Settings(
                    # The run directory has the console's output and the code's version; a remote's URL may hold a token.
                    console="off", silent=True, disable_git=True, disable_code=True,
                    x_transaction_log_flush_interval=0.1,
                ),
            )  # fmt: skip
            for kind in ("train", "eval"):
                self._run.define_metric(f"{kind}/step", hidden=True)
                self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
            self._run.define_metric("generations", step_metric="train/step")
        if self._run.settings.mode == "online":
            log.info("wandb: %s", self._run.url)
        elif self._run.settings.mode == "offline":
            log.info("wandb: offline; upload with: wandb sync %s", self._run.settings.sync_dir)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send one row; its own counter is the number of the record, the axis is train/step or eval/step."""
        kind = kind_of(metrics)
        if self._held.holds(kind, step):
            return
        # Counted by ourselves: a continued run goes on where the earlier part ended, and a record that is sent
        # twice has the same number twice.
        self._run.log({f"{kind}/step": step, **numbers(metrics)}, step=self._held.records, commit=True)
        self._held.sent(kind, step)

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a step's rows of generations.jsonl as a table."""
        if self._pace.due(step) and not self._held.holds("train", step):
            data = [list(row.values()) for row in table(rows)]
            made = self._wandb.Table(columns=list(COLUMNS), data=data, allow_mixed_types=True)
            self._run.log({"generations": made}, step=self._held.records, commit=False)

    def ended(self, status: str) -> None:
        """A run that failed is shown as failed."""
        self._code = 1 if status == "failed" else 0

    def close(self) -> None:
        """Finish the run; waits for uploads."""
        run, self._run = self._run, None
        if run is not None:
            self._held.settle(all_of_them=True)
            run.finish(exit_code=self._code)


class TrackioSink:
    """Trackio: a local database, or the Space or server that ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` names."""

    replays = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._pace = Pace(config)
        # trackio reads this once, when it is imported; a folder of the user's own is respected.
        folder = os.environ.setdefault("TRACKIO_DIR", str(_folder(run_dir) / "trackio"))
        try:
            with _starting("trackio"):
                import trackio
        finally:
            if folder == str(_folder(run_dir) / "trackio"):
                # Not for children, nor for a later run of this process.
                del os.environ["TRACKIO_DIR"]
        self._trackio = cast("Any", trackio)
        with (
            _starting("trackio", fix="check TRACKIO_SPACE_ID, TRACKIO_SERVER_URL and the network."),
            _quiet(),
        ):
            self._held = Held(run_dir, "trackio")
            self._run: Any = self._trackio.init(
                project=config.logging.wandb_project or DEFAULT_PROJECT,
                name=config.logging.wandb_run_name or condition(config),
                group=config.logging.wandb_group or None,
                config=shown_config(config),
                resume="allow" if self._held.continues else "never",
                embed=False,
            )
            if self._held.continues:
                # Found by its name, which a second run in a shared folder may bear as well.
                self._run.id = self._held.id
            else:
                self._held.rename(str(self._run.id))
        log.info("trackio: %s", self._trackio.TRACKIO_DIR)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send one row at x = ``step``."""
        kind = kind_of(metrics)
        if not self._held.holds(kind, step):
            self._run.log(numbers(metrics), step=step)
            self._flush()
            self._held.sent(kind, step)

    def _flush(self) -> None:
        """Write what trackio's thread would write within half a second, so that a killed run loses nothing."""
        lock, flush = (
            getattr(self._run, "_client_lock", None),
            getattr(self._run, "_flush_queues_inline", None),
        )
        if getattr(self._run, "_is_local", False) and lock is not None and flush is not None:
            with lock:
                flush()

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a step's rows of generations.jsonl as a table."""
        if self._pace.due(step) and not self._held.holds("train", step):
            self._run.log({"generations": self._trackio.Table(data=table(rows))}, step=step)

    def close(self) -> None:
        """Wait until everything is stored."""
        run, self._run = self._run, None
        if run is not None:
            # Not run.finish(): trackio would finish it once more when the process ends.
            with _quiet(), contextlib.suppress(RuntimeError):
                self._trackio.finish()


class TensorboardSink:
    """TensorBoard event files, written without torch. They hold float32: the nearest one to each number."""

    replays = True

    def __init__(self, config: Config, run_dir: Path) -> None:
        with _starting("tensorboard"):
            # Through strings: the package has neither types nor stubs.
            proto = "tensorboard.compat.proto"
            self._event: Any = import_module(f"{proto}.event_pb2").Event
            self._summary: Any = import_module(f"{proto}.summary_pb2")
            self._tensor: Any = import_module(f"{proto}.tensor_pb2").TensorProto
            self._string: Any = import_module(f"{proto}.types_pb2").DT_STRING
            writer: Any = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter
        self._pace = Pace(config)
        with _starting("tensorboard", fix="check the run directory."):
            self._held = Held(run_dir, "tensorboard")
            self._writer: Any = writer(str(_folder(run_dir) / "tensorboard"))
            if not self._held.continues:
                self._text("config", f"```toml\n{dump_toml(config)}```", 0)
        log.info("tensorboard: tensorboard --logdir %s", _folder(run_dir) / "tensorboard")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one row as one event at x = ``step``."""
        kind = kind_of(metrics)
        if not self._held.holds(kind, step):
            values = [self._summary.Summary.Value(tag=k, simple_value=v) for k, v in numbers(metrics).items()]
            self._write(step, values)
            self._held.sent(kind, step)

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a step's rows of generations.jsonl as text."""
        if self._pace.due(step) and not self._held.holds("train", step):
            blocks = [
                f"**{r['task']}, member {r['member']}: reward {r['reward']}, advantage {r['advantage_mean']:.4g}**\n\n"
                f"{_quoted(str(r['prompt']))}\n\n{_quoted(str(r['completion']))}"
                for r in table(rows)
            ]
            self._text("generations", "\n\n---\n\n".join(blocks), step)

    def _text(self, tag: str, text: str, step: int) -> None:
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        metadata = self._summary.SummaryMetadata(plugin_data=plugin)
        tensor = self._tensor(dtype=self._string, string_val=[text.encode("utf-8", "replace")])
        self._write(step, [self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])

    def _write(self, step: int, values: Sequence[Any]) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        # On disk before the step counts as held.
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def report_analysis(config: Config, name: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> str:
    """Show a finished analysis at Weights & Biases as a run called ``name``; where it is, in words.

    Keys are ``<first word of name>/...``: ``facts`` go into the summary, and ``rows`` (the same keys in each, the first being
    the axis) become curves and the table ``variance``. Its files lie in ``logging.log_dir``, else in ``logs/<first word>``.
    """
    with _starting("wandb"):
        import wandb
    library, settings, prefix = cast("Any", wandb), config.logging, name.partition("-")[0].partition(" ")[0]
    given = "log_dir" in settings.model_fields_set
    folder = Path(settings.log_dir).expanduser() if given else Path("logs") / prefix
    with _starting("wandb", fix="check the network, or set WANDB_MODE=offline and upload later."):
        _check_login(library)
        folder.mkdir(parents=True, exist_ok=True)
        run: Any = library.init(
            **_init_arguments(settings), name=settings.wandb_run_name or name, dir=str(folder), reinit="create_new",
            config=_public(config.model_dump(mode="json", exclude_unset=True)),
            settings=library.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )  # fmt: skip
    axis, *values = (f"{prefix}/{key}" for key in rows[0])
    run.define_metric(axis, hidden=True)
    for key in values:
        run.define_metric(key, step_metric=axis)
    for row in rows:
        run.log({f"{prefix}/{key}": value for key, value in row.items()})
    made = library.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    run.log({f"{prefix}/variance": made})
    run.summary.update({f"{prefix}/{key}": value for key, value in facts.items()})
    online, place = run.settings.mode == "online", run.settings.sync_dir
    where = str(run.url) if online else f"offline; upload with: wandb sync {place}"
    run.finish()
    return where


def _init_arguments(settings: Logging) -> dict[str, Any]:
    return {
        "project": settings.wandb_project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        "entity": settings.wandb_entity or None,
        "group": settings.wandb_group or None,
        "tags": [tag.strip() for tag in settings.wandb_tags.split(",") if tag.strip()] or None,
    }


def _check_login(library: Any) -> None:
    """wandb would ask on a terminal, and a run that waits for an answer has not started."""
    if library.setup().settings.mode == "online" and not library.login(prompt=False):
        raise ConfigError(
            "tracker 'wandb' is not logged in.",
            fix="run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline and upload later.",
        )


def _quoted(text: str) -> str:
    """A text as an indented block, which Markdown shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _folder(run_dir: Path) -> Path:
    folder = run_dir / layout.TRACKER_FILES
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _starting(name: str, *, fix: str = "") -> Generator[None]:
    """Turn whatever a tracker's package raises while it starts into one line; a missing package names its extra."""
    try:
        yield
    except RetrainError:
        raise
    except ImportError as error:
        missing = error.name or name
        missing = name if missing.startswith(f"{name}.") else missing
        raise PluginError(
            f"tracker {name!r} needs the module {missing!r}, which is not installed.",
            fix=f'pip install "retrain[{name}]".',
        ) from error
    except Exception as error:  # what it may raise is not ours to know
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"tracker {name!r} could not start: {reason}", fix=fix or "see the error, or leave it out."
        ) from error


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep a package's own messages off the console."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
