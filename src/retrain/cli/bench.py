"""``retrain bench``: where the time of a training step goes, and how far that is from what the device allows."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.cli import streams
from retrain.cli.verb import at_once_on_interrupt, own_flags, quiet_loading, whole_number
from retrain.errors import UsageError

if TYPE_CHECKING:
    from retrain.config.load import LoadedConfig

USAGE = """\
Usage: retrain bench [CONFIG] [--sweep] [--steps N] [--trace TEXT] [--prompt-tokens N] [--flag value ...]

Times the training step of CONFIG (./retrain.toml, else the embedded model) on completions of forced lengths, and sets it
against what this device allows. No data and no reward is needed, and nothing is left on disk.

  --sweep              throughput against concurrency instead: steps at growing batch sizes, doublings from --min-batch-size
                       to --max-batch-size or as far as memory goes, with the curve, its fit and the size to use
  --out FILE           with --sweep: draw the curve into FILE.svg or FILE.html as well
  --steps N            steps to measure, after one to warm up; with --sweep, of each size (3)
  --trace TEXT         lengths: lognormal:median=700,p95=2048,cap=4096,seed=0,scale=1 (the default, scaled to
                       training.max_tokens), flat:128, file:lengths.jsonl, or my_module:my_function of (draw, member)
  --prompt-tokens N    tokens of every prompt (128, less where the context is short)
  --json               print one JSON object
Every setting of a run has its usual flag: retrain bench --batch-size 4 --devices cpu.
"""


def bench(arguments: Sequence[str]) -> int:
    """The command ``bench``."""
    own, rest = own_flags(
        "bench", arguments, values=("--steps", "--trace", "--prompt-tokens", "--out"), switches=("--json", "--sweep")
    )
    if "--out" in own:
        _check_out(own["--out"], sweeps="--sweep" in own)
    steps = whole_number(own.get("--steps", "3"), "--steps", least=1)
    prompt = (
        whole_number(own["--prompt-tokens"], "--prompt-tokens", least=1) if "--prompt-tokens" in own else 0
    )
    with streams.results(alone="--json" in own) as out, quiet_loading():
        loaded = _loaded(rest)
        from retrain.config.squeezes import refuse

        refuse(loaded.config, "bench")
        from retrain.bench.step import Settings, measure
        from retrain.tracking.run_log import to_json

        settings = Settings(steps=steps, trace=own.get("--trace", ""), prompt_tokens=prompt)
        if "--sweep" in own:
            _sweep(loaded, settings, out, own)
            return 0
        with at_once_on_interrupt():
            record = measure(loaded, settings, progress=_show)
        if "--json" in own:
            out.record(to_json(record))
        else:
            out.line(report(record))
    return 0


def _check_out(name: str, *, sweeps: bool) -> None:
    """UsageError before anything is measured where the curve could not be written."""
    if not sweeps:
        raise UsageError("--out draws the curve of --sweep.", fix="add --sweep, or leave it out.")
    path = Path(name)
    if path.suffix not in (".svg", ".html", ".htm"):
        raise UsageError(f"--out {name!r} is neither an SVG nor a page.", fix="end its name with .svg or .html.")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UsageError(f"--out {name!r} cannot be written.", fix="name a file in a folder that is there.")


def _sweep(loaded: LoadedConfig, settings: Any, out: Any, own: Mapping[str, str]) -> None:
    from retrain.bench import curve
    from retrain.bench.sweep import sweep
    from retrain.tracking.run_log import to_json

    with at_once_on_interrupt():
        record = sweep(loaded, settings, progress=_show)
    if "--out" in own:
        try:
            curve.write(record, Path(own["--out"]))
        except OSError as error:
            raise UsageError(
                f"--out {own['--out']!r} cannot be written: {error.strerror or error}.", fix="name another file."
            ) from error
    if "--json" in own:
        out.record(to_json(record))
        return
    out.line(curve.report(record))
    if "--out" in own:
        out.line(f"\nWrote {own['--out']}")


def _loaded(rest: Sequence[str]) -> LoadedConfig:
    from retrain.cli import dotenv
    from retrain.config import templates
    from retrain.config.load import load
    from retrain.config.options import parse

    line = parse(rest)
    for flag in sorted(line.switches - {"--debug"}):
        raise UsageError(f"{flag} is not an option of bench.", fix="leave it out; retrain bench --help.")
    with contextlib.redirect_stdout(sys.stderr):
        dotenv.load()
    if line.config is not None:
        if not os.path.exists(line.config) and not line.config.endswith(".toml"):
            raise UsageError(
                f"there is no file {line.config!r}.", fix="name a configuration: retrain bench CONFIG."
            )
        return load(Path(line.config), line.overrides)
    if os.path.exists("retrain.toml"):
        return load(Path("retrain.toml"), line.overrides)
    return load(Path(templates.path_of("tiny")), line.overrides, label="template tiny")


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[K{done} of {total} steps {end}", end="", file=sys.stderr, flush=True)


_INDENTED = {"prefill", "decode", "draw", "forward", "head", "backward", "optimizer"}
_LABELS = {"credit_and_pack": "credit, pack", "sync": "weights over"}


def report(record: Mapping[str, Any]) -> str:
    """The record as text."""
    settings, work, weights = record["settings"], record["work"], record["weights"]
    seconds, rates = record["seconds"], record["tokens_per_second"]
    roofline: Mapping[str, Any] = record["roofline"] or {}
    memory: Mapping[str, int | None] = record["memory"] or {}
    device = (
        f"{weights.get('dtype', '')} on {weights.get('device', '')}, {weights.get('threads', '?')} threads"
    )
    lines = [
        f"model      {record['model']}, rank {settings['lora_rank']}, {device}",
        f"work       {work['rollouts']:g} rollouts a step, prompts of {settings['prompt_tokens']}, {settings['trace']}",
        f"           {work['sampled_tokens']:,.0f} sampled and {work['trained_tokens']:,.0f} trained tokens a step, mean of "
        f"{settings['steps']}",
        "",
        f"{'':<20}{'seconds':>10}{'of step':>9}{'tokens/s':>12}{'of roof':>9}  bound by",
    ]
    for name, value in seconds.items():
        if value is None:
            continue
        label = (
            f"{'    ' if name in _INDENTED else '  '}{_LABELS.get(name, name)}" if name != "step" else name
        )
        row: Mapping[str, Any] = roofline.get(name) or {}
        rate, share = rates.get(name), row.get("share")
        lines.append(
            f"{label:<20}{value:>10.4f}{value / seconds['step']:>9.1%}{'' if rate is None else f'{rate:,.0f}':>12}"
            f"{'' if share is None else f'{share:.1%}':>9}  {'' if share is None else row['bound']}"
        )
    lines.append("")
    if record["peaks"]:
        found = [
            f"{v / 1e9:,.0f} GFLOP/s {k.removeprefix('matmul_')}"
            for k, v in record["peaks"].items()
            if k != "bandwidth"
        ]
        lines.append(
            f"roof       {', '.join(found)}, {record['peaks']['bandwidth'] / 1e9:.1f} GB/s, measured now"
        )
    else:
        lines.append("roof       unknown for this model, its number format or this backend")
    held = {name: value for name, value in memory.items() if value is not None}
    lines.append(
        "memory     "
        + ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.2f} GB" for name, value in held.items())
    )
    lines.append(
        f"non-model  {record['non_model_share']:.1%} of the step is neither sampling, learning nor handing weights over"
    )
    had = record["cpu_seconds"] / seconds["step"]
    if weights.get("device") == "cpu" and had < 0.9:
        lines.append(
            f"note       others use the processors: this process had {had:.0%} of one, and its shares are low by that"
        )
    return "\n".join(line.rstrip() for line in [*lines, record["slowest"]])
