"""``retrain squeeze``: which rank an adapter needs, the adapter at that rank, and what that costs in accuracy."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.cli import streams
from retrain.cli.squeezing import Job, accuracies, evaluate, evaluate_again, line_cleared, progress, show
from retrain.cli.verb import at_once_on_interrupt, own_flags, quiet_loading, whole_number
from retrain.errors import ConfigError, RetrainError, UsageError

if TYPE_CHECKING:
    from retrain.squeeze.analysis import Analysis
    from retrain.squeeze.compress import Compressed
    from retrain.subject import Subject

USAGE = """\
Usage: retrain squeeze ADAPTER|RUN|CONFIG [--output DIR] [--rank K] [--eval] [--flag value ...]

How much of each layer's update every rank keeps, and the least rank that keeps enough. ADAPTER is a folder of a PEFT
LoRA adapter, RUN a run directory, CONFIG a TOML with [squeeze]. The adapter itself is not changed.

  --output DIR                    write the adapter at the recommended rank there (--out works too)
  --rank K                        at this rank instead
  --min-variance-retention V      what is enough, as the mean over layers (0.95)
  --target-ranks LIST             ranks to look at, such as [4,12]; the powers of two without it
  --eval                          held-out accuracy before and after, and their difference on the same tasks and noise
  --cont N                        train the compressed adapter for N more steps, with the settings of RUN
  --checkpoint C                  of a run: newest (default), best, or a number of steps
  --device D                      cpu (default), cuda or cuda:1: where the layers are decomposed
  --keep-alpha                    write alpha as a fraction where it is none, rather than into the factors
  --html FILE.HTML                the heat maps and the curve as a page
  --wandb-project P               show the analysis there, as the run squeeze-analysis
  --overwrite                     replace an earlier export in DIR
  --json                          print one JSON object
With --eval, everything that retrain eval takes: --source, --examples, --samples, --seed, --temperature, --max-tokens ...
With --cont, every setting of a run: --lr, --batch-size ...
"""

_EVAL = {
    f"--{name}": f"--eval.{name}"
    for name in ("source", "path", "split", "examples", "samples", "temperature", "seed", "levels")
}
_OURS = {
    "--rank": "--squeeze.compress_to",
    "--output": "--squeeze.output_path",
    "--out": "--squeeze.output_path",
    "--adapter-path": "--squeeze.adapter_path",
}
_SETTINGS = "adapter_config.json"


def squeeze(arguments: Sequence[str]) -> int:
    """The command ``squeeze``, and a run whose configuration is a squeeze."""
    own, rest = own_flags(
        "squeeze",
        arguments,
        values=("--checkpoint", "--html", "--cont"),
        switches=("--json", "--eval", "--keep-alpha", "--overwrite"),
    )
    steps = whole_number(own["--cont"], "--cont", least=1) if "--cont" in own else 0
    with streams.results(alone="--json" in own) as out, quiet_loading():
        job = _job(rest, own)
        with at_once_on_interrupt(), tempfile.TemporaryDirectory(prefix="retrain-squeeze-") as temporary:
            record, written = _squeezed(job, Path(temporary))
        command: list[str] = []
        if written is not None and _begins(job, written):
            command = _continuing(job, written.directory, written.rank, written.alpha, steps)
        if command:
            record["train_on"] = shlex.join(["retrain", *command])
        if "--json" in own and not steps:
            _record(out, record)
        elif "--json" not in own:
            out.line(_report(record, hint=not steps))
        if not steps:
            return 0
        return _train_on(job, record, command, out)


def _train_on(job: Job, record: dict[str, Any], command: Sequence[str], out: streams.Results) -> int:
    """Train the compressed adapter on and evaluate it again; with --json the record is written whatever comes of that."""
    from retrain.cli.run import run

    print(f"\nTraining on: {record['train_on']}", flush=True)
    trained: dict[str, Any] = {"steps": int(job.flags["--cont"]), "exit_code": 0}
    try:
        trained["exit_code"] = run(command)
        if trained["exit_code"] == 0 and "--eval" in job.flags:
            evaluate_again(job, record, _log_dir(job))
            if "--json" not in job.flags:
                out.line("\n" + "\n".join(accuracies(record)))
    except RetrainError as error:
        trained |= {"exit_code": error.exit_code, "error": str(error)}
        raise
    finally:
        if "--json" in job.flags:
            _record(out, {**record, "trained": trained})
    return trained["exit_code"]


def _record(out: streams.Results, record: Mapping[str, Any]) -> None:
    from retrain.tracking.run_log import to_json

    out.record(to_json(record))


def _job(rest: Sequence[str], own: Mapping[str, str]) -> Job:
    """Read the command line and find the adapter; UsageError for what does not go together."""
    from retrain.cli import dotenv
    from retrain.config.load import load
    from retrain.config.options import parse
    from retrain.config.squeezes import is_squeeze

    line = parse(rest, {**_EVAL, **_OURS}, positional="adapter, run or configuration")
    for flag in sorted(line.switches - {"--debug"}):
        raise UsageError(f"{flag} is not an option of squeeze.", fix="leave it out; retrain squeeze --help.")
    with contextlib.redirect_stdout(sys.stderr):
        dotenv.load()
    ours = [
        o for o in line.overrides if o.path[0] in ("squeeze", "logging") and o.path != ("logging", "log_dir")
    ]
    more = tuple(o for o in line.overrides if o not in ours)
    if more and not {"--eval", "--cont"} & own.keys():
        raise UsageError(
            f"{more[0].flag} does nothing in retrain squeeze without --eval.",
            fix="add --eval, or leave it out.",
        )
    named = line.config
    if named is not None and (os.path.isfile(named) or named.endswith(".toml")):
        loaded = load(Path(named), ours)
        if not is_squeeze(loaded.config):
            raise UsageError(
                f"{named} has no [squeeze].", fix="name an adapter, a run, or a TOML with [squeeze]."
            )
    else:
        loaded = load({"squeeze": {"adapter_path": named} if named else {}}, ours)
    section = loaded.config.squeeze
    if section is None or not section.adapter_path:
        raise UsageError(
            "retrain squeeze needs an adapter.",
            fix="retrain squeeze logs/train, for example; in a TOML, squeeze.adapter_path.",
        )
    adapter, run = _adapter(section.adapter_path, own.get("--checkpoint", ""))
    job = Job(adapter, run, loaded, own, more)
    _check(job)
    return job


def _adapter(path: str, checkpoint: str) -> tuple[Path, Subject | None]:
    """The adapter's folder, and the run where the path is one."""
    from retrain.subject import find

    try:
        place = Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{path}: there is no such home directory.", fix="write the path in full."
        ) from error
    if path.startswith("tinker:"):
        raise UsageError(
            f"{path}: adapters at Tinker are not in this version.", fix="download it, and name its folder."
        )
    if os.path.isfile(place / _SETTINGS):
        if checkpoint:
            raise UsageError(
                f"--checkpoint chooses among a run's, and {path} is no run.", fix="leave it out."
            )
        return place, None
    if not os.path.exists(place):
        raise UsageError(
            f"{path}: there is no such folder.", fix="name a run directory or an adapter folder."
        )
    subject = find(path, checkpoint)
    if subject.adapter is None:
        raise UsageError(f"{subject.title} has no adapter.", fix="name a run directory or an adapter folder.")
    return subject.adapter, subject if subject.kind == "run" else None


def _check(job: Job) -> None:
    settings, flags = job.settings, job.flags
    if settings.compress_to and not settings.output_path and "--eval" not in flags:
        raise UsageError(
            "squeeze.compress_to is the rank of an adapter to write.", fix="add --output DIR, or --eval."
        )
    if "--overwrite" in flags and not settings.output_path:
        raise UsageError("--overwrite is for --output.", fix="add --output DIR, or leave it out.")
    if "--cont" in flags and (job.run is None or not settings.output_path):
        raise UsageError("--cont needs a run and --output.", fix="retrain squeeze RUN --output DIR --cont N.")
    if "--html" in flags:
        page = Path(flags["--html"])
        if page.suffix not in (".html", ".htm"):
            raise UsageError(f"--html {page} is no name of a page.", fix="end it with .html.")
        if page.is_dir() or not page.absolute().parent.is_dir():
            raise UsageError(
                f"--html {page} cannot be written there.", fix="name a file in a folder that exists."
            )
    if settings.output_path:
        from retrain import export_folder

        export_folder.check(_output(job), _subject(job), _base(job), overwrite="--overwrite" in flags)
    if "--cont" in flags:
        _check_continuing(job)


def _output(job: Job) -> Path:
    from retrain.preflight import expanded

    return expanded(job.settings.output_path, "--output").absolute()


def _base(job: Job) -> str:
    """The model that the adapter belongs to."""
    from retrain.adapter_settings import read_settings

    return str(read_settings(job.adapter, "squeeze.adapter_path").get("base_model_name_or_path") or "")


def _subject(job: Job) -> Subject:
    from retrain.subject import Subject

    model = {"model": {"model": _base(job)}}
    return job.run or Subject("adapter", str(job.adapter), model, adapter=job.adapter)


def _squeezed(job: Job, temporary: Path) -> tuple[dict[str, Any], Compressed | None]:
    """Analyse, compress, evaluate and show elsewhere, as far as asked; the record, and what was written to stay."""
    from retrain.squeeze.analysis import analyse
    from retrain.squeeze.source import open_source

    settings, flags, model = job.settings, job.flags, job.loaded.config.model
    expected = model.lora_rank if "lora_rank" in model.model_fields_set else 0
    show("loading ...")
    source = open_source(job.adapter)
    wants = bool(settings.output_path) or "--eval" in flags
    if settings.compress_to > source.rank:
        raise UsageError(
            f"squeeze.compress_to = {settings.compress_to}, and the adapter has rank {source.rank}.",
            fix=f"name a rank of at most {source.rank}.",
        )
    with line_cleared():
        found = analyse(
            source, wanted=settings.min_variance_retention, target_ranks=settings.target_ranks,
            source_rank=settings.source_rank or expected, device=settings.device, keep=wants, progress=progress(),
        )  # fmt: skip
    record = found.record()
    if job.run is not None and job.run.directory is not None:
        record["squeezed_from"] = os.path.abspath(job.run.directory)
    base = record["base_model"]
    if "model" in model.model_fields_set and base and model.model != base and "--eval" not in flags:
        record["notes"].append(f"model.model is {model.model}, and the adapter was trained on {base}.")
    rank = settings.compress_to or found.recommended
    written = _write(job, found, rank, record) if settings.output_path else None
    if "--eval" in flags:
        evaluate(job, found, rank, record, temporary)
    if "--html" in flags:
        record["page"] = _page(Path(flags["--html"]), record)
    config = job.loaded.config
    if config.logging.wandb_project or config.logging.trackers:
        record["wandb"] = _tell_wandb(job, record)
    return record, written


def _write(job: Job, found: Analysis, rank: int, record: dict[str, Any]) -> Compressed:
    from retrain import export_folder, preflight
    from retrain.errors import RunError
    from retrain.squeeze.compress import compress
    from retrain.squeeze.folder import RECORD
    from retrain.tracking.run_log import to_json

    output = _output(job)
    new = not output.exists()
    preflight.check_writable(output, "--output")
    facts = {
        "subject": _subject(job).title, "step": job.run.step if job.run else None, "model": _base(job), "merged": False,
        "squeezed": {"from": found.source.rank, "to": rank, "min_variance_retention": found.wanted},
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(dir=output, prefix=".squeeze-") as made, line_cleared():
            place = Path(made)
            written = compress(
                found,
                rank,
                place,
                keep_alpha="--keep-alpha" in job.flags,
                device=job.settings.device,
                progress=progress(),
            )
            (place / RECORD).write_text(to_json(record) + "\n", encoding="utf-8")
            export_folder.place(place, output, facts)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if new:
                output.rmdir()  # only when nothing is in it
        if isinstance(error, OSError):
            raise RunError(
                f"{output} cannot be written: {error.strerror or error}.", fix="make room, and try again."
            ) from error
        raise
    written = replace(written, directory=output)
    record["compressed"] = written.record(found)
    return written


def _begins(job: Job, written: Compressed) -> bool:
    """Can a run with the settings of the squeezed one begin at what was written?"""
    is_whole = not written.patterns and float(written.alpha).is_integer()
    return job.run is not None and job.run.directory is not None and is_whole


def _log_dir(job: Job) -> Path:
    """Where the compressed adapter is trained on."""
    from retrain.preflight import expanded

    given = [o.value for o in job.more if o.path == ("logging", "log_dir")]
    return expanded(str(given[-1]), "logging.log_dir") if given else Path(f"{_output(job)}-cont")


def _continuing(job: Job, directory: Path, rank: int, alpha: float, steps: int) -> list[str]:
    """The command line that trains the adapter in ``directory`` on, as its run was, for ``steps`` (0: a tenth, at least 10)."""
    assert job.run is not None  # an adapter alone has no settings to train with
    assert job.run.directory is not None
    settings = job.run.settings
    rslora = str(bool(settings.get("lora", {}).get("rslora"))).lower()
    trained = settings.get("training", {}).get("max_steps", 0)
    words = [str(job.run.directory / "config.toml"), "--init-from", str(directory), "--lora-rank", str(rank)]
    words += ["--lora.alpha", str(int(alpha)), "--lora.rslora", rslora]
    words += ["--max-steps", str(steps or max(10, trained // 10)), "--log-dir", str(_log_dir(job))]
    if settings.get("backend", {}).get("adapter_path") and not _gives(job, "backend", "adapter_path"):
        words += ["--backend.adapter_path", ""]  # the run's own, which this one must not replace
    if steps:
        words += [f"--{'.'.join(o.path)}={_text(o.value)}" for o in job.more if o.path != ("logging", "log_dir")]
    return words


def _gives(job: Job, *path: str) -> bool:
    return any(o.path == path for o in job.more)


_SET_BY_US: dict[tuple[str, ...], str] = {
    ("model", "lora_rank"): "--rank names the compressed adapter's",
    ("lora", "alpha"): "the compressed adapter brings its own",
    ("lora", "rslora"): "the compressed adapter brings its own",
    ("lora", "init_from"): "the run begins at the compressed adapter",
    ("training", "max_steps"): "--cont says how many steps",
    ("resume", "from"): "the run begins at the compressed adapter",
}
"""Settings of the further run that follow from the squeeze."""


def _check_continuing(job: Job) -> None:
    """What --cont will run, before any work: its settings and its directory."""
    from retrain import preflight
    from retrain.config.load import load
    from retrain.config.options import parse

    if "--keep-alpha" in job.flags:
        raise UsageError(
            "--keep-alpha writes what a run cannot start from, and --cont starts one.", fix="leave out one of them."
        )
    for o in job.more:
        if o.path in _SET_BY_US:
            raise UsageError(f"{o.flag} cannot be given with --cont: {_SET_BY_US[o.path]}.", fix="leave it out.")
    assert job.run is not None
    rank = job.settings.compress_to or int(job.run.settings.get("model", {}).get("lora_rank") or 1)
    line = parse(_continuing(job, _output(job), rank, 1, int(job.flags["--cont"])))
    config = load(Path(str(line.config)), line.overrides).config
    try:
        place = preflight.choose_directory(config, overwrite=False, fork=False)
    except ConfigError as error:
        raise UsageError(error.message, fix="name another with --log-dir.") from error  # its advice is for a run
    preflight.check_writable(place.directory, "logging.log_dir", make=False)


def _text(value: object) -> str:
    from retrain.config.fields import literal

    return value if isinstance(value, str) else literal(value)


def _page(path: Path, record: Mapping[str, Any]) -> str:
    from retrain.squeeze.show import page
    from retrain.tracking.run_log import write_atomically

    write_atomically(path, page(record))
    return str(path)


def _tell_wandb(job: Job, record: Mapping[str, Any]) -> str:
    from retrain.trackers import report_analysis

    rows = [
        {
            "rank": row["rank"],
            **{f"{name}_variance": 100 * row[name] for name in ("mean", "min", "max")},
            "predicted_error": row["predicted_error"],
            "parameters": row["parameters"],
        }
        for row in record["table"]
    ]
    facts = {"recommended_rank": record["recommended_rank"], "source_rank": record["rank"]}
    facts["min_variance_retention"] = record["min_variance_retention"]
    differences = record.get("eval", {}).get("difference", {}).get("after", {})
    for side in ("before", "after") if differences else ():
        facts[f"accuracy_{side}"] = record["eval"][side].get("eval/accuracy")
    return report_analysis(job.loaded.config, "squeeze-analysis", facts, rows)


def _report(record: Mapping[str, Any], *, hint: bool) -> str:
    from retrain.squeeze.folder import uncompressed
    from retrain.squeeze.show import percent, report

    lines = [report(record)]
    made = record.get("compressed")
    if made is not None:
        size = f"{made['bytes'] / 1e6:,.1f} MB"
        same = uncompressed(record, "--rank")
        folded = ", what alpha lacks in the factors" if made["folded"] else ""
        wrote = f"Wrote {made['output']}: "
        lines += [
            "",
            *([wrote + same] if same else []),
            f"{'It has ' if same else wrote}rank {made['rank']}, alpha {made['alpha']:g}{folded}; {size}, keeps "
            f"{percent(made['retained'])} of the variance (mean over layers; {percent(made['pooled'])} of all together); "
            f"relative error {made['predicted_error']:.2g}, of which "
            f"{made['rounding_error']:.1g} is the rounding to {made['dtype']}.",
        ]
        if made["patterns"]:
            lines.append("Its layers differ in rank or alpha: PEFT loads it, a run cannot start from it.")
    if "eval" in record:
        lines += ["", *accuracies(record)]
    if "page" in record:
        lines.append(f"Page: {record['page']}")
    if "wandb" in record:
        lines.append(f"wandb: {record['wandb']}")
    if hint and "train_on" in record and record["compressed"]["rank"] < record["rank"]:
        lines += ["", "Short training after compression, if accuracy matters (a suggestion, also its number of steps):"]
        lines.append(f"  {record['train_on']}")
    return "\n".join(lines)
