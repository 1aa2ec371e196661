"""The command line with nothing faked: mistakes are one line each, broken rewards end a run, Ctrl-C saves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retrain.cli.main import main

BASE = """
[model]
model = "retrain/tiny"
lora_rank = 4
[backend]
devices = "cpu"
[algorithm]
advantage_mode = "grpo"
transform_mode = "none"
[training]
seed = 3
max_steps = 2
batch_size = 2
group_size = 4
max_tokens = 24
temperature = 1.0
[data]
source = "jsonl"
path = "tasks.jsonl"
[reward]
type = "match"
[logging]
log_dir = "run"
"""

TASKS = [{"question": f"{a} + {b} = ?", "answer": str(a + b)} for a, b in ((12, 34), (25, 61), (40, 17), (33, 33))]

REWARDS = """
import time
def raises(response, reference):
    raise ZeroDivisionError("no such luck")
def gives_nan(response, reference):
    return float("nan")
def hangs(response, reference):
    while True:
        pass
def fine(response, reference):
    return 1.0
def sometimes(response, reference, rollout):
    return float("nan") if rollout.member == 0 else float(rollout.member)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Search paths are added for the life of a process; here one process plays many.
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Another file's module of this name may have been imported: its file would be taken for ours.
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "retrain.toml").write_text(BASE)
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in TASKS))
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/mine.py").write_text(REWARDS)
    return tmp_path


def edit(folder, old, new):
    text = (folder / "retrain.toml").read_text()
    assert old in text
    (folder / "retrain.toml").write_text(text.replace(old, new))


def refused(capsys, *arguments) -> str:
    """The one line that a mistake gives."""
    assert main([*arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert "Fix:" in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lora_rank = 4", "lora_rnk = 4", ["retrain.toml:4", "lora_rnk", "lora_rank"]),
        ("[training]", "[trainin]\nx = 1\n[training]", ["retrain.toml:", "trainin"]),
        ("seed = 3", 'seed = "3"', ["retrain.toml:11", "training.seed", "integer"]),
        ("group_size = 4", "group_size = 1", ["retrain.toml:14", "group_size", "2"]),
        ("temperature = 1.0", "temperature = -1.0", ["temperature"]),
        ("seed = 3", "seed = = 3", ["retrain.toml:11"]),
        ('type = "match"', 'type = "judge"', ["reward.type", "not in this version"]),
        ('devices = "cpu"', 'devices = "gpu:0,gpu:1"', ["backend.devices"]),
        ('model = "retrain/tiny"', 'model = "./nowhere"', ["nowhere"]),
        ('path = "tasks.jsonl"', 'path = "nothing.jsonl"', ["nothing.jsonl"]),
        ('type = "match"', 'type = "custom"\ncustom_module = "nowhere"', ["nowhere"]),
        ('type = "match"', 'type = "custom"\ncustom_module = "mine"\ncustom_function = "nope"', ["mine", "nope"]),
        ('log_dir = "run"', 'log_dir = "tasks.jsonl/run"', ["logging.log_dir", "cannot be written"]),
        ("max_tokens = 24", "max_tokens = 5000", ["training.max_tokens", "positions"]),
    ],
)
def test_a_mistake_in_the_toml_is_one_line_with_place_and_fix(folder, capsys, old, new, says):
    edit(folder, old, new)
    line = refused(capsys)
    assert all(word in line for word in says), line


def test_other_mistakes_are_one_line_too(folder, capsys):
    assert "missing.toml" in refused(capsys, "missing.toml")
    assert "--max-step " in refused(capsys, "--max-step", "3") + " "
    (folder / "tasks.jsonl").write_text('{"question": "1 + 1 = ?", "anwser": "2"}\n')
    line = refused(capsys)
    assert "tasks.jsonl:1" in line
    assert "answer" in line
    assert "anwser" in line
    (folder / "tasks.jsonl").write_text('{"question": \n')
    assert "tasks.jsonl:1" in refused(capsys)


def test_a_folder_with_a_run_is_never_touched_unasked(folder, capsys):
    assert main([]) == 0
    first = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    line = refused(capsys)
    assert all(word in line for word in ("--resume", "--fork", "--overwrite", "--log-dir"))
    # A mistake after --overwrite costs nothing either: nothing is removed before everything could be made.
    assert main(["--overwrite", "--model", "./nowhere"]) == 2
    capsys.readouterr()
    kept = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    del first[Path("run/events.log")], kept[Path("run/events.log")]
    assert kept == first
    assert main(["--fork"]) == 0
    assert Path("run-2/metrics.jsonl").exists()
    assert main(["--resume", "run", "--max-steps", "3"]) == 0
    rows = [json.loads(x) for x in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert "lora_rank" in refused(capsys, "--resume", "run", "--lora-rank", "8")
    assert "already completed 3" in refused(capsys, "--resume", "run", "--max-steps", "1")
    assert main(["--overwrite"]) == 0
    assert [json.loads(x)["step"] for x in Path("run/metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_nothing_of_the_users_is_ever_deleted(folder, capsys):
    Path("mine").mkdir()
    Path("mine/important.txt").write_text("precious")
    assert main(["--adapter-path", "mine"]) == 0
    assert Path("mine/important.txt").read_text() == "precious"
    assert Path("mine/adapter_model.safetensors").exists()
    capsys.readouterr()
    Path("full").mkdir()
    Path("full/config.toml").write_text("# mine")
    assert "config.toml" in refused(capsys, "--log-dir", "full")
    assert Path("full/config.toml").read_text() == "# mine"
    Path("afile").touch()
    assert "backend.adapter_path" in refused(capsys, "--log-dir", "new", "--adapter-path", "afile")
    assert "backend.adapter_path" in refused(capsys, "--log-dir", "new", "--adapter-path", "afile/deeper")


def test_two_processes_never_share_a_run_directory(folder, capsys):
    import fcntl

    Path("run").mkdir()
    with Path("run/.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in refused(capsys)
    assert main([]) == 0


def test_a_full_disk_is_one_error_and_a_bug_stays_a_bug(folder, monkeypatch, capsys):
    def full(config, parts, stop):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    def broken(config, parts, stop):
        raise ConnectionResetError("a bug in a client")

    monkeypatch.setattr("retrain.runner.train", full)
    assert main([]) == 1
    assert "metrics.jsonl cannot be written: No space left" in capsys.readouterr().err
    monkeypatch.setattr("retrain.runner.train", broken)
    with pytest.raises(ConnectionResetError):
        main(["--log-dir", "other"])


def test_what_changes_a_resume_is_refused_or_said(folder, capsys):
    edit(folder, 'type = "match"', 'type = "custom"\ncustom_module = "mine"\ncustom_function = "zero"')
    code = Path("plugins/mine.py")
    code.write_text(REWARDS + "\ndef zero(response, reference, info):\n    return float(len(response) % 2)\n")
    assert main([]) == 0
    capsys.readouterr()
    assert "strategic_grams" in refused(capsys, "--resume", "run", "--max-steps", "3", "--strategic-grams", "so")
    code.write_text(code.read_text() + "# another formula\n")
    assert main(["--resume", "run", "--max-steps", "3"]) == 0
    assert "byte-exact: no, because the reward's code was" in capsys.readouterr().out
    Path("run/metrics.jsonl").write_bytes(b"")
    assert "metrics.jsonl has fewer bytes" in refused(capsys, "--resume", "run", "--max-steps", "4")


def test_an_adapter_of_another_model_is_refused_on_resume(folder, capsys):
    assert main([]) == 0
    assert main(["--log-dir", "other", "--lora-rank", "8"]) == 0
    capsys.readouterr()
    newest = Path("run/checkpoints/step_000002")
    shutil.copy("other/checkpoints/step_000002/adapter/adapter_model.safetensors", newest / "adapter")
    manifest = json.loads((newest / "manifest.json").read_text())
    import hashlib

    name = "adapter/adapter_model.safetensors"
    data = (newest / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert "does not fit this model" in refused(capsys, "--resume", "run")


@pytest.mark.parametrize(
    ("function", "says"), [("raises", "no such luck"), ("gives_nan", "nan"), ("hangs", "timeout_s")]
)
def test_a_broken_reward_is_masked_counted_and_then_ends_the_run(folder, capsys, function, says):
    edit(folder, 'type = "match"', f'type = "custom"\ncustom_module = "mine"\ncustom_function = "{function}"\ntimeout_s = 0.5')
    assert main([]) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert "of 8 rewards of this step failed" in captured.err
    assert "retrain/" not in captured.err.split("The first one:")[0]
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"
    assert Path("run/checkpoints/step_000000").is_dir()
    # Nothing was done yet, so the next try does not have to ask for the folder.
    assert main(["--reward-custom-function", "fine"]) == 0


def test_a_share_of_failed_rewards_below_the_limit_is_masked(folder):
    edit(folder, 'type = "match"', 'type = "custom"\ncustom_module = "mine"\ncustom_function = "sometimes"\nmax_error_rate = 0.3')
    edit(folder, "seed = 3", "seed = 3\nlr = 1e-3")
    assert main(["--reward-correct-at", "1.5"]) == 0
    rows = [json.loads(x) for x in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(r["reward_error_rate"] == 0.25 for r in rows)
    assert all(r["num_datums"] == 6 for r in rows)
    assert all(r["mean_reward"] == 2.0 for r in rows)


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "retrain", "--max-steps", "500"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not Path("run/metrics.jsonl").exists():
        time.sleep(0.05)
    while time.monotonic() < deadline and len(Path("run/metrics.jsonl").read_text().splitlines()) < 2:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 130, output
    assert "retrain --resume run" in output
    done = json.loads(Path("run/trainer_state.json").read_text())["step"]
    rows = [json.loads(x)["step"] for x in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(done))
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"
    assert main(["--resume", "run", "--max-steps", str(done + 1)]) == 0
    rows = [json.loads(x)["step"] for x in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(done + 1))


def test_no_secret_reaches_a_run_directory(folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    (folder / ".env").write_text("WANDB_API_KEY=secret-of-the-dotenv\n")
    assert main([]) == 0
    said = capsys.readouterr()
    assert "secret-of" not in said.out + said.err
    for path in Path("run").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"hf_secret_of" not in data
            assert b"secret-of-the" not in data
    edit(folder, "[reward]", 'api_key = "sk-0123456789abcdef0123456789abcdef"\n[reward]')
    line = refused(capsys)
    assert "sk-0123" not in line


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes as POSIX does")
def test_files_that_cannot_grow_end_a_run_in_one_line_that_promises_no_checkpoint(folder):
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 40; exec "$0" -m retrain --max-steps 400 --save-every 0', sys.executable],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "no checkpoint was written yet" in done.stderr.splitlines()[-1]
