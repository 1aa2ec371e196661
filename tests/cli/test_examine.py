"""``trace``, ``doctor``, ``backends`` and ``plugins``: what they print, as text and as JSON, with real parts.

After a deliberate change: ``UPDATE_GOLDEN=1 pytest tests/cli/test_examine.py``, and review the diff.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retrain import cards, machine, plugins, preflight
from retrain.backends.local import LocalBackend
from retrain.cli import inventory
from retrain.cli.main import main
from retrain.machine import Check

GOLDEN = Path(__file__).with_name("examine")
MACHINE = ("software", "packages", "devices", "storage")
RUN = """
[model]
model = "retrain/tiny"
lora_rank = 8
[backend]
devices = "cpu"
[algorithm]
advantage_mode = "grpo"
transform_mode = "gtpo_hicra"
[training]
seed = 5
max_steps = 3
batch_size = 2
group_size = 4
max_tokens = 40
temperature = 1.0
[data]
source = "arithmetic"
[reward]
type = "match"
[eval]
source = "arithmetic"
split = "validation"
examples = 8
[logging]
log_dir = "logs/here"
"""
OWN = '''
"""Pieces of my own."""


def score(response, reference):
    """Right when the reference stands anywhere. It is not strict."""
    return float(reference in response)


def early(group, advantages_G_T, context):
    """Keeps what it is given."""
    return advantages_G_T


def ranks(rewards_G, *, scale=1.0):
    """Centred."""
    return rewards_G - rewards_G.mean()


def make_words():
    return lambda text, offsets: [False] * len(offsets)


class Plain:
    """Takes nothing."""


def _hidden(rewards_G): ...
'''


ask_torch = machine.ask_torch


@pytest.fixture(scope="session")
def asked() -> dict[str, Any]:
    """What torch says of this machine, asked once."""
    return ask_torch()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> Path:
    """A folder with a configuration ``run.toml``, where every test stands."""
    monkeypatch.setattr(machine, "ask_torch", lambda: asked)
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_search_paths", [])
    for name in ("CUDA_VISIBLE_DEVICES", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command and gives what it printed."""

    def run(*words: str, code: int = 0) -> str:
        assert main(list(words)) == code, capsys.readouterr()
        return capsys.readouterr().out

    return run


def same(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def pretty(text: str) -> str:
    return json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"


# trace


def test_trace_of_a_configuration_as_text(said: Callable[..., str]) -> None:
    same("trace.txt", said("trace", "run.toml"))


def test_trace_of_a_configuration_as_json(said: Callable[..., str]) -> None:
    found = json.loads(said("trace", "run.toml", "--json"))
    assert [len(m["tokens"]) for m in found["members"]][-1] == 40
    for member in found["members"]:
        member["tokens"] = member["tokens"][:3]
    same("trace.json", json.dumps(found, indent=1) + "\n")


def test_trace_shows_what_the_run_would_compute(said: Callable[..., str]) -> None:
    found = json.loads(said("trace", "run.toml", "--json"))
    by_name = {m["name"]: m for m in found["members"]}
    assert [m["reward"] for m in found["members"]] == [1, 1, 0, 0, 0]
    assert [m["advantage"] for m in found["members"]] == pytest.approx([0.6, 0.6, -0.4, -0.4, -0.4])
    assert by_name["cut at the limit"]["stop"] == "length"
    assert by_name["reference"]["tokens"][-1]["text"] == "<|im_end|>"
    thought = by_name["reference, after a thought"]["tokens"]
    planning = "".join(t["text"] for t in thought if t["planning"])
    assert planning == "Wait, let me check"
    # gtpo changes A around the episode's, hicra adds alpha |A| on planning tokens.
    assert len({t["advantage"] for t in thought}) > 5
    assert found["batch"]["rows"] == 5
    assert (
        found["batch"]["denominator"]
        == found["batch"]["num_tokens"]
        == sum(len(m["tokens"]) for m in found["members"])
    )
    assert found["batch"]["fixed_tokens"] == 2 * 4 * 40
    assert found["prompt"]["text"].endswith("<|im_start|>assistant\n")
    again = json.loads(said("trace", "run.toml", "--json"))
    assert again == found


def test_trace_follows_the_settings(said: Callable[..., str]) -> None:
    masked = json.loads(said("trace", "run.toml", "--truncated", "mask", "--json"))
    assert {t["advantage"] for t in masked["members"][-1]["tokens"]} == {0}
    assert masked["members"][-1]["advantage"] == pytest.approx(-0.4)
    fixed = json.loads(said("trace", "run.toml", "--loss.agg", "fixed", "--json"))
    assert fixed["batch"]["denominator"] == 320
    plain = json.loads(said("trace", "run.toml", "--transform-mode", "none", "--json"))
    assert {t["advantage"] for t in plain["members"][0]["tokens"]} == {plain["members"][0]["advantage"]}
    sepa = (
        "trace",
        "run.toml",
        "--transform-mode",
        "gtpo_sepa",
        "--sepa.steps",
        "4",
        "--sepa.delay_steps",
        "0",
        "--json",
    )
    assert json.loads(said(*sepa))["algorithm"]["sepa_lambda"] == 0.5
    assert json.loads(said(*sepa, "--step", "1"))["algorithm"]["sepa_lambda"] == 0.25
    entropies = json.loads(said("trace", "run.toml", "--uncertainty-kind", "shannon_entropy", "--json"))
    surprisals = [t["uncertainty"] for t in masked["members"][1]["tokens"]]
    assert [t["uncertainty"] for t in entropies["members"][1]["tokens"]] != surprisals
    assert surprisals == pytest.approx([-t["logprob"] for t in masked["members"][1]["tokens"]])


def test_trace_finds_a_task_by_number_and_by_id(
    said: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    third = json.loads(said("trace", "run.toml", "--task", "3", "--json"))["task"]
    assert json.loads(said("trace", "run.toml", "--task", third["id"], "--json"))["task"] == third
    for wrong in ("99999", third["id"] + "x"):
        assert main(["trace", "run.toml", "--task", wrong]) == 2
        assert "Fix:" in capsys.readouterr().err


def test_trace_names_what_is_wrong(said: Callable[..., str], place: Path) -> None:
    rows = [{"question": "Which animal?", "answer": "a {cat"}, {"question": "Which number?", "answer": ""}]
    (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = ("trace", "run.toml", "--data-source", "jsonl", "--data-path", "rows.jsonl")
    refused = said(*own, "--task", "0")
    assert "does not accept the task's own reference" in refused
    assert "would not train: all wrong" in refused
    assert "skipped (all wrong)" in refused
    (place / "plugins").mkdir()
    (place / "plugins" / "mine.py").write_text(
        OWN + "\n\ndef broken(response, reference):\n    return 1 / 0\n"
    )
    mine = ("--reward-type", "custom", "--custom-module", "mine", "--custom-function")
    broken = said(*own, "--task", "0", *mine, "broken")
    assert "The reward failed on the task's own reference (ZeroDivisionError" in broken
    assert "does not accept" not in broken
    more = (
        "from retrain.types import Message, Task\n\n\ndef tasks(data, split):\n"
        "    return [Task('t/0', (Message('user', 'a number?'),), '', 't', 0)]\n"
    )
    (place / "plugins" / "source.py").write_text(more)
    without = said("trace", "run.toml", "--data-source", "source.tasks", *mine, "score")
    assert "The task has no reference." in without
    assert "42, for want of a reference" in without


def test_trace_refuses_what_a_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "run.toml", "--max-tokens", "600"]) == 2
    said = capsys.readouterr().err
    assert "512" in said
    assert main(["run.toml", "--max-tokens", "600", "--plain"]) == 2
    assert said.strip() in capsys.readouterr().err
    assert main(["trace", "run.toml", "--step", "3"]) == 2
    assert "--step 3: the run has 3 steps, counted from 0." in capsys.readouterr().err
    assert main(["trace", "run.toml", "--step", "2"]) == 0


def test_trace_tells_an_answer_that_is_cut_from_one_that_is_refused(said: Callable[..., str]) -> None:
    notes = json.loads(said("trace", "run.toml", "--max-tokens", "1", "--json"))["notes"]
    assert '"reference" needs more than training.max_tokens = 1 tokens and was cut.' in notes
    assert not any("does not accept" in note for note in notes)


def test_a_run_can_follow_a_look_in_one_process(place: Path) -> None:
    code = (
        "import sys; from retrain import machine; from retrain.cli.main import main\n"
        "machine.ask_torch = lambda: {'version': '2', 'devices': [], 'error': ''}\n"
        "looked = main(['doctor', 'run.toml']), main(['trace', 'run.toml'])\n"
        "assert not [m for m in sys.modules if m.startswith(('torch', 'transformers'))]\n"
        "sys.exit(any(looked) or main(['run.toml', '--max-steps', '1', '--plain']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "logs" / "here" / "run.json").read_text())["status"] == "done"


def test_trace_and_the_lists_never_import_torch(place: Path) -> None:
    code = "import sys; from retrain.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for words in (["trace", "run.toml"], ["backends"], ["plugins"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=place, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "False", words
        assert done.stderr == ""


# doctor


def anywhere(text: str) -> str:
    """The text with what differs between machines left out."""
    lines: list[str] = []
    area = ""
    for line in text.splitlines():
        area = line if line and not line.startswith(" ") else area
        if area in MACHINE and line.startswith(" "):
            name = line[11:28].strip()
            if (
                area == "packages"
                or not name
                or name.startswith("gpu:")
                or name in ("CUDA", "disk of models")
            ):
                continue
            line = f"  <status> {name:<16} <{name}>"
        lines.append(line)
    lines[-1] = re.sub(r"\d+", "<n>", lines[-1])
    return "\n".join(lines) + "\n"


def run_area(text: str) -> list[dict[str, Any]]:
    return [check for check in json.loads(text)["checks"] if check["area"] == "run"]


def test_doctor_without_a_configuration(said: Callable[..., str]) -> None:
    text = said("doctor")
    same("doctor.txt", anywhere(text))
    found = json.loads(said("doctor", "--json"))
    what = {check["name"]: check["what"] for check in found["checks"]}
    assert found["config"] is None
    assert found["ok"]
    assert what["torch"].startswith(f"{torch.__version__}, built for ")
    assert sys.version.split()[0] in what["Python"]
    assert what["file locks"] == "work in the file system of runs"
    assert f"{len(os.sched_getaffinity(0))}" in what["processors"] or "usable" in what["processors"]
    assert [c["name"] for c in found["checks"] if c["area"] == "storage"][-1] == "variables"


def test_doctor_of_a_configuration(said: Callable[..., str]) -> None:
    text = said("doctor", "run.toml")
    same("doctor_config.txt", anywhere(text))
    checks = run_area(said("doctor", "run.toml", "--json"))
    same("doctor_config.json", json.dumps(checks, indent=1) + "\n")
    assert not Path("logs").exists()


def test_doctor_never_shows_a_value(said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = said("doctor", "--json")
    assert "HF_TOKEN" in text
    assert "hf_secret" not in text


def test_doctor_scores_every_reference(
    said: Callable[..., str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(30)] + [
        {"question": "x?", "answer": "a {cat"}
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = (
        "doctor",
        "run.toml",
        "--data-source",
        "jsonl",
        "--data-path",
        "rows.jsonl",
        "--eval-examples",
        "8",
    )
    assert main([*own, "--tasks"]) == 0
    out, err = capsys.readouterr()
    assert "The reward accepts 30 of 31 references." in out
    assert "with 'a {cat' (reward 0)" in out
    assert "31 of 31 tasks" in err
    assert "30 of" not in said(*own)
    (place / "rows.jsonl").write_text(
        "".join(json.dumps({"question": "x?", "answer": "a {cat"}) + "\n" for _ in range(4))
    )
    assert "problem  references" in said(*own, "--tasks", code=1)


def test_doctor_names_every_problem_at_once(said: Callable[..., str], place: Path) -> None:
    (place / "logs" / "here").mkdir(parents=True)
    (place / "logs" / "here" / "run.json").write_text("{}")
    (place / "plugins").mkdir()
    (place / "plugins" / "mine.py").write_text(OWN)
    words = (
        "doctor", "run.toml", "--json", "--model", "nobody/nothing", "--transform-mode", "mine.eary", "--data-source", "jsonl",
        "--data-path", "none.jsonl", "--reward-type", "custom", "--custom-module", "mine", "--custom-function", "scor",
    )  # fmt: skip
    checks = run_area(said(*words, code=1))
    problems = {c["name"]: c for c in checks if c["status"] == "problem"}
    assert set(problems) == {
        "run directory", "plug-ins", "base model", "tokenizer", "training tasks", "algorithm", "reward",
    }  # fmt: skip
    assert all(c["fix"] for c in problems.values())
    assert "did you mean 'early'?" in problems["plug-ins"]["fix"]


def problems_of(text: str) -> dict[str, str]:
    return {c["name"]: c["what"] for c in run_area(text) if c["status"] == "problem"}


def test_doctor_of_a_model_that_cannot_fit(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cards, "_host_bytes", lambda: 2**20)
    monkeypatch.setattr(cards, "_swap_bytes", lambda: 0)
    found = problems_of(said("doctor", "run.toml", "--json", code=1))
    assert list(found) == ["memory"]
    assert main(["run.toml", "--plain"]) == 2
    assert found["memory"] in capsys.readouterr().err


def test_doctor_goes_on_where_a_reward_returns_the_wrong_thing(said: Callable[..., str], place: Path) -> None:
    (place / "plugins").mkdir()
    (place / "plugins" / "judges.py").write_text(
        "class Wrong:\n    def __init__(self, config, renderer): ...\n\n"
        "    async def score(self, task, rollouts_G):\n        return {}\n"
    )
    found = problems_of(said("doctor", "run.toml", "--json", "--reward-type", "judges.Wrong", code=1))
    assert list(found) == ["references"]
    assert "reward 'judges.Wrong' returned a dict" in found["references"]


def test_doctor_goes_on_where_a_check_itself_breaks(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise LookupError("no template\nfor this role")

    monkeypatch.setattr(preflight, "check_lengths", breaks)
    assert problems_of(said("doctor", "run.toml", "--json", code=1)) == {
        "prompts": "LookupError: no template"
    }


PIECES = """
import numpy as np


def short(rewards_G):
    return rewards_G[:1]


def words(group, advantages_G_T, context):
    return "abc"


def zeros(rollout):
    return np.zeros(len(rollout.token_ids_T), dtype=np.float32)


def marks(config):
    return lambda text, offsets: [True]


def broken(group, context):
    return 1 / 0


def by_parts(group, context):
    return [score.parts["format"] for score in group.scores_G]


class Sink:
    def __init__(self, config, run_dir):
        raise RuntimeError("no account")

    def log(self, step, metrics): ...

    def close(self): ...
"""


@pytest.mark.parametrize(
    ("setting", "piece", "why"),
    [
        ("algorithm.advantage_mode", "short", "returned shape (1,)"),
        ("algorithm.transform_mode", "words", "returned 3 arrays for a group of 4"),
        ("algorithm.uncertainty_kind", "zeros", "must be NaN where no token was sampled"),
        ("planning.detector", "marks", "returned shape (1,)"),
        ("algorithm.algorithm_mode", "broken", "ZeroDivisionError"),
        ("algorithm.algorithm_mode", "by_parts", ""),
    ],
)
def test_doctor_tries_own_credit(
    said: Callable[..., str], place: Path, setting: str, piece: str, why: str
) -> None:
    (place / "plugins").mkdir()
    (place / "plugins" / "pieces.py").write_text(PIECES)
    words = ("doctor", "run.toml", "--json", f"--{setting}", f"pieces.{piece}")
    if not why:
        (line,) = [c["what"] for c in run_area(said(*words)) if "KeyError" in c["what"]]
        assert "without the reward's parts" in line
        return
    found = problems_of(said(*words, code=1))
    assert list(found) == ["algorithm"]
    assert why in found["algorithm"]


def test_doctor_says_what_it_has_not_tried(said: Callable[..., str], place: Path) -> None:
    (place / "plugins").mkdir()
    (place / "plugins" / "pieces.py").write_text(PIECES)
    checks = run_area(said("doctor", "run.toml", "--json", "--logging.trackers", '["pieces.Sink"]'))
    assert [c["what"] for c in checks if c["name"] == "plug-ins"] == ["sink pieces.Sink (not tried)"]


def test_doctor_of_a_directory_that_cannot_be_made(
    said: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, name in (("--log-dir", "run directory"), ("--adapter-path", "run directory")):
        for path in ("/proc/nothing/here", "run.toml/here"):
            found = problems_of(said("doctor", "run.toml", "--json", flag, path, code=1))
            assert list(found) == [name]
            assert main(["run.toml", "--plain", flag, path]) == 2
            assert found[name].split(" cannot")[1] in capsys.readouterr().err


def test_doctor_asks_wandb_itself(
    said: Callable[..., str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(place / name))
    words = ("doctor", "run.toml", "--json", "--wandb-project", "p")
    found = problems_of(said(*words, code=1))
    assert found == {"trackers": "tracker 'wandb' would not start: it is not logged in."}
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert problems_of(said(*words)) == {}
    monkeypatch.setattr(machine, "ask_wandb", lambda: None)
    assert "wandb gives no answer" in said(*words)


def test_doctor_of_a_device_that_is_not_here(said: Callable[..., str]) -> None:
    device = next(
        c for c in run_area(said("doctor", "run.toml", "--devices", "gpu:7", "--json", code=_no_gpu(1)))
    )
    assert device["name"] == "device"
    assert device["status"] == ("problem" if torch.cuda.is_available() else "warning")


def _no_gpu(code: int) -> int:
    return code if torch.cuda.is_available() else 0


def test_doctor_refuses_what_is_no_configuration(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "wrong.toml").write_text(RUN.replace("seed = 5", "sead = 5"))
    assert main(["doctor", "wrong.toml"]) == 2
    assert "did you mean training.seed?" in capsys.readouterr().err
    for words in (
        ["doctor", "--tasks"],
        ["doctor", "--lr", "1"],
        ["doctor", "nothing"],
        ["doctor", "run.toml", "--fork"],
    ):
        assert main(words) == 2, words
        assert "Fix:" in capsys.readouterr().err


# The machine.


def test_a_torch_that_dies_is_a_problem_and_not_the_end(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    fake = place / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(place / "fake"))
    (first, *_) = machine._devices(ask_torch())
    assert (first.name, first.status) == ("torch", "problem")
    assert "signal 11" in first.what
    (fake / "__init__.py").write_text("import time\ntime.sleep(60)\n")
    assert "no answer within 0.5 seconds" in ask_torch(0.5)["error"]
    (fake / "__init__.py").write_text("raise ImportError('libcudart is missing')\n")
    assert "libcudart is missing" in ask_torch()["error"]


def test_devices_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {
        "index": 0,
        "name": "Card",
        "free": 70 * 2**30,
        "total": 80 * 2**30,
        "works": True,
        "capability": "9.0",
        "bf16": True,
    }
    cards = [
        card,
        {**card, "index": 1, "free": 2**30},
        {**card, "index": 2, "bf16": False},
        {**card, "index": 3, "works": False},
    ]
    found = list(machine._devices({"version": "2.9", "cuda": "12.8", "devices": cards, "error": ""}))
    assert [(c.name, c.status) for c in found] == [
        ("torch", "ok"), ("gpu:0", "ok"), ("gpu:1", "warning"), ("gpu:2", "warning"), ("gpu:3", "problem"),
    ]  # fmt: skip
    assert found[1].what == "Card, 70.0 of 80.0 GiB free, compute capability 9.0, bf16 yes"
    assert all(bool(c.fix) == (c.status != "ok") for c in found)
    old = list(
        machine._devices({"version": "2.9", "cuda": "12.8", "devices": [], "error": "the driver is too old"})
    )
    assert (old[1].status, old[1].what) == ("problem", "cannot be used: the driver is too old")
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert (
        list(machine._devices({"version": "2.9", "cuda": None, "devices": [], "error": ""}))[1].status
        == "warning"
    )


def test_packages_are_held_against_their_tested_ranges() -> None:
    assert machine._extra("local", [("numpy", ">=1.0")]).status == "ok"
    old = machine._extra("local", [("numpy", ">=999")])
    assert old.status == "warning"
    assert "is outside >=999" in old.what
    assert old.fix == 'pip install "retrain[local]" installs a tested version.'
    assert machine._extra("local", [("no-such-package-here", ">=1")]).status == "problem"
    assert machine._extra("wandb", [("no-such-package-here", ">=1")]) == Check(
        "packages", "wandb", "ok", 'not installed; for tracker wandb: pip install "retrain[wandb]"'
    )
    ranges = machine.requirements()
    assert dict(ranges["local"])["transformers"] == ">=5.0,<6"
    assert {"numpy", "pydantic"} <= {name for name, _ in ranges[""]}


def test_a_disk_without_room_and_a_lock_that_does_not_hold(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    for free, status in ((2**20, "problem"), (2**30, "warning"), (2**40, "ok")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert machine._disk("disk", place, "for x").status == status
    assert machine._locks(place).status == "ok"
    monkeypatch.setattr(machine, "_LOCK", "print('free')")
    assert machine._locks(place).status == "warning"


# backends and plugins


def test_backends_as_text_and_json(said: Callable[..., str]) -> None:
    text = said("backends")
    text = re.sub(r"packages: .*", "packages: <packages>", text)
    same("backends.txt", re.sub(r"\n +install: .*", "", text))
    found = json.loads(said("backends", "--json"))
    for row in found["backends"]:
        row["packages"] = sorted(set(row["packages"]) & {"torch", "transformers"})
    same("backends.json", json.dumps(found, indent=1) + "\n")


def test_capabilities_are_those_of_the_object() -> None:
    stated = next(b for b in inventory.backends()["backends"] if b["name"] == "local")["capabilities"]
    real = LocalBackend.capabilities.fget(object.__new__(LocalBackend))  # pyright: ignore
    assert stated == {name: getattr(real, name) for name in real.__dataclass_fields__}


def test_missing_packages_have_an_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_requirements", lambda: ["no-such-package-here>=1; extra == 'local'"])
    row = next(b for b in inventory.backends()["backends"] if b["name"] == "local")
    assert not row["installed"]
    assert row["install"] == 'pip install "retrain[local]"'
    assert "no-such-package-here missing" in inventory.backends_text(inventory.backends())


def test_plugins_as_text_and_json(said: Callable[..., str], place: Path) -> None:
    (place / "plugins").mkdir()
    (place / "plugins" / "mine.py").write_text(OWN)
    (place / "plugins" / "torn.py").write_text("def broken(:\n")
    text = said("plugins").replace(str(place), "<place>")
    same("plugins.txt", re.sub(r" \(first: .*\)", "", text))
    found = json.loads(said("plugins", "transform", "--json").replace(str(place), "<place>"))
    same("plugins_transform.json", json.dumps(found, indent=1) + "\n")


def test_every_name_of_the_table_is_described(said: Callable[..., str]) -> None:
    found = {k["kind"]: k for k in json.loads(said("plugins", "--json"))["kinds"]}
    assert set(found) == set(plugins.TABLE)
    for kind, table in plugins.TABLE.items():
        hidden = inventory.INTERNAL.get(kind, ())
        described = {n["name"]: n["what"] for n in found[kind]["built_in"]}
        assert list(described) == [name for name in table if name not in hidden]
        assert all(described.values()), described
    assert set(inventory.KINDS) >= set(plugins.TABLE)


def test_plugins_of_installed_packages_are_listed(
    place: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[..., str]
) -> None:
    site = place / "site"
    (site / "theirs-1.2.dist-info").mkdir(parents=True)
    (site / "theirs-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n"
    )
    (site / "theirs-1.2.dist-info" / "entry_points.txt").write_text(
        "[retrain.advantage]\nflat = theirs.pieces:flat\ngrpo = theirs.pieces:flat\n"
        "[retrain.engine]\nmine = theirs.pieces:flat\n"
    )
    (site / "others-3.dist-info").mkdir()
    (site / "others-3.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 3\n")
    (site / "others-3.dist-info" / "entry_points.txt").write_text("[retrain.engine]\nmine = others:engine\n")
    (site / "theirs").mkdir()
    (site / "theirs" / "__init__.py").write_text("raise SystemExit('nobody may import this')\n")
    (site / "theirs" / "pieces.py").write_text(
        'def flat(rewards_G):\n    """Always the same."""\n    return 0 * rewards_G\n'
    )
    monkeypatch.syspath_prepend(str(site))
    text = said("plugins", "advantage")
    assert "flat          Always the same (from theirs 1.2)" in text
    assert "grpo          Always the same (from theirs 1.2; never used: the name is a built-in one's)" in text
    text = said("plugins", "engine")
    assert "mine     Always the same (from theirs 1.2; ambiguous: others 3 adds this name too)" in text
    assert "mine     others:engine (from others 3; ambiguous: theirs 1.2 adds this name too)" in text
    assert "Always the same (ambiguous: others 3 adds this name too)" in said("backends")


def test_plugins_of_another_folder_and_of_a_broken_configuration(
    said: Callable[..., str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "parts").mkdir()
    (place / "parts" / "mine.py").write_text(OWN)
    (place / "other.toml").write_text(RUN + '[plugins]\nsearch_paths = ["parts"]\n')
    assert "mine.early" in said("plugins", "transform", "--config", "other.toml")
    (place / "retrain.toml").write_text("[no\n")
    assert "gtpo_sepa" in said("plugins", "transform")
    assert main(["plugins", "--config", "retrain.toml"]) == 2
    assert main(["plugins", "transfrom"]) == 2
    assert "did you mean transform?" in capsys.readouterr().err
