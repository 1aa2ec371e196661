"""MATH and data sets through the package datasets: real counts, real local files of every format, mistakes by name."""

from __future__ import annotations

import csv
import datetime
import json
import logging
from pathlib import Path

import pytest

from retrain.config.schema import Data
from retrain.environments import hub_sources
from retrain.environments.hub_sources import DEFAULT_SUBJECTS, SUBJECTS
from retrain.environments.reading import DEFAULT_INSTRUCTION
from retrain.environments.sources import load_tasks
from retrain.errors import DataError
from retrain.types import Message


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def math_row(problem="1+1?", kind="Algebra", solution="So \\boxed{2}.", level="Level 1", **more):
    return {"problem": problem, "type": kind, "solution": solution, "level": level, **more}


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.mark.shared_data
def test_math_counts_are_the_true_ones(shared, caplog):
    path = str(shared / "data" / "math")
    with caplog.at_level(logging.INFO, "retrain"):
        five = load_tasks(Data(source="math", path=path), "train")
    assert "dropped 2 rows without an answer (line 5342, line 5344)" in caplog.text
    assert "4,549 problems of counting and probability, geometry" in caplog.text
    assert len(five) == 4549
    assert {t.info["subject"] for t in five} == set(DEFAULT_SUBJECTS)
    assert sum(t.info["subject"] == "number_theory" for t in five) == 867
    caplog.clear()
    seven = load_tasks(Data(source="math", path=path, subjects=("all",)), "train")
    assert len(seven) == 7498
    assert {t.info["subject"] for t in seven} == set(SUBJECTS)
    assert sum(t.info["level"] is None for t in seven) == 2
    # Ids do not depend on which subjects are chosen.
    assert {t.id: t for t in five}.items() <= {t.id: t for t in seven}.items()


@pytest.mark.shared_data
def test_math_references_are_the_data_sets_own_answers(shared):
    file = shared / "data" / "math" / "math_train.jsonl"
    with file.open(encoding="utf-8") as lines:
        answers = {row["problem"].strip(): row["answer"] for row in map(json.loads, lines)}
    found = load_tasks(Data(source="math", path=str(file), subjects=("all",)), "train")
    for task in found:
        problem = task.messages[0].content.removesuffix("\n\n" + DEFAULT_INSTRUCTION)
        assert task.reference == answers[problem].strip()


def test_math_takes_the_last_box_then_the_answer(tmp_path):
    file = write(
        tmp_path / "m.jsonl",
        math_row(solution="First \\boxed{1}, no: \\boxed{\\frac{1}{2}}.", answer="9"),
        math_row(solution="no box", answer=7, level="Level ?"),
        {"problem": "q", "subject": "Number Theory", "level": 5, "answer": "x"},
    )
    found = load_tasks(Data(source="math", path=str(file), subjects=("all",)), "test")
    assert [(t.id, t.reference, t.info["level"]) for t in found] == [
        ("math/test/algebra/0", "\\frac{1}{2}", 1),
        ("math/test/algebra/1", "7", None),
        ("math/test/number_theory/0", "x", 5),
    ]


@pytest.mark.parametrize(
    ("given", "subjects"),
    [
        (("Number Theory", "counting & probability"), {"number_theory", "counting_and_probability"}),
        (("all",), set(SUBJECTS)),
        ((), set(DEFAULT_SUBJECTS)),
    ],
)
def test_math_subjects_by_any_of_their_names(tmp_path, given, subjects):
    names = ["Algebra", "Counting & Probability", "Geometry", "Intermediate Algebra", "Number Theory",
             "Prealgebra", "Precalculus"]  # fmt: skip
    write(tmp_path / "train.jsonl", *(math_row(kind=n) for n in reversed(names)))
    found = load_tasks(Data(source="math", path=str(tmp_path), subjects=given), "train")
    assert [t.info["subject"] for t in found] == [s for s in SUBJECTS if s in subjects]


def test_math_mistakes_are_named(tmp_path):
    file = write(tmp_path / "m.jsonl", math_row(), {"question": "q"})
    for data, said in (
        (Data(source="math", path=str(file), subjects=("Numbr Theory",)), "did you mean 'number_theory'"),
        (Data(source="math", path=str(file), subjects=("all",)), r"m\.jsonl:2: not a MATH row"),
        (Data(source="math", path=str(tmp_path)), r"no train\.jsonl; it holds m\.jsonl"),
        (Data(source="math", path=str(write(tmp_path / "n.jsonl", math_row()))), "geometry.* holds no task"),
    ):
        with pytest.raises(DataError, match=said):
            load_tasks(data, "train")
    with pytest.raises(DataError, match="no split 'validation'"):
        load_tasks(Data(source="math"), "validation")


def test_math_from_the_hub_asks_for_one_configuration_per_subject(monkeypatch):
    import datasets

    asked = []

    def loaded(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(
            [math_row(kind=subset.replace("_", " ").title().replace("And", "&"))]
        )

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    found = load_tasks(Data(source="math"), "train")
    assert asked == [(hub_sources.MATH, subject, "train") for subject in DEFAULT_SUBJECTS]
    assert [t.id for t in found] == [f"math/train/{subject}/0" for subject in DEFAULT_SUBJECTS]


ROWS = [
    {"q": "1+1?", "reward_model": {"ground_truth": "2", "style": "rule"}, "n": 1},
    {"q": "2+2?", "reward_model": {"ground_truth": "4", "style": "rule"}, "n": 2},
    {"q": "nothing", "reward_model": {"ground_truth": None, "style": "rule"}, "n": 3},
]
FIELDS = {"question": "q", "answer": "reward_model.ground_truth"}


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_hf_reads_files_with_dotted_fields(tmp_path, kind, caplog):
    import datasets

    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(file)
    elif kind == "jsonl":
        write(file, *ROWS)
    else:
        file.write_text(json.dumps(ROWS))
    found = load_tasks(Data(source="hf", path=str(file), fields=FIELDS), "train")
    assert [(t.id, t.reference) for t in found] == [("hf/train/0", "2"), ("hf/train/1", "4")]
    assert found[0].messages == (Message("user", f"1+1?\n\n{DEFAULT_INSTRUCTION}"),)
    assert found[1].info["n"] == 2
    assert "dropped 1 row without an answer (row 2)" in caplog.text


def test_hf_reads_csv_folders_subsets_and_slices(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer"], ["1+1?", 2], ["2+2?", 4]])
    assert [t.reference for t in load_tasks(Data(source="hf", path=str(tmp_path / "rows.csv")), "x")] == [
        "2",
        "4",
    ]
    folder = tmp_path / "set"
    for subset in ("easy", "hard"):
        (folder / subset).mkdir(parents=True)
        for split in ("train", "test"):
            write(
                folder / subset / f"{split}.jsonl",
                *({"question": f"{subset} {split}", "answer": i} for i in (1, 2, 3)),
            )
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_dir: easy\n  default: true\n- config_name: hard\n  data_dir: hard\n---\n"
    )
    assert (
        load_tasks(Data(source="hf", path=str(folder)), "test")[0].messages[0].content.startswith("easy test")
    )
    hard = load_tasks(Data(source="hf", path=str(folder), subset="hard"), "train[:2]")
    assert len(hard) == 2
    assert hard[0].messages[0].content.startswith("hard train")
    for data, split, said in (
        (Data(source="hf", path=str(folder)), "dev", 'Unknown split "dev"'),
        (Data(source="hf", path=str(folder), subset="medium"), "train", "medium"),
    ):
        with pytest.raises(DataError, match=said):
            load_tasks(data, split)


@pytest.mark.shared_data
def test_hf_reads_real_data(shared):
    data = Data(
        source="hf",
        path=str(shared / "data" / "math" / "math_train.jsonl"),
        fields={"question": "problem", "id": "index"},
    )
    assert len(load_tasks(data, "train")) == 7498
    assert len(load_tasks(Data(source="hf", path=str(shared / "data" / "gsm8k")), "test")) == 1319


def test_a_question_may_be_a_conversation(tmp_path):
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1? Answer in a box."}]
    file = write(tmp_path / "c.jsonl", {"prompt": chat, "answer": "2", "when": "2026-01-01"})
    fields = {"question": "prompt"}
    for source in ("hf", "jsonl"):
        (plain,) = load_tasks(Data(source=source, path=str(file), fields=fields), "train")
        assert plain.messages == (Message("system", "Think."), Message("user", "1+1? Answer in a box."))
        (own,) = load_tasks(
            Data(source=source, path=str(file), fields=fields, system="Be brief.", instruction="Now."),
            "train",
        )
        assert own.messages == (
            Message("system", "Be brief."),
            Message("user", "1+1? Answer in a box.\n\nNow."),
        )
    for wrong in (
        [{"role": "user"}],
        [{"role": "robot", "content": "x"}],
        [*chat, {"role": "assistant", "content": "2"}],
        [],
        ["x"],
    ):
        bad = write(tmp_path / "bad.jsonl", {"prompt": wrong, "answer": "2"})
        with pytest.raises(DataError, match=r"bad\.jsonl:1: field 'prompt'"):
            load_tasks(Data(source="jsonl", path=str(bad), fields=fields), "train")


def test_jsonl_looks_inside_too_and_names_what_is_there(tmp_path):
    row = {"a.b": "dotted", "a": {"b": "inner", "c": ["x", {"d": 5}]}}
    data = Data(
        source="jsonl",
        path=str(write(tmp_path / "d.jsonl", row)),
        fields={"question": "a.b", "answer": "a.c.1.d"},
    )
    (task,) = load_tasks(data, "train")
    assert task.messages[0].content.startswith("dotted")
    assert task.reference == "5"
    bad = data.model_copy(update={"fields": {"question": "a.b", "answer": "a.c.7"}})
    with pytest.raises(
        DataError, match=r"no field 'a\.c\.7' for the answer; the row has 'a\.b', 'a', 'a\.b', 'a\.c'"
    ):
        load_tasks(bad, "train")


def test_dates_become_text_and_pictures_stay_out(tmp_path):
    import datasets

    file = tmp_path / "rows.parquet"
    rows = [{"question": "q", "answer": "1", "day": datetime.date(2026, 1, 2), "picture": None}]
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "day": datasets.Value("date32"),
            "picture": datasets.Image(),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    (task,) = load_tasks(Data(source="hf", path=str(file)), "train")
    assert dict(task.info) == {"day": "2026-01-02"}


def test_hf_mistakes_are_one_line(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "rows.xml").write_text("<x/>")
    for path, said in (
        ("", "needs a data set"),
        ("./no/such.parquet", "no such file"),
        (str(tmp_path / "broken.parquet"), "cannot be read"),
        (str(tmp_path / "rows.xml"), "none of json, jsonl, parquet, csv"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            load_tasks(Data(source="hf", path=path), "train")
        assert caught.value.fix
        assert "\n" not in str(caught.value)

    def unreachable(*_args, **_settings):
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"hf cannot be loaded from Hugging Face: Couldn't reach it Fix: .*subset"
    ):
        load_tasks(Data(source="hf", path="some/set"), "train")
    with pytest.raises(DataError, match="math cannot be loaded"):
        load_tasks(Data(source="math"), "train")
