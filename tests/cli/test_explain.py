"""``retrain explain``: its text and JSON word for word, what it refuses, what it costs to start, and its probe."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retrain import cards
from retrain.cli.main import main

GOLDEN = Path(__file__).parent / "golden"
CAMPAIGN = """\
[campaign]
seeds = [1, 2, 3]
max_steps = 50

[[campaign.conditions]]
advantage_mode = "grpo"

[[campaign.conditions]]
advantage_mode = "maxrl"
"""
RUN = """\
[model]
model = "qwen3-4b"
lora_rank = 32

[data]
source = "jsonl"
path = "tasks.jsonl"

[reward]
type = "match"

[algorithm]
advantage_mode = "grpo"
transform_mode = "gtpo_sepa"

[training]
seed = 1
max_steps = 100
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own, and a machine whose figures do not change."""
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cards, "_cuda", lambda index: None)
    monkeypatch.setattr(cards, "_cpu_flops", lambda: 100e9)
    monkeypatch.setattr(cards, "_host_bytes", lambda: 16 * 2**30)
    monkeypatch.setattr(cards, "_swap_bytes", lambda: 0)
    shutil.copytree(GOLDEN / "qwen3-4b", tmp_path / "qwen3-4b")
    (tmp_path / "retrain.toml").write_text(RUN)
    rows = [{"question": f"What is {i}/2?", "answer": f"{i}/2" if i % 2 else str(i // 2)} for i in range(10)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def golden(name, text):
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def explained(capsys, *arguments):
    code = main(["explain", *arguments])
    got = capsys.readouterr()
    assert got.err == ""
    assert code == 0
    return got.out


def record(capsys, *arguments):
    return json.loads(explained(capsys, *arguments, "--json"))


CASES = {
    "tiny": ("--template", "tiny"),
    "qwen3-4b": ("--gpu", "RTX 4090", "--max-tokens", "1024", "--batch-size", "4"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_this(capsys, name):
    out = explained(capsys, *CASES[name])
    assert max(map(len, out.splitlines())) <= 100
    golden(f"explain-{name}.txt", out)


@pytest.mark.parametrize("name", CASES)
def test_the_json_is_this(capsys, name):
    golden(f"explain-{name}.json", json.dumps(record(capsys, *CASES[name]), indent=1) + "\n")


def test_the_numbers_that_must_be_exact(capsys):
    found = record(capsys, *CASES["qwen3-4b"])
    assert found["trainable_parameters"] == 66_060_288
    assert found["model"]["parameters"] == 4_022_468_096
    assert found["step"]["rollouts"] == 4 * 16
    assert found["references"] == {"read": True, "tasks": 10, "whole_numbers": 5, "note": ""}
    assert found["generation_config_not_used"] == {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }
    assert found["sepa"]["middle"] == 0.0
    assert found["sepa"]["last"] == pytest.approx((99 - 50) / 500)
    origins = {s["key"]: s["origin"] for s in found["settings"]}
    assert origins["model.lora_rank"] == "retrain.toml:3"
    assert origins["training.batch_size"] == "--batch-size"
    assert "lora.alpha" not in origins
    everything = record(capsys, *CASES["qwen3-4b"], "--all")
    assert {s["key"]: s["origin"] for s in everything["settings"]}["lora.alpha"] == "default"


def test_what_cannot_fit_is_refused_with_what_would(capsys, here):
    wide = json.loads((here / "qwen3-4b" / "config.json").read_text()) | {
        "hidden_size": 8192,
        "intermediate_size": 24576,
    }
    (here / "qwen3-4b" / "config.json").write_text(json.dumps(wide))
    assert main(["explain", "--gpu", "4090"]) == 2
    got = capsys.readouterr()
    assert "cannot fit on RTX 4090 with 23.6 GiB" in got.err
    assert 'model.quantization = "nf4"' in got.err
    assert "no: weights, adapter and optimizer alone need" in got.out
    assert main(["explain", "--gpu", "4090", "--json"]) == 2
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert fits["verdict"] == "cannot"
    # Each piece of advice is true: the setting, and the smallest card that is named.
    assert main(["explain", "--gpu", "4090", "--quantization", "nf4"]) == 0
    named = fits["fix"].split("a larger card (")[1].split(",")[0]
    assert main(["explain", "--gpu", named]) == 0


def test_a_run_longer_than_the_card_is_a_warning_only(capsys):
    found = record(capsys, "--gpu", "4090", "--max-tokens", "32768")
    assert found["fits"]["verdict"] in ("perhaps", "not at its longest")
    assert any("lower training.max_tokens" in line for line in found["advice"])


def test_a_campaign_is_counted(capsys, here):
    with (here / "retrain.toml").open("a") as file:
        file.write("\n" + CAMPAIGN)
    found = record(capsys, "--gpu", "H100")
    assert (found["campaign"]["runs"], found["campaign"]["steps"]) == (6, 50)
    one = found["time"]["step"]["low"] * 50
    assert found["campaign"]["one_after_the_other"]["low"] == pytest.approx(6 * one, rel=0.02)
    assert any("[campaign] does not run" in line for line in found["announcements"])
    assert {s["key"]: s["origin"] for s in found["settings"]}["training.seed"] == "retrain.toml:17"


def test_an_unknown_model_is_said_to_be_unknown(capsys):
    found = record(capsys, "--model", "nobody/knows-this")
    assert found["memory"] is None
    assert found["trainable_parameters"] is None
    assert any("nobody/knows-this" in line for line in found["unknown"])


def test_what_stands_in_the_run_directory(capsys, here):
    place = here / "logs" / "train"
    place.mkdir(parents=True)
    (place / "run.json").write_text(json.dumps({"status": "done", "step": 7, "max_steps": 9}))
    found = record(capsys, "--gpu", "H100")["run_directory"]
    assert found["how"] == "refused"
    assert "--fork" in found["note"]
    assert found["holds"] == {"state": "done", "step": 7, "max_steps": 9}
    assert record(capsys, "--gpu", "H100", "--fork")["run_directory"]["path"] == "logs/train-2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "Voodoo 2"], "not in the table of cards"),
        (["--gpu", "h100", "--probe", "2"], "give one of them"),
        (["--probe", "no"], "not a whole number"),
        (["--template", "none"], "--template none"),
        (["nowhere.toml"], "nowhere.toml"),
    ],
)
def test_wrong_usage_names_the_place(capsys, words, said):
    assert main(["explain", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_probe_samples_with_the_real_model(capsys, here):
    words = ("--template", "tiny", "--batch-size", "2", "--group-size", "4")
    before = record(capsys, *words)
    after = record(capsys, *words, "--probe", "6")
    probe = after["probe"]
    assert (probe["tasks"], probe["rollouts"]) == (6, 24)
    assert 0 <= probe["silent"]["low"] <= probe["silent"]["value"] <= probe["silent"]["high"] <= 1
    assert 10 < probe["length"]["value"] < 80
    assert probe["length"]["low"] < probe["length"]["value"] < probe["length"]["high"]
    wide, narrow = before["time"]["phases"]["learn"], after["time"]["phases"]["learn"]
    assert narrow["high"] / narrow["low"] < wide["high"] / wide["low"]
    assert not (here / "logs").exists()


MAIN = "import sys; from retrain.cli.main import main; main(sys.argv[1:])"


def test_no_torch_is_imported():
    check = "; print('HEAVY', [m for m in ('torch', 'transformers', 'peft', 'rich') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", MAIN + check, "explain", "--gpu", "H100"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert done.stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="measures with getrusage")
def test_starting_costs_little(tmp_path):
    # As installed: with compiled modules.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"), "OMP_NUM_THREADS": "1"}

    def cost(*arguments):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    command = ("-m", "retrain", "explain")
    cost(*command)
    rounds = [(cost("-c", "pass"), cost(*command), cost(*command, "--gpu", "H100")) for _ in range(7)]
    bare, here, card = (min(r[i] for r in rounds) for i in range(3))
    assert here <= 30 * bare, f"{here * 1000:.0f} ms, bare python {bare * 1000:.0f} ms"
    assert card <= 30 * bare, f"{card * 1000:.0f} ms, bare python {bare * 1000:.0f} ms"
