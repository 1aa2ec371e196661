"""``retrain squeeze`` on a short real run: what it prints and writes, accuracy before and after, training on, wandb."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from retrain.cli.main import main
from retrain.config.load import load
from retrain.runner import execute

_made = runpy.run_path(str(Path(__file__).parents[1] / "squeeze/made.py"))
_reader = runpy.run_path(str(Path(__file__).with_name("trackers_read.py")))

CONFIG = """
[model]
model = "retrain/tiny"
lora_rank = 16
[lora]
alpha = 40
[backend]
devices = "cpu"
[algorithm]
advantage_mode = "grpo"
transform_mode = "none"
[training]
seed = 5
max_steps = 2
batch_size = 3
group_size = 6
max_tokens = 40
temperature = 1.0
lr = 1e-2
save_every = 1
[data]
source = "arithmetic"
[reward]
type = "match"
[eval]
source = "arithmetic"
split = "validation"
examples = 24
samples = 2
every = 0
[logging]
log_dir = "run"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps in ``run``."""
    folder = tmp_path_factory.mktemp("squeeze")
    (folder / "retrain.toml").write_text(CONFIG)
    loaded = load(folder / "retrain.toml", {"logging.log_dir": str(folder / "run")})
    assert execute(loaded, plain=True).status == "done"
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must succeed and gives what it printed."""

    def run(*words: str) -> str:
        assert main([*words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused in one line, and gives it."""

    def run(*words: str) -> str:
        assert main([*words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert "Fix: " in err
        return err

    return run


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_table_and_the_heat_map_say_what_the_record_says(place: Path, said: Callable[..., str]) -> None:
    before = snapshot(place / "run")
    record = json.loads(said("squeeze", "run", "--json"))
    text = said("squeeze", "run")
    assert snapshot(place / "run") == before
    tensors = load_file(place / "run/adapter/adapter_model.safetensors")
    names = sorted(n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight"))
    assert len(record["layers"]) == len(names) == 21
    shares: dict[int, list[float]] = {rank: [] for rank in (1, 2, 4, 8, 16)}
    for name in names:
        s = torch.linalg.svdvals(
            tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
        )
        for rank, found in shares.items():
            found.append(float(s[:rank].square().sum() / s.square().sum()))
    for row in record["table"]:
        true = shares[row["rank"]]
        assert (row["mean"], row["min"], row["max"]) == pytest.approx(
            (np.mean(true), min(true), max(true)), abs=1e-7
        )
    recommended = next(r for r in (1, 2, 4, 8, 16) if np.mean(shares[r]) >= 0.95)
    assert record["recommended_rank"] == recommended
    arrows = [line for line in text.splitlines() if "<- recommended" in line]
    assert len(arrows) == 1
    assert int(arrows[0].split()[0]) == recommended
    map_rows = [line.split() for line in text.splitlines() if re.match(r"\s+[012]\s+\d+ [░▒▓█]", line)]
    needed = {(la["layer"], la["module"].rpartition(".")[2]): la["needed_rank"] for la in record["layers"]}
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [[int(row[0]), *map(int, row[1::2])] for row in map_rows] == [
        [i, *(needed[i, kind] for kind in order)] for i in range(3)
    ]


def test_a_written_adapter_is_used_by_eval_and_by_a_run(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "small"
    text = said("squeeze", "run", "--rank", "6", "--out", str(out))
    assert f"Wrote {out}: rank 6, alpha 15;" in text  # 40 x 6 / 16
    command = re.search(r"^  retrain (run/config\.toml .*)$", text, re.MULTILINE)
    assert command is not None
    assert "--max-steps 10 " in command[1]
    assert "a suggestion, also its number of steps" in text
    assert "of all together" in text
    record = json.loads((out / "squeeze.json").read_text())
    assert record["rank"] == 16
    assert json.loads((out / "retrain_export.json").read_text())["squeezed"]["to"] == 6
    words = [
        "--source",
        "arithmetic",
        "--examples",
        "16",
        "--max-tokens",
        "40",
        "--reward-type",
        "match",
        "--json",
    ]
    by_itself = json.loads(said("eval", str(out), *words))
    assert by_itself["weights"]["adapter"]
    # The command that it prints is one that works: it begins at the compressed adapter, not at zero.
    on = tmp_path / "on"
    continued = command[1].replace(f"{out}-cont", str(on)).replace("--max-steps 10", "--max-steps 1").split()
    said(*continued)
    rows = [json.loads(line) for line in (on / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 1
    settings = json.loads((on / "adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (6, 15)


def test_accuracy_before_and_after_is_that_of_eval(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "one"
    record = json.loads(
        said("squeeze", "run", "--rank", "1", "--eval", "--out", str(out), "--json", "--examples", "40")
    )
    before = json.loads(said("eval", "run", "--examples", "40", "--json"))["metrics"]
    assert record["eval"]["before"] | {"eval/time_s": 0} == before | {"eval/time_s": 0}
    after = record["eval"]["after"]
    assert after["eval/mean_length"] != before["eval/mean_length"]  # other weights
    change = record["eval"]["difference"]["after"]["eval"]
    assert change["mean"] == pytest.approx(after["eval/accuracy"] - before["eval/accuracy"], abs=1e-12)
    assert change["low"] < change["mean"] < change["high"]
    assert change["tasks"] == 40
    # The written folder knows the run's evaluation: the same command for both gives comparable numbers.
    by_itself = json.loads(said("eval", str(out), "--examples", "40", "--json"))
    assert by_itself["metrics"] | {"eval/time_s": 0} == after | {"eval/time_s": 0}
    assert (by_itself["settings"]["reward"], by_itself["settings"]["max_tokens"]) == ("match", 40)
    assert by_itself["notes"][0].startswith(f"evaluated with the settings of {Path('run').absolute()}")
    (out / "squeeze.json").unlink()
    words = ("--source", "arithmetic", "--examples", "8", "--max-tokens", "24")
    assert "scored by the reward math with max_tokens 24 and temperature 0.7" in said("eval", str(out), *words)
    whole = json.loads(said("squeeze", "run", "--rank", "16", "--eval", "--json"))["eval"]
    assert whole["difference"]["after"]["eval"]["changed_tasks"] == 0
    assert whole["after"]["eval/accuracy"] == whole["before"]["eval/accuracy"]


def test_a_copy_at_its_own_rank_says_so(said: Callable[..., str], tmp_path: Path) -> None:
    words = ("squeeze", "run", "--min-variance-retention", "0.99999", "--target-ranks", "[1]")
    text = said(*words, "--out", str(tmp_path / "copy"))
    assert f"Wrote {tmp_path / 'copy'}: nothing is compressed: rank 16 is the adapter's own" in text
    record = json.loads(said(*words, "--out", str(tmp_path / "again"), "--json"))
    assert record["compressed"]["compresses"] is False
    assert record["squeezed_from"] == os.path.abspath("run")
    small = json.loads(said("squeeze", "run", "--rank", "3", "--out", str(tmp_path / "less"), "--json"))
    assert small["compressed"]["compresses"] is True


def test_an_adapter_with_patterns_is_evaluated_through_copies_of_one_rank(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    tensors = load_file(place / "run/adapter/adapter_model.safetensors")
    layers = {}
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = 4 if "q_proj" in name else 16
        layers[name] = (tensors[key][:rank], tensors[key.replace("lora_A", "lora_B")][:, :rank])
    folder = _made["write"](tmp_path / "p", layers, lora_alpha=40.5, rank_pattern={"q_proj": 4})
    words = [
        "--eval",
        "--source",
        "arithmetic",
        "--examples",
        "8",
        "--reward-type",
        "match",
        "--max-tokens",
        "24",
        "--json",
    ]
    record = json.loads(said("squeeze", str(folder), "--rank", "16", *words))
    change = record["eval"]["difference"]["after"]["eval"]
    assert (change["changed_tasks"], change["tasks"]) == (0, 8)
    assert {la["rank"] for la in record["layers"]} == {4, 16}


def test_training_on_continues_from_the_compressed_adapter(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "small"
    record = json.loads(
        said(
            "squeeze",
            "run",
            "--rank",
            "4",
            "--out",
            str(out),
            "--cont",
            "1",
            "--eval",
            "--lr",
            "1e-4",
            "--log-dir",
            str(tmp_path / "small-cont"),
            "--json",
        )
    )
    assert record["trained"] == {"steps": 1, "exit_code": 0}
    assert record["eval"]["difference"].keys() == {"after", "continued"}
    rows = [json.loads(line) for line in (tmp_path / "small-cont/metrics.jsonl").read_text().splitlines()]
    own = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    # The first evaluation of the further run is that of the compressed adapter, the last that of the continued one.
    assert own[0] == record["eval"]["after"]["eval/accuracy"]
    assert own[1] == record["eval"]["continued"]["eval/accuracy"]
    assert load(tmp_path / "small-cont/config.toml").config.training.lr == 1e-4


def test_a_toml_with_squeeze_alone_is_a_squeeze(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    toml = tmp_path / "squeeze.toml"
    toml.write_text(
        f'[model]\nlora_rank = 16\n[squeeze]\nadapter_path = "run/adapter"\ntarget_ranks = [3, 5]\n'
        f'min_variance_retention = 0.3\noutput_path = "{tmp_path}/out"\n'
    )
    text = said(str(toml))
    assert "rank 3, alpha 8, what alpha lacks in the factors" in text  # 7.5
    record = json.loads(said("squeeze", str(toml), "--json", "--overwrite", "--compress-to", "5"))
    assert [row["rank"] for row in record["table"]] == [3, 5]
    assert record["compressed"]["rank"] == 5
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 5


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("[squeeze]\n", "needs an adapter"),
        ('[squeeze]\nadapter_path = "run"\n[lora]\nalpha = 4\n', r"\[lora\] does nothing in a squeeze"),
        (
            '[squeeze]\nadapter_path = "run"\n[logging]\ngenerations = 4\n',
            "logging.generations does nothing in a squeeze",
        ),
        (
            '[squeeze]\nadapter_path = "run"\n[logging]\ntrackers = ["trackio"]\n',
            '"trackio" takes no squeeze',
        ),
        (
            '[squeeze]\nadapter_path = "run"\n[training]\nlr = 1e-4\n',
            r"\[squeeze\] does nothing in a training run",
        ),
        (
            '[squeeze]\nadapter_path = "run"\n[campaign]\n',
            r"squeeze.adapter_path does nothing in a campaign",
        ),
        (
            '[squeeze]\nadapter_path = "run"\nsource_rank = 8\n',
            "source_rank = 8, and the adapter .* has rank 16",
        ),
        ('[squeeze]\nadapter_path = "run"\n[model]\nlora_rank = 8\n', "has rank 16"),
        ('[squeeze]\nadapter_path = "run"\ncompress_to = 8\n', "is the rank of an adapter to write"),
        ('[squeeze]\nadapter_path = "run"\noutput_path = "x"\ncompress_to = 17\n', "the adapter has rank 16"),
        ('[squeeze]\nadapter_path = "run"\ntarget_ranks = [99]\n', "holds 99"),
        ('[squeeze]\nadapter_path = "run"\ndevice = "tpu"\n', "is not cpu, cuda"),
        ('[squeeze]\nadapter_path = "nowhere/at/all"\n', "there is no such folder"),
        ('[squeeze]\nadapter_path = "tinker://x/y"\n', "not in this version"),
        ('[squeeze]\nadapter_path = "run"\noutput_path = "run/x"\n', "lies in what is exported"),
    ],
)
def test_what_a_squeeze_cannot_be_is_one_line(
    refused: Callable[..., str], tmp_path: Path, toml: str, line: str
) -> None:
    (tmp_path / "c.toml").write_text(toml)
    assert re.search(line, refused(str(tmp_path / "c.toml")))


ON = ["squeeze", "run", "--out", "never", "--rank", "3", "--cont", "2", "--eval", "--json"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["squeeze"], "needs an adapter"),
        (["squeeze", "retrain.toml"], r"has no \[squeeze\]"),
        (["squeeze", "retrain/tiny"], "no such folder"),
        (["squeeze", "run", "--examples", "4"], "--examples does nothing in retrain squeeze without --eval"),
        (["squeeze", "run", "--cont", "2"], "--cont needs a run and --output"),
        (["squeeze", "run/adapter", "--cont", "2", "--out", "x"], "--cont needs a run"),
        (["squeeze", "run", "--overwrite"], "--overwrite is for --output"),
        (["squeeze", "run/adapter", "--checkpoint", "1"], "is no run"),
        (["squeeze", "run", "--eval", "--lr", "3"], "--lr does nothing"),
        (["squeeze", "run", "--html", "no/such/place.html"], "cannot be written there"),
        (["squeeze", "run", "--html", "page.txt"], "page.txt is no name of a page"),
        ([*ON, "--keep-alpha"], "--keep-alpha writes what a run cannot start from"),
        ([*ON, "--lr", "banana"], "--training.lr: .*above 0"),
        ([*ON, "--lora-rank", "9"], "--lora-rank cannot be given with --cont: --rank names"),
        ([*ON, "--max-steps", "9"], "--max-steps cannot be given with --cont"),
        ([*ON, "--log-dir", "run"], "already holds a run.* with --log-dir"),
        (["retrain.toml", "--device", "cpu"], "--devices names the device of a run"),
    ],
)
def test_wrong_lines_are_refused(refused: Callable[..., str], words: list[str], line: str) -> None:
    assert re.search(line, refused(*words))
    assert not Path("never").exists()


def test_a_further_run_that_fails_leaves_the_record(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["squeeze", "run", "--rank", "3", "--out", str(tmp_path / "out"), "--cont", "1", "--json"]
    assert main([*words, "--source", "no/such.jsonl"]) == 2
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["compressed"]["rank"], record["trained"]["exit_code"]) == (3, 2)
    assert record["trained"]["error"] in err


@pytest.mark.parametrize("command", ["bench", "doctor", "trace"])
def test_commands_about_training_refuse_a_squeeze(
    refused: Callable[..., str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "s.toml").write_text('[squeeze]\nadapter_path = "run"\n')
    assert "is a squeeze" in refused(command, str(tmp_path / "s.toml"))


def test_the_page_is_one_file_that_loads_nothing(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    said("squeeze", "run", "--html", str(page))
    text = page.read_text()
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="?https?:', text)
    assert "recommended" in text
    assert "gate_proj" in text


def test_wandb_shows_the_analysis(
    place: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = json.loads(
        said("squeeze", "run", "--wandb-project", "checks", "--wandb-tags", "one, two", "--json")
    )
    assert "wandb sync" in record["wandb"]
    shutil.move("logs/squeeze", "logs/trackers")  # where the reader of runs looks
    (piece,) = _reader["wandb_pieces"](Path("logs"))
    assert (piece["name"], piece["project"], piece["tags"], piece["exit"]) == (
        "squeeze-analysis",
        "checks",
        ["one", "two"],
        0,
    )
    rows = [row for row in piece["rows"] if "squeeze/rank" in row]
    for row, sent in zip(record["table"], rows, strict=True):
        assert sent["squeeze/rank"] == row["rank"]
        assert sent["squeeze/mean_variance"] == pytest.approx(100 * row["mean"])
    assert any(key.startswith("squeeze/variance") for row in piece["rows"] for key in row)
    shutil.rmtree("logs")


def test_a_child_writes_the_analysis_for_callers_without_torch(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "s.json").write_text(
        json.dumps({"min_variance_retention": 0.5, "output_path": str(tmp_path / "out")})
    )
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "retrain.squeeze.child",
        "run/adapter",
        str(out),
        str(tmp_path / "s.json"),
    ]
    assert subprocess.run(command, env=os.environ, timeout=300).returncode == 0
    found = json.loads(out.read_text())
    own = json.loads(said("squeeze", "run/adapter", "--min-variance-retention", "0.5", "--json"))
    assert (found["recommended_rank"], found["table"]) == (own["recommended_rank"], own["table"])
    assert found["compressed"]["rank"] == found["recommended_rank"]
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    wrong = subprocess.run([*command[:3], "nowhere", str(out)], capture_output=True, text=True, timeout=300)
    assert (wrong.returncode, len(wrong.stderr.strip().splitlines())) == (2, 1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_the_compressed_adapters_logits_are_pefts_in_our_engine(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    """A sampled answer of our engine against PEFT's own forward, token by token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from retrain import opened
    from retrain.renderer import model_path
    from retrain.subject import configure, find

    out = tmp_path / "small"
    said("squeeze", "run", "--rank", "3", "--out", str(out))
    subject = find(str(out))
    loaded = configure(subject, [], opened.SAMPLE_KEYS, "sample")
    base = AutoModelForCausalLM.from_pretrained(model_path("retrain/tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(out)).eval()
    with opened.talker(subject, loaded.config, search_paths=()) as talker:
        renderer: Any = talker._renderer
        prompt = renderer.encode_text("12+7=")
        made = talker._generate(prompt, 1)[0]
    ids = torch.tensor([[*map(int, prompt), *map(int, made.token_ids_T)]])
    with torch.no_grad():
        logprobs = (model(input_ids=ids).logits[0] / loaded.config.training.temperature).log_softmax(-1)
    for i, (token, logprob) in enumerate(zip(made.token_ids_T, made.logprobs_T, strict=True)):
        assert float(logprob) == pytest.approx(float(logprobs[len(prompt) - 1 + i, int(token)]), abs=1e-3)
    assert not math.isnan(float(made.logprobs_T.sum()))
