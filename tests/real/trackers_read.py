"""Reads back what wandb (offline), trackio (local) and tensorboard wrote in a run directory."""

from __future__ import annotations

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any


def wandb_pieces(run: Path) -> list[dict[str, Any]]:
    """One entry per start: run id, name, project, tags, config, exit code, and the history's rows with their _step."""
    from wandb.proto import wandb_internal_pb2 as proto

    pieces = []
    for path in sorted(run.glob("trackers/wandb/offline-run-*/*.wandb")):
        piece: dict[str, Any] = {"rows": [], "config": {}, "exit": None}
        for data in _records(path.read_bytes()):
            record = proto.Record()
            record.ParseFromString(data)
            what = record.WhichOneof("record_type")
            if what == "run":
                piece |= {
                    "id": record.run.run_id, "name": record.run.display_name, "project": record.run.project,
                    "tags": list(record.run.tags), "group": record.run.run_group,
                }  # fmt: skip
                piece["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            elif what == "history":
                items = {
                    "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                piece["rows"].append(items)
            elif what == "exit":
                piece["exit"] = record.exit.exit_code
        pieces.append(piece)
    return pieces


def _records(data: bytes) -> list[bytes]:
    """Payloads of a log in LevelDB's format: blocks of 32 KiB, each part with crc, length and type; a torn end is cut."""
    found, at, part = [], 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        body = data[at + 7 : at + 7 + length]
        if kind == 0 or len(body) < length:
            break
        at += 7 + length
        part += body
        if kind in (1, 4):
            found.append(part)
            part = b""
    return found


def trackio_logs(run: Path, project: str) -> tuple[list[dict[str, Any]], dict[str, Any], set[str]]:
    """The rows with their step, the stored configuration, and the ids of all runs, straight from the database."""
    database = sqlite3.connect(run / f"trackers/trackio/{project}.db")
    try:
        rows = database.execute("SELECT step, metrics, run_id FROM metrics ORDER BY id").fetchall()
        (config,) = database.execute("SELECT config FROM configs").fetchone()
    finally:
        database.close()
    return [{"step": s, **json.loads(m)} for s, m, _ in rows], json.loads(config), {r for _, _, r in rows}


def tensorboard_scalars(run: Path) -> tuple[dict[str, dict[int, list[float]]], dict[str, dict[int, str]]]:
    """(tag -> step -> values, tag -> step -> text) as TensorBoard's own reader gives them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "trackers/tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    scalars: dict[str, dict[int, list[float]]] = {}
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            scalars.setdefault(tag, {}).setdefault(event.step, []).append(event.value)
    texts = {
        tag: {e.step: e.tensor_proto.string_val[0].decode() for e in reader.Tensors(tag)}
        for tag in reader.Tags()["tensors"]
    }
    return scalars, texts
