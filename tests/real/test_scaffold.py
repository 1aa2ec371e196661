"""``retrain init-plugin`` for every kind, as a user has it: an empty folder, a process of its own, no PYTHONPATH."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from retrain import plugins
from retrain.cli import scaffold
from retrain.cli.main import main
from retrain.config import names
from retrain.config.load import load
from retrain.config.own import named_plugins
from retrain.errors import UsageError

KIND_OF = {"planning": "detector", "data": "source", "inference": "engine"}
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=300)


def test_there_is_a_kind_for_everything_that_takes_a_dotted_path() -> None:
    assert {KIND_OF.get(kind, kind) for kind in scaffold.KINDS} == set(names.OPEN) == set(plugins.SIGNATURES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for kind in scaffold.KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        done = python(made[kind], "-m", "retrain", "init-plugin", "--kind", kind, "--name", f"my_{kind}", "--with-test")
        assert done.returncode == 0, done.stderr
        files = sorted(str(p.relative_to(made[kind])) for p in made[kind].rglob("*") if p.is_file())
        assert files == [f"my_{kind}.toml", f"plugins/my_{kind}.py", f"plugins/test_my_{kind}.py"]
        assert all(f"Wrote {file}" in done.stdout for file in files)
        assert not any("@NAME@" in (made[kind] / f).read_text() or "@GROUP@" in (made[kind] / f).read_text() for f in files)
    return made


def test_every_generated_test_passes_under_plain_pytest(folders: dict[str, Path]) -> None:
    tests = [str(folder / "plugins" / f"test_my_{kind}.py") for kind, folder in folders.items()]
    done = python(next(iter(folders.values())), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_what_it_writes_trains_a_step(folders: dict[str, Path], kind: str) -> None:
    folder, name = folders[kind], f"my_{kind}"
    assert [k for k, _ in named_plugins(load(folder / f"{name}.toml").config)] == [KIND_OF.get(kind, kind)]
    done = python(folder, "-m", "retrain", f"{name}.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does nothing" not in done.stdout + done.stderr
    run = folder / "logs" / name
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert row["num_datums"] > 0
    assert row["grad_norm"] > 0
    facts = json.loads((run / "run.json").read_text())["facts"]
    assert facts["plugins"].startswith(f"{name}.{scaffold.KINDS[kind][0]} ")
    if kind == "sink":
        assert json.loads((run / f"{name}.jsonl").read_text())["reward"] == row["mean_reward"]
    elif kind == "backend":
        assert facts["learner"] == name
        assert (run / "checkpoints" / "step_000001" / f"{name}.txt").read_text() == "1"
    elif kind == "environment":
        assert "That is not right" in (run / "emergence" / "generations.jsonl").read_text() or row["mean_length"] > 25


def test_a_run_with_a_backend_of_ones_own_resumes_and_evaluates(folders: dict[str, Path]) -> None:
    folder = folders["backend"]
    if not (folder / "logs").exists():
        python(folder, "-m", "retrain", "my_backend.toml")
    more = python(folder, "-m", "retrain", "--resume", "logs/my_backend", "--max-steps", "2")
    assert more.returncode == 0, more.stdout + more.stderr
    run = folder / "logs" / "my_backend"
    assert (run / "checkpoints" / "step_000002" / "my_backend.txt").read_text() == "2"
    held_out = python(folder, "-m", "retrain", "eval", "logs/my_backend", "--source", "arithmetic", "--examples", "4", "--json")
    assert held_out.returncode == 0, held_out.stderr
    assert json.loads(held_out.stdout)["metrics"]["eval/tasks"] == 4


def test_the_printed_lines_and_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init-plugin", "--kind", "engine", "--name=mine", "--output-dir", 'a "b"/c/']) == 0
    out = capsys.readouterr().out
    snippet = tomllib.loads(out.partition("yours:\n")[2].partition("Train")[0])
    assert snippet == {"inference": {"engine": "mine.make_engine"}, "plugins": {"search_paths": ['a "b"/c']}}
    assert out.endswith("Train a step:  retrain mine.toml\n")
    written = tomllib.loads((tmp_path / "mine.toml").read_text())
    assert written["inference"] == snippet["inference"]
    assert load(tmp_path / "mine.toml").search_paths[0] == tmp_path / 'a "b"/c'


def test_a_folder_in_the_home_directory_is_where_the_loader_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert main(["init-plugin", "--kind", "reward", "--name", "mine", "--output-dir", "~/foo bar"]) == 0
    place = tmp_path / "home" / "foo bar"
    assert (place / "mine.py").is_file()
    assert f'search_paths = ["{place}"]' in capsys.readouterr().out
    assert load(tmp_path / "work" / "mine.toml").search_paths[0] == place
    assert os.listdir() == ["mine.toml"]


WRONG = [
    (["--kind", "sink", "--name", "x_y", "--output-dir", ""], "--output-dir is empty. Fix: "),
    (["--kind", "sink", "--name", "x_y", "--output-dir= "], "--output-dir is empty. Fix: "),
    (["--kind", "sink", "--name", "x_y", "--output-dir", "~nobody-here/x"], "there is no such home directory. Fix: "),
    (["--kind", "transform"], "needs --name"),
    (["--name", "x_y"], "needs --kind"),
    (["--kind", "transfrom", "--name", "x_y"], "did you mean transform?"),
    (["--kind", "sink", "--name", "my-sink"], "for example --name my_sink."),
    (["--kind", "sink", "--name", "2nd"], "for example --name my_2nd."),
    (["--kind", "sink", "--name", "class"], "for example --name class_plugin."),
    (["--kind", "sink", "--name", "größe"], "cannot be the name of a module"),
    (["--kind", "sink", "--name", "../x"], "for example --name x."),
    (["--kind", "sink", "--name", "json"], "there is a module 'json' already"),
    (["--kind", "sink", "--name", "retrain"], "there is a module 'retrain' already"),
    (["--kind", "sink", "--name", "numpy"], "for example --name my_numpy."),
    (["--kind", "sink", "--name", "x_y", "z"], "unexpected argument 'z'"),
    (["--kind", "sink", "--name", "x_y", "--overwrite"], "--overwrite is not an option of init-plugin"),
    (["--kind", "sink", "--name", "x_y", "--output-dir", "a-file"], "cannot be written"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    assert main(["init-plugin", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a-file"]


@pytest.mark.parametrize("taken", ["plugins/x_y.py", "plugins/test_x_y.py", "x_y.toml", "plugins/x_y"])
def test_it_never_overwrites(taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins").mkdir()
    (tmp_path / taken).write_text("mine")
    with pytest.raises(UsageError, match="never overwrites"):
        scaffold.init_plugin(["--kind", "reward", "--name", "x_y", "--with-test"])
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"]


@pytest.mark.parametrize(("there", "said"), [(True, ""), (False, "pip install pytest && ")])
def test_it_says_how_to_get_pytest_where_there_is_none(
    there: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if there or name != "pytest" else None)
    assert main(["init-plugin", "--kind", "reward", "--name", "x_y", "--with-test"]) == 0
    assert f"Test it with:  {said}pytest plugins/test_x_y.py\n" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "listed"), KIND_OF.items())
def test_both_names_of_a_kind_are_taken(
    kind: str, listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", kind]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{listed}: ")
    assert main(["plugins", listed]) == 0
    assert capsys.readouterr().out == shown
    assert main(["init-plugin", "--kind", listed, "--name", "x_y"]) == 0
    assert {kind, listed} <= set(scaffold.USAGE["init-plugin"].replace(",", " ").split())
