"""``retrain report``: a run as one file to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrain.cli import streams
from retrain.cli.verb import at_once_on_interrupt, own_flags, quiet_loading, whole_number
from retrain.errors import UsageError

USAGE = {
    "report": """\
Usage: retrain report RUN [--out FILE.html] [--max-mb N]

Writes a run as one HTML file that needs no network, and as Markdown beside it: what came of it, alarms, curves, times,
settings with their origins, and its rollouts token by token. RUN is a run directory, finished or not. Of a folder of
runs: their curves in one plot each, and a table.

  --out FILE.html    where to write (RUN/report.html and RUN/report.md)
  --max-mb N         size of the HTML file in megabytes (15); more of them show more rollouts
  --json             print one JSON object
"""
}


def report(arguments: Sequence[str]) -> int:
    """The command ``report``."""
    own, rest = own_flags("report", arguments, values=("--out", "--max-mb"), switches=("--json",))
    flags = [word for word in rest if word.startswith("-")]
    if flags and flags != ["--debug"]:
        unknown = next(word for word in flags if word != "--debug")
        raise UsageError(f"{unknown} is not an option of report.", fix="retrain report --help lists them.")
    places = [word for word in rest if not word.startswith("-")]
    if len(places) != 1:
        what = "needs a run directory" if not places else "takes one run directory or one folder of runs"
        raise UsageError(f"retrain report {what}.", fix="retrain report logs/train, for example.")
    with streams.results(alone="--json" in own) as out, quiet_loading(), at_once_on_interrupt():
        from retrain.report import build

        megabytes = whole_number(own.get("--max-mb", str(build.DEFAULT_MB)), "--max-mb", least=build.LEAST_MB)
        target = Path(own["--out"]) if own.get("--out") else None
        record = build.write(Path(places[0]), target, megabytes=megabytes)
        if "--json" in own:
            import json

            out.record(json.dumps(record, ensure_ascii=False))
        else:
            out.line(f"Wrote {record['html']} ({record['bytes'] / 1e6:.1f} MB) and {record['markdown']}.")
            if record.get("rollouts", 0) < record.get("rollouts_stored", 0):
                out.line(
                    f"{record['rollouts']:,} of {record['rollouts_stored']:,} rollouts fit; --max-mb N shows more."
                )
    return 0
