"""Data sets of the Hugging Face Hub and their local copies: GSM8K, MATH, and any other by its id or files."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from retrain.boxed import last_boxed
from retrain.environments.reading import (
    DEFAULT_INSTRUCTION,
    DataSettings,
    as_text,
    existing,
    not_empty,
    prompt,
    report_dropped,
    row_tasks,
    rows,
    split_file,
)
from retrain.errors import DataError
from retrain.types import Task

log = logging.getLogger("retrain")

GSM8K = "openai/gsm8k"
MATH = "EleutherAI/hendrycks_math"

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
"""The subjects of MATH, by the names of the Hub's configurations."""

DEFAULT_SUBJECTS = (
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "precalculus",
)
"""The five of ``data.subjects = []``: 4,551 training problems, two of them without an answer."""

_FORMATS = {"json": "json", "jsonl": "json", "parquet": "parquet", "csv": "csv"}
_BINARY = ("Image", "Audio", "Video", "Pdf", "Nifti")


def gsm8k(data: DataSettings, split: str) -> list[Task]:
    """GSM8K, ``train`` (7,473) or ``test`` (1,319), with the number after ``####`` as the reference.

    Read from ``data.path`` (a file, or a folder that holds ``<split>.jsonl`` in OpenAI's layout), else from
    Hugging Face.
    """
    if data.path:
        path = split_file(data.path, split)
        place, found = str(path), rows(path)
    else:
        _known_split("gsm8k", split)
        place, found = GSM8K, _from_hub(GSM8K, "main", split, source="gsm8k")
    tasks: list[Task] = []
    for index, (where, row) in enumerate(found):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise DataError(
                f'{where}: not a GSM8K row (a question, and an answer that ends in "#### N").',
                fix='use source = "jsonl" for other files.',
            )
        tasks.append(
            Task(
                id=f"gsm8k/{split}/{index}",
                messages=prompt(data, question.strip(), DEFAULT_INSTRUCTION, "\n\n"),
                reference=answer.rpartition("####")[2].strip().replace(",", ""),
                source="gsm8k",
                draw=0,
                info={"solution": answer},
            )
        )
    return not_empty(tasks, place)


def math(data: DataSettings, split: str) -> list[Task]:
    """MATH (2103.03874), ``train`` or ``test``: the last box of the solution is the reference.

    ``data.subjects`` is empty for the five default subjects, ``all``, or any of the seven. Read from
    ``data.path`` (a JSONL file, or a folder that holds ``<split>.jsonl`` or ``math_<split>.jsonl``; rows with
    problem, level, type or subject, solution, and answer where there is no solution), else from Hugging Face.
    The order is by subject, then that of the rows, so both give the same tasks. Rows without an answer are
    dropped and counted. ``info`` holds subject, level (None where the data set does not say) and solution.
    """
    subjects = _subjects(data.subjects)
    if data.path:
        path = split_file(data.path, split, names=("{split}.jsonl", "math_{split}.jsonl"))
        place, found = str(path), rows(path)
    else:
        _known_split("math", split)
        place, found = MATH, _math_from_hub(subjects, split)
    by_subject: dict[str, list[Task]] = {subject: [] for subject in subjects}
    count = dict.fromkeys(SUBJECTS, 0)
    dropped: list[str] = []
    for where, row in found:
        name, problem = row.get("type", row.get("subject")), row.get("problem")
        subject = _slug(name) if isinstance(name, str) else ""
        if subject not in SUBJECTS or not isinstance(problem, str):
            raise DataError(
                f"{where}: not a MATH row (problem, level, type or subject, solution).",
                fix='use source = "jsonl" for other files.',
            )
        index = count[subject]
        count[subject] += 1
        if subject not in by_subject:
            continue
        solution = row.get("solution")
        solution = solution if isinstance(solution, str) else ""
        box = last_boxed(solution)
        answer = (as_text(row.get("answer")) or "") if box is None else box
        if not answer.strip():
            dropped.append(where)
            continue
        level = re.fullmatch(r"(?:Level )?(\d)", str(row.get("level")))
        by_subject[subject].append(
            Task(
                id=f"math/{split}/{subject}/{index}",
                messages=prompt(data, problem.strip(), DEFAULT_INSTRUCTION, "\n\n"),
                reference=answer.strip(),
                source="math",
                draw=0,
                info={"subject": subject, "level": int(level[1]) if level else None, "solution": solution},
            )
        )
    report_dropped(place, dropped)
    tasks = not_empty([t for group in by_subject.values() for t in group], f"{place} ({', '.join(subjects)})")
    log.info(
        "math: %s problems of %s, split %s.",
        f"{len(tasks):,}",
        "all seven subjects" if len(subjects) == len(SUBJECTS) else ", ".join(subjects).replace("_", " "),
        split,
    )
    return tasks


def hf(data: DataSettings, split: str) -> list[Task]:
    """Any data set that the package datasets reads: ``data.path`` is an id on the Hub, a folder, or a file (json,
    jsonl, parquet, csv), ``data.subset`` its configuration. No code of the data set runs.

    ``data.fields`` maps question, answer and id to its columns (``a.b`` looks inside ``a``); see
    ``reading.row_tasks``. A file holds whatever split is asked for; of a folder or id the split must exist.
    """
    if not data.path:
        raise DataError(
            'data.source = "hf" needs a data set.',
            fix='set data.path = "openai/gsm8k", or to a local folder or file.',
        )
    # What looks like a path is one: a typo must not become a download.
    is_local = os.path.exists(os.path.expanduser(data.path)) or not re.fullmatch(
        r"[\w.-]+(/[\w.-]+)?", data.path
    )
    load = _from_files if is_local else _from_hub
    found = load(data.path, data.subset, split)
    return row_tasks(data, split, ((where, _plain(row)) for where, row in found), f"{data.path} {split}")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row in JSON's types (a date as text), because rewards may score in another process."""
    return json.loads(json.dumps(row, default=str))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z]+", "_", name.lower().replace("&", "and")).strip("_")


def _subjects(given: Sequence[str]) -> tuple[str, ...]:
    if not given:
        return DEFAULT_SUBJECTS
    wanted = [_slug(name) for name in given]
    if "all" in wanted:
        return SUBJECTS
    for name, subject in zip(given, wanted, strict=True):
        if subject not in SUBJECTS:
            near = difflib.get_close_matches(subject, [*SUBJECTS, "all"], n=1)
            known = f"use {', '.join(SUBJECTS)}, or all."
            raise DataError(
                f"data.subjects: MATH has no subject {name!r}.",
                fix=f"did you mean {near[0]!r}? Otherwise {known}" if near else known,
            )
    return tuple(subject for subject in SUBJECTS if subject in wanted)


def _known_split(source: str, split: str) -> None:
    if split not in ("train", "test"):
        raise DataError(f"{source} has no split {split!r}.", fix="use train or test.")


def _math_from_hub(subjects: Sequence[str], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for subject in subjects:
        yield from _from_hub(MATH, subject, split, source="math")


def _datasets(source: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        other = "." if source == "hf" else ", or set data.path."
        raise DataError(
            f"{source} needs the package datasets, which is not installed.",
            fix=f'pip install "retrain[local]"{other}',
        ) from error
    return cast("Any", datasets)


def _from_hub(name: str, subset: str, split: str, source: str = "hf") -> Iterator[tuple[str, dict[str, Any]]]:
    fix = {
        "gsm8k": "connect once to download it, or set data.path to a folder with train.jsonl and test.jsonl.",
        "math": "connect once to download it, or set data.path to a JSONL file of its rows.",
        "hf": "correct data.path, data.subset or data.split; a data set must be downloaded once, with a connection.",
    }[source]
    datasets = _datasets(source)
    try:
        table = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the download fails with the exception types of several HTTP libraries
        raise DataError(f"{source} cannot be loaded from Hugging Face: {_reason(error)}", fix=fix) from error
    return _table_rows(table, f"{name} {subset} {split}".replace("  ", " "))


def _from_files(path: str, subset: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    place, datasets = existing(path), _datasets("hf")
    datasets.disable_progress_bars()
    try:
        if place.is_dir():
            table = datasets.load_dataset(str(place), subset or None, split=split)
        else:
            kind = _FORMATS.get(place.suffix.lstrip(".").lower())
            if kind is None:
                raise DataError(
                    f"data.path = {str(place)!r} is none of {', '.join(_FORMATS)}.",
                    fix="convert it to one of them.",
                )
            # A single file is whatever split it is asked for; its name cannot be a slice such as train[:10].
            table = datasets.load_dataset(kind, data_files={"rows": str(place)}, split="rows")
    except DataError:
        raise
    except Exception as error:  # one exception type per format
        raise DataError(
            f"{place} cannot be read: {_reason(error)}", fix="correct data.path, data.subset or data.split."
        ) from error
    finally:
        datasets.enable_progress_bars()
    return _table_rows(table, f"{place} {split}")


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


def _table_rows(table: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Pictures and sounds would be decoded for nothing.
    features: dict[str, object] = getattr(table, "features", None) or {}
    binary = [name for name, feature in features.items() if type(feature).__name__ in _BINARY]
    for index, row in enumerate(table.remove_columns(binary) if binary else table):
        yield f"{place} row {index}", dict(row)
