"""Every example loads and the small ones train; what the documents print (TOML, Python, paths, links) holds too."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from retrain.config import templates
from retrain.config.load import load, load_config
from retrain.runner import execute

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*/retrain.toml"))
ROOT = EXAMPLES.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(EXAMPLES.glob("*/README.md")),
]
WRITTEN_LATER = {ROOT / "docs" / "proofs.md"}
"""Pages that `make proofs` writes."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\b[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)


def test_there_is_a_readme_beside_every_configuration():
    assert {p.parent.name for p in CONFIGS} == {p.name for p in EXAMPLES.iterdir() if p.is_dir()}
    assert {"gsm8k", "math", "jsonl", "custom-reward", "tiny"} <= {p.parent.name for p in CONFIGS}
    assert all((p.parent / "README.md").is_file() for p in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.parent.name)
def test_it_loads_without_a_setting_that_does_nothing(path):
    assert load(path).announcements == ()


@pytest.mark.parametrize(("example", "name"), [("tiny", "tiny"), ("math", "robust")])
def test_it_is_the_template(example, name):
    ours = load_config(EXAMPLES / example / "retrain.toml").model_dump()
    template = load_config(Path(templates.path_of(name))).model_dump()
    ours["logging"].pop("log_dir")
    template["logging"].pop("log_dir")
    assert ours == template


def short(name: str, run: Path, **more: object):
    return load(
        EXAMPLES / name / "retrain.toml",
        {
            "training.max_steps": 2,
            "training.batch_size": 2,
            "training.group_size": 4,
            "training.max_tokens": 16,
            "logging.log_dir": str(run),
            **more,
        },
    )


def rows(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "folder"), [("gsm8k", "gsm8k"), ("math", "math")])
def test_the_gpu_examples_train(name, folder, tmp_path, shared, random_model):
    """On real data, with everything as written but the model (random, with a real tokenizer) and the sizes."""
    model = str(random_model(tokenizer=shared / "tokenizers/qwen3", vocab=151_936))
    data = str(shared / "data" / folder)
    held_out = {"eval.examples": 4, "eval.samples": 2}
    if name == "math":  # its test split is not among the shared data
        held_out = {"eval.source": "arithmetic", "eval.examples": 4}
    config = short(
        name, tmp_path / "run",
        **{"model.model": model, "backend.devices": "cpu", "data.path": data, "training.warmup_steps": 1, **held_out},
    )  # fmt: skip
    assert execute(config, plain=True).status == "done"
    steps = [r for r in rows(tmp_path / "run") if "eval/accuracy" not in r]
    assert [r["step"] for r in steps] == [0, 1]
    assert all(r["reward_error_rate"] == 0 for r in steps)


def test_jsonl_trains(tmp_path):
    assert execute(short("jsonl", tmp_path / "run"), plain=True).status == "done"
    assert [r["step"] for r in rows(tmp_path / "run")] == [0, 1]
    first = (tmp_path / "run" / "emergence" / "generations.jsonl").read_text(encoding="utf-8").splitlines()[0]
    known = [json.loads(line) for line in (EXAMPLES / "jsonl" / "tasks.jsonl").read_text().splitlines()]
    assert len(known) == 20
    assert json.loads(first)["task"].removeprefix("jsonl/train/") in {row["key"] for row in known}


def test_the_answers_of_the_jsonl_tasks_are_right():
    for line in (EXAMPLES / "jsonl" / "tasks.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        a, operator, b, *_ = row["problem"].split()
        assert row["solution"] == int(a) + int(b) * {"+": 1, "-": -1}[operator]


def test_custom_reward_trains_and_logs_its_parts(tmp_path):
    assert execute(short("custom-reward", tmp_path / "run"), plain=True).status == "done"
    for row in rows(tmp_path / "run"):
        assert row["reward_error_rate"] == 0
        parts = 0.9 * row["rewards/correct"] + 0.1 * row["rewards/one_box"]
        assert row["mean_reward"] == pytest.approx(parts)
        assert row["correct_rate"] == pytest.approx(row["rewards/correct"])


def test_composite_reward_trains_and_logs_its_parts(tmp_path):
    config = short("composite-reward", tmp_path / "run", **{"training.max_tokens": 62})
    assert execute(config, plain=True).status == "done"
    for row in rows(tmp_path / "run"):
        assert row["reward_error_rate"] == 0
        assert {"rewards/math", "rewards/one_answer", "rewards/short"} <= set(row)
        if row["rewards/short"] == 1:
            assert row["mean_reward"] == pytest.approx(row["rewards/math"] + 0.1 * row["rewards/one_answer"])
            assert row["correct_rate"] == pytest.approx(row["rewards/math"])


TOML = [(page, text) for page in PAGES for text in blocks(page, "toml")]


@pytest.mark.parametrize(("page", "text"), TOML, ids=lambda v: v.name if isinstance(v, Path) else "")
def test_toml_in_the_documents_loads_and_acts(page, text):
    raw = tomllib.loads(text)
    if "squeeze" not in raw:
        raw.setdefault("data", {"source": "arithmetic"})
    assert load(raw).announcements == ()


def test_the_fakes_of_the_python_page_sample(capsys):
    printed = [text for text in blocks(ROOT / "docs" / "python-api.md", "python") if "fakes" in text]
    assert len(printed) == 1
    exec(printed[0], {})
    assert len(eval(capsys.readouterr().out)) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    targets += [ROOT / name for name in re.findall(r"`((?:tests|docs|examples|scripts)/[\w./-]+)`", text)]
    missing = [
        str(t)
        for t in targets
        if not t.exists() and t.resolve() not in WRITTEN_LATER and t.name != "proofs.svg"
    ]
    assert missing == []


def test_the_tree_in_the_readme_names_real_places():
    tree = re.search(
        r"^    src/retrain/\n(?:    .*\n)+", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M
    )
    assert tree is not None
    lines = tree[0].splitlines()
    inner = [line.split()[0] for line in lines if line.startswith("      ")]
    outer = [line.split()[0] for line in lines if not line.startswith("      ")]
    assert all((ROOT / name).exists() for name in outer)
    assert all((ROOT / "src" / "retrain" / name).exists() for name in inner)
    packages = {
        f"{p.name}/" for p in (ROOT / "src" / "retrain").iterdir() if p.is_dir() and p.name != "__pycache__"
    }
    assert packages <= set(inner)
