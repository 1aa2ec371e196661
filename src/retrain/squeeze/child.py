"""A squeeze in a process of its own: ``python -m retrain.squeeze.child ADAPTER OUT.json [SETTINGS.json]``.

For callers that must not import torch, such as a campaign. SETTINGS.json holds keys of [squeeze] (``Squeeze``); with
``output_path`` the compressed adapter is written too. OUT.json is written last and whole: what ``retrain squeeze --json``
prints, with ``recommended_rank`` and ``table``. Exit codes as of ``retrain``; a mistake is one line on stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrain.config.schema import Squeeze
from retrain.errors import RetrainError
from retrain.squeeze.analysis import analyse
from retrain.squeeze.compress import compress
from retrain.tracking.run_log import to_json, write_atomically


def squeeze(adapter: Path, settings: Squeeze) -> dict[str, Any]:
    """Analyse an adapter, and compress it where ``settings.output_path`` says so (a folder that is new or empty, which the
    caller sees to); the JSON document."""
    found = analyse(
        adapter,
        wanted=settings.min_variance_retention,
        target_ranks=settings.target_ranks,
        source_rank=settings.source_rank,
        device=settings.device,
        keep=bool(settings.output_path),
    )
    record = found.record()
    if settings.output_path:
        rank = settings.compress_to or found.recommended
        made = compress(found, rank, Path(settings.output_path).expanduser(), device=settings.device)
        record["compressed"] = made.record()
    return record


def main(arguments: Sequence[str]) -> int:
    """The process."""
    adapter, out, *more = map(Path, arguments)
    try:
        given: dict[str, Any] = json.loads(more[0].read_text(encoding="utf-8")) if more else {}
        record = squeeze(adapter, Squeeze.model_validate(given))
    except RetrainError as error:
        print(f"retrain: {error}", file=sys.stderr)
        return error.exit_code
    write_atomically(out, to_json(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
