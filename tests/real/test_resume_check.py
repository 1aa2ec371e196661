"""``retrain resume-check`` beside what a real resume then says: killed runs, torn checkpoints, other settings and data."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from retrain import cards
from retrain.cli.main import main
from retrain.config.load import load
from retrain.errors import RetrainError
from retrain.runner import execute
from retrain.tracking import layout

torch.set_num_threads(1)

RUN = """
[model]
model = "retrain/tiny"
lora_rank = 8
[backend]
devices = "cpu"
[algorithm]
advantage_mode = "maxrl"
transform_mode = "gtpo_sepa"
[training]
seed = 5
max_steps = 3
batch_size = 2
group_size = 4
max_tokens = 24
temperature = 1.0
lr = 3e-3
save_every = 1
keep_checkpoints = 9
[sepa]
delay_steps = 1
steps = 4
[data]
source = "jsonl"
path = "rows.jsonl"
[reward]
type = "match"
[eval]
source = "arithmetic"
split = "validation"
examples = 4
every = 2
[logging]
log_dir = "run"
"""
CODE = re.compile(r"retrain's own code was \w+ and is \w+(; )?")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, its data, and a run of three steps in ``run``."""
    folder = tmp_path_factory.mktemp("resume")
    rows = [{"question": f"{a} + 1 = ?", "answer": str(a + 1)} for a in range(10, 40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "retrain.toml").write_text(RUN)
    os.chdir(folder)
    assert execute(load(folder / "retrain.toml"), plain=True).status == "done"
    return folder


@pytest.fixture
def place(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder to stand in."""
    shutil.copytree(done, tmp_path / "copy")
    for name in ("config.toml",):
        path = tmp_path / "copy" / "run" / name
        path.write_text(path.read_text().replace(str(done), str(tmp_path / "copy")))
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["resume-check", "run", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def resumed(*words: str) -> str:
    """What a real resume says: the lines of events.log, or its refusal."""
    before = Path("run/events.log").read_text() if Path("run/events.log").exists() else ""
    overrides = {"resume.from": "run"}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        overrides[flag.removeprefix("--")] = json.loads(value) if value[0].isdigit() else value
    try:
        execute(load(Path("run/config.toml"), overrides), plain=True)
    except RetrainError as error:
        return f"refused: {error.message}"
    return Path("run/events.log").read_text()[len(before) :]


def agrees(found: dict[str, Any], said: str) -> None:
    """The check and the resume say the same, but for retrain's own code, which may change while tests run."""
    if not found["possible"]:
        assert said == f"refused: {found['because']}"
        return
    assert f"Resuming run after {found['step']} steps from step_{found['step']:06d}." in said
    (line,) = re.findall(r"byte-exact: (.*)", said)
    line = CODE.sub("", line).replace("no, because .", "yes")
    reasons = [r for r in found["inexact"] if not CODE.fullmatch(r)]
    assert line.removesuffix("; .") == (f"no, because {'; '.join(reasons)}." if reasons else "yes")


def cut(directory: Path) -> None:
    path = directory / layout.STATE
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    "words", [(), ("--training.max_steps", "4"), ("--training.lr", "0.5"), ("--training.max_steps", "1")]
)
def test_a_finished_run_with_other_settings(
    place: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, found = checked(capsys, *words)
    assert code == (0 if found["possible"] else 1)
    assert found["possible"] == (words in ((), ("--training.max_steps", "4")))
    assert (found["state"], found["steps_logged"], found["step"]) == ("done", 3, 3)
    assert [c["name"] for c in found["checkpoints"] if c["used"]] == ["step_000003"]
    if words == ("--training.max_steps", "4"):
        assert found["changed"] == ["training.max_steps was 3 and is 4"]
        assert found["inexact"][-1] == "the evaluation after step 3 was due only at the shorter run's end"
        assert found["command"] == "retrain --resume run --training.max_steps 4"
    agrees(found, resumed(*words))


def test_torn_checkpoints_are_named_and_passed_over(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = place / "run" / layout.CHECKPOINTS
    cut(root / "step_000003")
    (root / ".step_000004.tmp").mkdir()
    _, found = checked(capsys)
    assert [(c["name"], c["damage"], c["used"]) for c in found["checkpoints"]] == [
        (".step_000004.tmp", "its writing was cut off", False),
        ("step_000003", "state.json does not match its checksum", False),
        ("step_000002", "", True),
        ("step_000001", "", False),
    ]
    assert (root / ".step_000004.tmp").exists()
    agrees(found, resumed())


def test_without_an_intact_checkpoint_nothing_can_be_resumed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (place / "run" / layout.CHECKPOINTS).iterdir():
        cut(path)
    code, found = checked(capsys)
    assert (code, found["byte_exact"], found["because"]) == (1, None, "run holds no intact checkpoint.")
    agrees(found, resumed())


@pytest.mark.parametrize("name", [layout.METRICS, layout.GENERATIONS])
@pytest.mark.parametrize("gone", [True, False])
def test_files_shorter_than_the_checkpoint_knows(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, gone: bool
) -> None:
    path = place / "run" / name
    path.unlink() if gone else path.write_bytes(path.read_bytes()[:-1])
    code, found = checked(capsys)
    assert code == 1
    assert "has fewer bytes than its checkpoint knows" in found["because"]
    assert path.exists() != gone
    agrees(found, resumed())


def says(place: Path, **facts: object) -> None:
    """Change what run.json says."""
    path = place / "run" / layout.RUN
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.mark.parametrize("status", ["interrupted", "hung"])
def test_a_lock_that_is_held_bars_whatever_the_status_says(
    place: Path, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    now = time.time()
    says(place, status="running" if status == "hung" else status, heartbeat=now, pid=1, started=now)
    (place / "run" / layout.HEARTBEAT).write_text(
        json.dumps({"pid": 1, "started": now, "time": now, "moved": now - 1e4, "usual_s": 1.0})
    )
    with (place / "run" / layout.LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, found = checked(capsys)
        assert (code, found["state"]) == (1, status)
        assert found["because"] == "another process is writing the run in run."
        agrees(found, resumed())


def test_a_run_that_was_killed_on_another_host_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says(place, status="running", host="another", heartbeat=time.time())
    code, found = checked(capsys)
    assert (code, found["state"]) == (0, "running")
    agrees(found, resumed())


def test_a_run_that_does_not_fit_here(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "_host_bytes", lambda: 2**20)
    monkeypatch.setattr(cards, "_swap_bytes", lambda: 0)
    code, found = checked(capsys)
    assert code == 1
    assert found["because"].startswith("this run cannot fit")
    agrees(found, resumed())


def test_other_data_and_other_weights_are_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "rows.jsonl").write_text((place / "rows.jsonl").read_text().replace('"11"', '"12"'))
    code, found = checked(capsys)
    assert code == 1
    assert found["because"].startswith("the tasks are not those of the checkpoint")
    agrees(found, resumed())


def test_weights_are_compared_when_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = place / "run" / layout.CHECKPOINTS / "step_000003" / layout.STATE
    facts = json.loads(state.read_text())
    assert checked(capsys, "--weights")[1]["not_compared"] == []
    facts["facts"]["weights"] = "others"
    state.write_text(json.dumps(facts))
    manifest = state.with_name(layout.MANIFEST)
    listed = json.loads(manifest.read_text())
    import hashlib

    listed["files"][layout.STATE] = {
        "bytes": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(listed))
    assert checked(capsys)[1]["not_compared"] == [
        "the base model's weights: --weights loads and compares them"
    ]
    code, found = checked(capsys, "--weights")
    assert (code, found["because"]) == (
        1,
        "the base model's weights are not those of the run that is to be resumed.",
    )
    agrees(found, resumed())


def test_every_fact_of_a_start_is_looked_at(place: Path) -> None:
    """A fact that a run records and the check leaves out would make them disagree."""
    from retrain import continuation

    recorded = json.loads((place / "run" / layout.CHECKPOINTS / "step_000003" / layout.STATE).read_text())[
        "facts"
    ]
    loaded = load(place / "run" / "config.toml")
    found = continuation._Findings()
    with continuation.dry.parts(loaded.config) as parts:
        now = continuation._facts(loaded.config, parts)
        now |= continuation._learner_facts(loaded.config, parts, recorded, found, weights=False)
    assert {k: v for k, v in now.items() if k not in ("code", "git")} == {
        k: v for k, v in recorded.items() if k not in ("code", "git", "inexact")
    }


def test_a_killed_run_and_another_number_of_threads(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(place / "run")
    run = subprocess.Popen(
        [sys.executable, "-m", "retrain", "--max-steps", "500", "--plain"], cwd=place,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (place / "run" / layout.CHECKPOINTS / "step_000002" / layout.MANIFEST).exists():
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, alive = checked(capsys)
        assert code == 1
        assert alive["because"] == "another process is writing the run in run."
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    code, found = checked(capsys, "--training.max_steps", "500")
    assert (code, found["state"]) == (0, "dead")
    last = found["step"] + 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    _, other = checked(capsys, "--training.max_steps", str(last))
    assert "the thread count was 1 and is 2" in other["inexact"]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        agrees(other, resumed("--training.max_steps", str(last)))
    finally:
        torch.set_num_threads(threads)


def test_the_text_names_everything(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(place / "run" / layout.CHECKPOINTS / "step_000003")
    capsys.readouterr()
    assert main(["resume-check", "run", "--max-steps", "4"]) == 0
    text = CODE.sub("", capsys.readouterr().out).replace("no, because .", "yes")
    text = re.sub(r"[\d.]+ MB", "<size> MB", text)
    assert (
        text
        == """\
run           run: done, 3 of 4 steps logged
torn          step_000003: state.json does not match its checksum
resumes from  step_000002 (5 files, <size> MB, checksums verified)
older         step_000001 (5 files, <size> MB, checksums verified)
changed       training.max_steps was 3 and is 4
compared      settings, tokenizer, training tasks and their order, schedules, versions and code, evaluation tasks
not compared  the base model's weights: --weights loads and compares them
can resume    yes, 2 steps are left
byte-exact    yes
continue      retrain --resume run --max-steps 4
"""
    )


def test_what_is_no_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["resume-check"],
        ["resume-check", "nowhere"],
        ["resume-check", "run", "--fork"],
        ["resume-check", "run", "--n"],
    ):
        assert main(words) == 2, words
        assert "Fix:" in capsys.readouterr().err
