"""A squeeze in a process of its own: ``python -m retrain.squeeze.child ADAPTER OUT.json [SETTINGS.json]``.

For callers that must not import torch, such as a campaign. SETTINGS.json holds keys of [squeeze] (``Squeeze``); with
``output_path``, a folder that is new, empty, or of an earlier squeeze of the same adapter, the compressed adapter is written
too. OUT.json is written last and whole: what ``retrain squeeze --json`` prints, with ``recommended_rank`` and ``table``. Exit
codes as of ``retrain``; a mistake is one line on stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrain.config.load import load
from retrain.config.schema import Squeeze
from retrain.errors import ConfigError, RetrainError, RunError, UsageError
from retrain.squeeze import folder
from retrain.squeeze.analysis import analyse
from retrain.squeeze.compress import compress
from retrain.tracking.run_log import to_json, write_atomically


def squeeze(adapter: Path, settings: Squeeze) -> dict[str, Any]:
    """Analyse an adapter, and compress it where ``settings.output_path`` says so; the JSON document. ConfigError, before
    any work, where that folder holds something else."""
    output = Path(settings.output_path).expanduser().absolute() if settings.output_path else None
    if output is not None:
        folder.check(output, adapter)
    found = analyse(
        adapter,
        wanted=settings.min_variance_retention,
        target_ranks=settings.target_ranks,
        source_rank=settings.source_rank,
        device=settings.device,
        keep=output is not None,
    )
    record = found.record()
    if output is not None:
        rank = settings.compress_to or found.recommended
        facts = {
            "subject": str(adapter), "model": record["base_model"], "merged": False,
            "squeezed": {"from": found.source.rank, "to": rank, "min_variance_retention": found.wanted},
        }  # fmt: skip
        with folder.placed(output, adapter, facts) as made:
            written = compress(found, rank, made, device=settings.device)
            (made / folder.RECORD).write_text(to_json(record) + "\n", encoding="utf-8")
        record["compressed"] = replace(written, directory=output).record(found)
    return record


def _settings(file: Path) -> Squeeze:
    """The settings of a file; ConfigError for what is no key of [squeeze], or no JSON."""
    try:
        given: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is no JSON: {error}.", fix="write keys of [squeeze] there.") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{file} holds no JSON object.", fix="write keys of [squeeze] there.")
    return load({"squeeze": given}).config.squeeze or Squeeze()


def main(arguments: Sequence[str]) -> int:
    """The process."""
    try:
        if len(arguments) not in (2, 3):
            raise UsageError(
                f"{len(arguments)} arguments.", fix="python -m retrain.squeeze.child ADAPTER OUT.json [SETTINGS.json]"
            )
        adapter, out, *more = map(Path, arguments)
        record = squeeze(adapter, _settings(more[0]) if more else Squeeze())
        try:
            write_atomically(out, to_json(record) + "\n")
        except OSError as error:
            raise RunError(f"{out} cannot be written: {error.strerror}.", fix="name another file.") from error
    except RetrainError as error:
        print(f"retrain: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
