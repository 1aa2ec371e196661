"""``retrain report``: a run or a campaign as one file to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from retrain.cli import streams
from retrain.cli.verb import at_once_on_interrupt, own_flags, quiet_loading, whole_number
from retrain.errors import UsageError

USAGE = {
    "report": """\
Usage: retrain report RUN|CAMPAIGN [--out FILE.html] [--max-mb N]

Writes a run as one HTML file that needs no network, and as Markdown beside it: what came of it, alarms, curves, times,
settings with their origins, and its rollouts token by token. RUN is a run directory, finished or not. Of a CAMPAIGN:
verdicts against its baseline as declared in its manifest, every run, curves by condition, failures, cost; no verdict
before the declared seeds are done. Of another folder of runs: their curves in one plot each, and a table.

  --out FILE.html    where to write (report.html and report.md in that directory)
  --max-mb N         of a run: size of the HTML file in megabytes (15); more of them show more rollouts
  --json             print one JSON object; of a campaign: everything that its report says
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
        from retrain.tracking import layout

        place = Path(places[0])
        if layout.holds_campaign(place):
            if own.get("--max-mb"):
                raise UsageError("--max-mb is that of a run's report.", fix="leave it out: a campaign's page shows no rollouts.")
            return _campaign(place, own, out)
        megabytes = whole_number(own.get("--max-mb", str(build.DEFAULT_MB)), "--max-mb", least=build.LEAST_MB)
        target = Path(own["--out"]) if own.get("--out") else None
        record = build.write(place, target, megabytes=megabytes)
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


def _campaign(directory: Path, own: Mapping[str, str], out: streams.Results) -> int:
    from retrain.campaign import report as campaign

    record = campaign.write(directory, Path(own["--out"]) if own.get("--out") else None)
    if "--json" in own:
        import json

        out.record(json.dumps(record, ensure_ascii=False))
        return 0
    if record["analysis"] is None:
        told = record["awaited"]
        out.line(
            f"No verdict is read before {told['seeds']} seeds of every condition are done ({told['finished']} of {told['runs']} "
            "runs are)."
        )
    else:
        for each in record["analysis"]["comparisons"]:
            out.line(f"{each['label']}: {each['text']}")
    for warning in record["warnings"]:
        out.line(f"warning: {warning}")
    out.line(f"Wrote {record['html']} ({record['bytes'] / 1e6:.1f} MB) and {record['markdown']}.")
    return 0
