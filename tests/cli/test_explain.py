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
from retrain.types import Message

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
    assert (found["time"]["evaluations"], found["step"]["steps"]) == (0, 50)
    # Every run also loads the model first.
    assert found["campaign"]["one_after_the_other"]["low"] == pytest.approx(6 * (one + 2 + 8e9 / 5e9), rel=0.02)
    assert found["run_directory"]["path"] == "logs/campaign_<time>"
    assert any("6 runs of 50 steps" in line for line in found["campaign"]["lines"])
    assert {s["key"]: s["origin"] for s in found["settings"]}["training.seed"] == "retrain.toml:17"


def test_flags_and_evaluations_of_a_campaign_are_the_campaigns(capsys, here):
    with (here / "retrain.toml").open("a") as file:
        file.write("\n[eval]\nsource = 'arithmetic'\nevery = 5\n" + CAMPAIGN)
    found = record(capsys, "--gpu", "H100", "--max-steps", "7", "--campaign.seeds", "[1, 2]")
    assert (found["campaign"]["steps"], found["campaign"]["runs"]) == (7, 4)
    assert found["time"]["evaluations"] == 3  # before the first step, after 5 and after 7
    origins = {s["key"]: (s["value"], s["origin"]) for s in found["settings"]}
    assert origins["campaign.max_steps"] == (7, "--max-steps")
    assert origins["training.max_steps"] == (7, "campaign.max_steps")


def test_answers_longer_than_the_models_positions_are_refused(capsys, here):
    assert main(["explain", "--template", "tiny", "--max-tokens", "5000"]) == 2
    got = capsys.readouterr()
    assert "retrain/tiny has 512 positions" in got.err
    assert "fits                  no" in got.out
    assert main(["explain", "--template", "tiny", "--max-tokens", "512", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["fits"]["verdict"] == "too long"
    explained(capsys, "--template", "tiny", "--max-tokens", "511")


def test_the_longest_real_prompt_is_measured_where_the_data_is_asked_for(capsys, here):
    words = ("--model", "retrain/tiny", "--devices", "cpu", "--max-tokens", "80")
    before = record(capsys, *words)
    assert (before["step"]["prompt_from"], before["step"]["prompt_tokens"]) == ("assumed", 256)
    assert any("256 tokens is assumed" in line for line in before["unknown"])
    after = record(capsys, *words, "--data")
    assert after["step"]["prompt_from"] == "data"
    from retrain.renderer import load_renderer

    rows = [json.loads(line)["question"] for line in (here / "tasks.jsonl").read_text().splitlines()]
    least = max(len(load_renderer("retrain/tiny").encode([Message("user", q)])) for q in rows)
    assert least <= after["step"]["prompt_tokens"] < 200
    room = 512 - after["step"]["prompt_tokens"]
    assert main(["explain", *words[:4], "--max-tokens", str(room + 1), "--data"]) == 2
    assert f"at most {room}." in capsys.readouterr().err


def test_a_gpu_that_was_not_found_is_not_known(capsys, monkeypatch):
    monkeypatch.setattr(cards, "_host_bytes", lambda: 2**30)
    found = record(capsys, "--devices", "gpu:0")
    assert found["fits"] == {"verdict": "unknown", "why": None, "fix": None}


def test_what_is_sampled_with_instead_of_the_generation_config(capsys):
    def said(*words):
        return next(a for a in record(capsys, "--gpu", "H100", *words)["advice"] if "generation_config" in a)

    assert said().endswith("Sampling is with temperature = 0.7 (default) and top_p = 1.0 (default) alone.")
    assert "temperature = 0.9 and" in said("--temperature", "0.9")


def test_stored_rollouts_are_bounded_and_long_times_are_words(capsys):
    words = ("--gpu", "H100", "--max-steps", "100000", "--max-tokens", "30000")
    assert record(capsys, *words, "--rollouts-mb", "5")["disk"]["rollouts_at_most"] == 5_000_000
    out = explained(capsys, *words)
    assert " years" in out
    assert "e+" not in out


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
        (["--gpu", ""], "names no card"),
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
    assert main(["explain", *words, "--probe", "6", "--json"]) == 0
    got = capsys.readouterr()
    after = json.loads(got.out)
    assert "probe: sampling 6 x 4 answers" in got.err
    probe = after["probe"]
    assert (probe["tasks"], probe["rollouts"]) == (6, 24)
    assert 0 <= probe["silent"]["low"] <= probe["silent"]["value"] <= probe["silent"]["high"] <= 1
    assert 10 < probe["length"]["value"] < 80
    assert probe["length"]["low"] < probe["length"]["value"] < probe["length"]["high"]
    wide, narrow = before["time"]["phases"]["learn"], after["time"]["phases"]["learn"]
    assert narrow["high"] / narrow["low"] < wide["high"] / wide["low"]
    assert not (here / "logs").exists()


def test_a_probe_of_one_task_gives_no_interval_and_none_is_sampled_twice(capsys, here):
    (here / "tasks.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    words = ("--model", "retrain/tiny", "--devices", "cpu", "--max-tokens", "8", "--group-size", "2")
    assert main(["explain", *words, "--probe", "3"]) == 0
    got = capsys.readouterr()
    assert "there are 1 tasks, fewer than 3" in got.err
    assert "Sampled now: 1 task, 2 answers" in got.out
    assert got.out.count("(one task: no interval)") == 4
    assert "95 % interval" not in got.out


MAIN = "import sys; from retrain.cli.main import main; main(sys.argv[1:])"


@pytest.mark.parametrize("words", [["--gpu", "H100"], ["--model", "retrain/tiny", "--max-tokens", "9", "--data"]])
def test_no_torch_is_imported(words):
    check = "; print('HEAVY', [m for m in ('torch', 'transformers', 'peft', 'rich') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", MAIN + check, "explain", *words],
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
