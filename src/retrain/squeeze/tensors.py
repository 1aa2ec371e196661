"""Safetensors files one tensor at a time, read and written without mapping them: memory holds one tensor, whatever the
file's size."""

# torch is only partly typed: what it returns is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from retrain.adapter_settings import damaged
from retrain.errors import RunError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The number formats that an adapter may have, by their names in the file."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: ``dtype`` by its name in the file, ``begin`` in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


def entries(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name; ModelError when its header cannot be read."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = cast("dict[str, Any]", json.loads(stream.read(length)))
        found: dict[str, Entry] = {}
        for name, spec in header.items():
            if name != "__metadata__":
                begin, end = spec["data_offsets"]
                found[name] = Entry(str(spec["dtype"]), tuple(spec["shape"]), 8 + length + begin, end - begin)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise damaged(file, error) from error
    return found


def read(file: Path, entry: Entry) -> torch.Tensor:
    """One tensor, on the CPU; ModelError when the file ends before it."""
    buffer = torch.empty(entry.size, dtype=torch.uint8)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(entry.begin)
            view, at = memoryview(cast("Any", buffer.numpy())), 0
            while at < entry.size and (got := stream.readinto(view[at:])):
                at += got
    except OSError as error:
        raise damaged(file, error) from error
    if at < entry.size:
        raise damaged(file, EOFError("it ends within a tensor"))
    return buffer.view(DTYPES[entry.dtype]).reshape(entry.shape)


def write(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[torch.Tensor]
) -> None:
    """Write ``tensors``, which come in the order of ``shapes``, all in ``dtype``; RunError when there is no room."""
    width = torch.empty(0, dtype=dtype).element_size()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = width * int(torch.Size(shape).numel())
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for shape, tensor in zip(shapes.values(), tensors, strict=True):
                assert tuple(tensor.shape) == shape
                plain = tensor.to("cpu", dtype).contiguous()
                stream.write(memoryview(cast("Any", plain.reshape(-1).view(torch.uint8).numpy())))
    except OSError as error:
        raise RunError(
            f"{file} cannot be written: {error.strerror or error}.", fix="make room, or name another folder."
        ) from error
