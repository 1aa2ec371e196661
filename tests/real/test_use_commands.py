"""``retrain eval``, ``sample`` and ``export`` on a short real run: the run's own numbers, and weights others can load."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from retrain.cli.main import main
from retrain.config.load import load
from retrain.renderer import model_path
from retrain.runner import execute

torch.set_num_threads(1)
FROM_PEFT = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
"""PEFT itself uses names that transformers has renamed."""

CONFIG = """
[model]
model = "retrain/tiny"
lora_rank = 8
[backend]
devices = "cpu"
[algorithm]
advantage_mode = "grpo"
transform_mode = "none"
[training]
seed = 5
max_steps = 3
batch_size = 3
group_size = 6
max_tokens = 40
temperature = 1.0
lr = 3e-3
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
every = 1
[logging]
log_dir = "run"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps in ``run``."""
    folder = tmp_path_factory.mktemp("use")
    (folder / "retrain.toml").write_text(CONFIG)
    loaded = load(folder / "retrain.toml", {"logging.log_dir": str(folder / "run")})
    assert execute(loaded, plain=True).status == "done"
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must succeed and gives what it printed."""

    def run(*words: str) -> str:
        assert main([*words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "eval/accuracy" in row}


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k not in ("step", "eval/time_s")}


def test_a_checkpoints_evaluation_is_the_runs_own_to_the_last_digit(
    place: Path, said: Callable[..., str]
) -> None:
    before = snapshot(place / "run")
    own = evaluations(place)
    assert len({json.dumps(timeless(row)) for row in own.values()}) == 4  # every step moved something
    for words, step in (
        ([], 3),
        (["--checkpoint", "2"], 2),
        (["--checkpoint=newest"], 3),
        (["--checkpoint", "step_000001"], 1),
    ):
        record = json.loads(said("eval", "run", "--json", *words))
        assert record["step"] == step
        assert timeless(record["metrics"]) == timeless(own[step])
    best = max(own[s]["eval/accuracy"] for s in (1, 2, 3))
    record = json.loads(said("eval", "run", "--json", "--checkpoint", "best"))
    assert record["metrics"]["eval/accuracy"] == best
    assert any("selected on evaluation data" in note for note in record["notes"])
    assert snapshot(place / "run") == before


def test_the_record_names_settings_versions_and_weights(place: Path, said: Callable[..., str]) -> None:
    record = json.loads(said("eval", "run", "--json", "--examples", "4"))
    state = json.loads((place / "run/checkpoints/step_000003/state.json").read_text())
    assert record["weights"]["base"] == state["facts"]["weights"]
    assert record["tokenizer"] == state["facts"]["tokenizer"]
    other = json.loads(said("eval", "run", "--json", "--examples", "4", "--checkpoint", "2"))
    assert other["weights"]["base"] == record["weights"]["base"]
    assert other["weights"]["adapter"] != record["weights"]["adapter"]
    assert record["metrics"]["eval/tasks"] == 4
    assert record["settings"]["max_tokens"] == 40
    assert record["settings"]["temperature"] == 1.0
    assert record["versions"]["torch"] == torch.__version__


def test_what_it_prints(said: Callable[..., str]) -> None:
    own = evaluations(Path())[3]
    text = said("eval", "run")
    assert f"{own['eval/accuracy']:.1%}, 95 % interval {own['eval/accuracy_low']:.1%} to" in text
    assert f"pass@2       {own['eval/pass@2']:.1%}" in text
    assert "arithmetic/validation, 24 x 2" in text
    assert "note: " not in text
    trained_on = said("eval", "run", "--split", "train", "--examples", "4", "--samples", "1")
    assert "arithmetic/train, 4 x 1" in trained_on
    assert "these are the training tasks of the run" in trained_on


def test_the_adapter_folder_is_the_same_policy(said: Callable[..., str]) -> None:
    words = [
        "--source",
        "arithmetic",
        "--split",
        "validation",
        "--examples",
        "24",
        "--samples",
        "2",
        "--temperature",
        "1",
    ]
    record = json.loads(
        said("eval", "run/adapter", "--json", "--max-tokens", "40", "--reward-type", "match", *words)
    )
    assert record["kind"] == "adapter"
    assert record["step"] is None
    own = evaluations(Path())
    assert timeless(record["metrics"]) == timeless(own[3])
    # And the base model alone is the run before its first step.
    record = json.loads(
        said("eval", "retrain/tiny", "--json", "--max-tokens", "40", "--reward-type", "match", *words)
    )
    assert timeless(record["metrics"]) == timeless(own[0])
    assert record["weights"]["adapter"] is None


def test_other_tasks_and_rewards(place: Path, said: Callable[..., str]) -> None:
    rows = [{"question": f"{a} + {a} = ?", "answer": str(2 * a)} for a in range(10, 16)]
    (place / "tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (place / "plugins").mkdir(exist_ok=True)
    (place / "plugins/lengthy.py").write_text("def score(response, reference):\n    return len(response)\n")
    record = json.loads(
        said(
            "eval", "run", "--json", "--source", "jsonl", "--path", "tasks.jsonl", "--samples", "1", "--instruction", "Box it.",
            "--reward-type", "custom", "--custom-module", "lengthy",
        )
    )  # fmt: skip
    assert record["metrics"]["eval/tasks"] == 6
    assert record["metrics"]["eval/accuracy"] is None
    assert record["metrics"]["eval/mean_reward"] > 1
    assert record["settings"]["instruction"] == "Box it."


def test_without_checkpoints_the_final_adapter_is_used(
    place: Path, tmp_path: Path, said: Callable[..., str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(place / "run", copy, ignore=shutil.ignore_patterns("checkpoints", "trainer_state.json"))
    record = json.loads(said("eval", str(copy), "--json"))
    assert timeless(record["metrics"]) == timeless(evaluations(place)[3])


def test_a_damaged_checkpoint_is_passed_over_and_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(place / "run", copy)
    with (copy / "checkpoints/step_000003/adapter/adapter_model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)
    assert main(["eval", str(copy), "--json"]) == 0
    captured = capsys.readouterr()
    assert "warning: Checkpoint" in captured.err
    assert json.loads(captured.out)["step"] == 2
    assert main(["eval", str(copy), "--checkpoint", "3"]) == 2
    assert "is damaged" in capsys.readouterr().err


# sample


def test_sampling_is_seeded_and_formatted(said: Callable[..., str]) -> None:
    words = ["sample", "run", "--prompt", "12 + 34 = ?", "--json"]
    first = said(*words, "--seed", "7", "--n", "3")
    assert said(*words, "--seed", "7", "--n", "3") == first
    answers = [json.loads(line) for line in first.splitlines()]
    assert [a["member"] for a in answers] == [0, 1, 2]
    assert len({a["text"] for a in answers}) > 1
    assert all(
        a["stop"] in ("stop", "length") and a["tokens"] <= 40 and a["mean_logprob"] < 0 for a in answers
    )
    assert said(*words, "--seed", "8", "--n", "3") != first
    assert all(
        json.loads(x)["tokens"] == 2 for x in said(*words, "--seed", "7", "--max-tokens", "2").splitlines()
    )
    drawn = {json.loads(said(*words))["seed"] for _ in range(2)}
    assert len(drawn) == 2


def test_the_runs_instruction_goes_along_unless_raw(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    from retrain.engines.torch_engine import TorchEngine
    from retrain.renderer import load_renderer

    renderer, generate = load_renderer("retrain/tiny"), TorchEngine.generate

    async def watched(self: Any, prompt_ids: Any, n: int, sampling: Any) -> Any:
        seen.append(renderer._tokenizer.decode([int(i) for i in prompt_ids]))
        return await generate(self, prompt_ids, n, sampling)

    monkeypatch.setattr(TorchEngine, "generate", watched)
    said("sample", "run", "--prompt", "12 + 34 = ?")
    said("sample", "run", "--prompt", "12 + 34 = ?", "--raw")
    said("sample", "run/adapter", "--prompt", "12 + 34 = ?")
    said("sample", "run", "--prompt", "12 + 34 = ?", "--instruction", "Box.", "--system", "Be brief.")
    assert "12 + 34 = ?\nPut the answer in \\boxed{}." in seen[0]
    assert seen[1] == "12 + 34 = ?"
    assert "12 + 34 = ?" in seen[2]
    assert "boxed" not in seen[2]
    assert seen[2] != seen[1]  # the template is there
    assert "Be brief." in seen[3]
    assert "12 + 34 = ?\nBox." in seen[3]


def test_one_prompt_per_line_from_a_pipe(said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 2 = ?\n\n3 + 4 = ?\n"))
    answers = [json.loads(line) for line in said("sample", "run", "--json", "--seed", "1").splitlines()]
    assert [a["prompt"] for a in answers] == ["1 + 2 = ?", "3 + 4 = ?"]


def test_a_task_of_the_runs_data_with_its_reward(said: Callable[..., str]) -> None:
    found = [
        json.loads(x)
        for x in said("sample", "run", "--index", "5", "--n", "8", "--seed", "2", "--json").splitlines()
    ]
    assert len(found) == 8
    for answer in found:
        boxed = answer["text"].rpartition("\\boxed{")[2].rstrip("}.\n")
        assert answer["correct"] == (boxed == answer["reference"]), answer
        assert answer["reward"] == float(answer["correct"])
    again = said("sample", "run", "--task", found[0]["task"], "--seed", "2", "--n", "8")
    assert f"[reference {found[0]['reference']}; reward" in again
    assert all(a["text"] in again for a in found)


def test_a_conversation_remembers_until_reset(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrain.renderer import ChatRenderer

    seen: list[list[tuple[str, str]]] = []
    encode = ChatRenderer.encode

    def watched(self: Any, messages: Any) -> Any:
        seen.append([(m.role, m.content) for m in messages])
        return encode(self, messages)

    lines = iter(["1 + 2 = ?", "", "and 3?", "/reset", "5 + 5 = ?", "/quit", "never read"])
    monkeypatch.setattr(ChatRenderer, "encode", watched)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    said("sample", "run", "--seed", "4")
    assert [[role for role, _ in turn] for turn in seen] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert seen[1][2] == ("user", "and 3?")
    assert seen[2][0][1].startswith("5 + 5 = ?\n")
    assert next(lines) == "never read"


# export

ROUNDING = 5e-5
"""The run's own forward pass adds the same float32 products up in another order than transformers' modules: a few units
in the last place of logits as large as 20."""


def policy_logits(adapter: Path) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
    """The run's own policy on fixed tokens: (ids, logits)."""
    from retrain.attention import one_sequence
    from retrain.models import load_policy

    policy = load_policy(load(Path("run/config.toml")).config, seed=0)
    policy.load_adapter(adapter)
    ids = np.arange(3, 300, 7, dtype=np.int64) % 384
    with torch.no_grad(), policy.mode("adapter"):
        hidden = policy.forward(torch.as_tensor(ids), torch.arange(len(ids)), one_sequence)
        return ids, policy.head.logits(hidden)


def logits_of(model: Any, ids: np.ndarray[Any, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.as_tensor(ids)[None]).logits[0].float()


def test_a_merged_folder_is_the_policy_in_plain_transformers(
    tmp_path: Path, said: Callable[..., str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = snapshot(Path("run"))
    out = tmp_path / "merged"
    record = json.loads(
        said("export", "run", "--output", str(out), "--merged", "--dtype", "float32", "--json")
    )
    assert snapshot(Path("run")) == before
    ids, ours = policy_logits(Path("run/adapter"))
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.float32
    theirs = logits_of(model, ids)
    assert float((ours - theirs).abs().max()) <= ROUNDING
    base = logits_of(
        AutoModelForCausalLM.from_pretrained(model_path("retrain/tiny"), dtype=torch.float32), ids
    )
    assert float((ours - base).abs().max()) > 1e-2  # the adapter matters here
    packaged = AutoTokenizer.from_pretrained(model_path("retrain/tiny"))
    exported = AutoTokenizer.from_pretrained(out)
    assert exported.encode("12 + 34 = ?") == packaged.encode("12 + 34 = ?")
    assert exported.chat_template == packaged.chat_template
    assert model.generation_config.eos_token_id == [2, 0]  # what the packaged generation_config.json says
    assert "AutoModelForCausalLM" in record["use"]
    # It is a model for our own commands too: the same policy without an adapter, up to rounding.
    words = [
        "--source",
        "arithmetic",
        "--split",
        "validation",
        "--examples",
        "24",
        "--samples",
        "2",
        "--temperature",
        "1",
    ]
    found = json.loads(
        said("eval", str(out), "--json", "--max-tokens", "40", "--reward-type", "match", *words)
    )
    assert found["metrics"]["eval/accuracy"] == pytest.approx(
        evaluations(Path())[3]["eval/accuracy"], abs=0.05
    )


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_merged_weights_are_rounded_once(
    tmp_path: Path, said: Callable[..., str], name: str, dtype: torch.dtype
) -> None:
    from safetensors.torch import load_file

    said("export", "run", "--output", str(tmp_path / "whole"), "--merged", "--dtype", "float32")
    said("export", "run", "--output", str(tmp_path / "cast"), "--merged", "--dtype", name)
    whole = load_file(tmp_path / "whole/model.safetensors")
    cast = load_file(tmp_path / "cast/model.safetensors")
    assert set(cast) == set(whole)
    assert all(cast[key].dtype == dtype and torch.equal(cast[key], whole[key].to(dtype)) for key in whole)


@FROM_PEFT
def test_peft_loads_the_adapter(tmp_path: Path, said: Callable[..., str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    text = said("export", "run", "--output", str(tmp_path / "two"), "--checkpoint", "2")
    assert "PeftModel.from_pretrained" in text
    assert (tmp_path / "two/adapter_model.safetensors").read_bytes() == Path(
        "run/checkpoints/step_000002/adapter/adapter_model.safetensors"
    ).read_bytes()
    ids, ours = policy_logits(Path("run/checkpoints/step_000002/adapter"))
    base = AutoModelForCausalLM.from_pretrained(model_path("retrain/tiny"), dtype=torch.float32)
    theirs = logits_of(PeftModel.from_pretrained(base, tmp_path / "two"), ids)
    assert float((ours - theirs).abs().max()) <= ROUNDING


@FROM_PEFT
def test_an_adapter_of_some_layers_is_used_as_peft_does(tmp_path: Path, said: Callable[..., str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path("retrain/tiny"), dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    model.save_pretrained(tmp_path / "theirs")
    said(
        "export",
        str(tmp_path / "theirs"),
        "--output",
        str(tmp_path / "merged"),
        "--merged",
        "--dtype",
        "float32",
    )
    ids = np.arange(3, 300, 7) % 384
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    # Their forward adds the update to the output, ours to the weight: equal up to rounding at the logits' size.
    theirs = logits_of(model, ids)
    assert float((theirs - logits_of(merged, ids)).abs().max()) <= 1e-6 * max(10.0, float(theirs.abs().max()))
    words = [
        "--source",
        "arithmetic",
        "--examples",
        "16",
        "--max-tokens",
        "30",
        "--reward-type",
        "match",
        "--json",
    ]
    metrics = [json.loads(said("eval", str(tmp_path / x), *words))["metrics"] for x in ("theirs", "merged")]
    assert metrics[0]["eval/accuracy"] == pytest.approx(metrics[1]["eval/accuracy"], abs=0.07)


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "mine.safetensors").write_text("mine too")
    for words, says in (([], "is not empty"), (["--overwrite"], "no export wrote it")):
        assert says in one_line(capsys, "export", "run", "--output", str(out), *words)
    assert sorted(p.name for p in out.iterdir()) == ["mine.safetensors", "notes.txt"]
    (out / "notes.txt").unlink()
    (out / "mine.safetensors").unlink()
    record = json.loads(said("export", "run", "--output", str(out), "--merged", "--json"))
    marker = out / "retrain_export.json"
    assert {p.name for p in out.iterdir()} == {*record["files"], marker.name}
    assert json.loads(marker.read_text())["files"] == record["files"]
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(record["files"])
    assert "is not empty" in one_line(capsys, "export", "run", "--output", str(out))
    (out / "notes.txt").write_text("mine")
    (out / "mine.safetensors").write_text("mine too")
    # Nothing of the whole model may stay: an adapter beside it would be added a second time by whoever loads the folder.
    said("export", "run", "--output", str(out), "--overwrite")
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in out.iterdir()} == {*weights, marker.name, "notes.txt", "mine.safetensors"}
    assert (out / "mine.safetensors").read_text() == "mine too"
    # A file that came between has the name of one to be written: it stays, and so does the earlier export.
    (out / "config.json").write_text("mine")
    before = snapshot(out)
    assert "holds config.json" in one_line(
        capsys, "export", "run", "--output", str(out), "--merged", "--overwrite"
    )
    assert snapshot(out) == before
    # An adapter that is read from an earlier export does not bring its marker along.
    copied = tmp_path / "copied"
    (out / "config.json").unlink()
    (out / "mine.safetensors").unlink()
    said("export", str(out), "--output", str(copied))
    listed = json.loads((copied / marker.name).read_text())["files"]
    assert {*listed, marker.name} == {p.name for p in copied.iterdir()}
    assert marker.name not in listed


def test_a_marker_names_only_files_of_its_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept.txt"
    out.mkdir()
    kept.write_text("kept")
    (out / "away").symlink_to(tmp_path)
    for files in (["../kept.txt"], [str(kept)], ["away/kept.txt"], ["x", 3], "kept.txt", [""]):
        (out / "retrain_export.json").write_text(json.dumps({"files": files}))
        assert "is no list of an export's files" in one_line(
            capsys, "export", "run", "--output", str(out), "--overwrite"
        )
    assert kept.read_text() == "kept"


def test_an_export_never_touches_the_base_model(
    tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    # The base is itself an earlier export: its marker would permit what destroys it.
    base, run = tmp_path / "models/base", tmp_path / "run"
    said("export", "run", "--output", str(base), "--merged", "--dtype", "float32")
    text = CONFIG.replace("retrain/tiny", str(base)).replace("max_steps = 3", "max_steps = 1")
    (tmp_path / "based.toml").write_text(text.partition("[eval]")[0] + f"[logging]\nlog_dir = '{run}'\n")
    assert execute(load(tmp_path / "based.toml"), plain=True).status == "done"
    capsys.readouterr()
    (tmp_path / "link").symlink_to(base)
    shutil.copy(base / "retrain_export.json", base.parent)
    # A folder of links to the files of an earlier export.
    linked, store = tmp_path / "linked", tmp_path / "store"
    shutil.copytree(base, store)
    linked.mkdir()
    for file in base.iterdir():
        (linked / file.name).symlink_to(store / file.name)
    before = snapshot(tmp_path)
    for words in (
        [str(run), "--output", str(base)],
        [str(run), "--output", str(base), "--merged"],
        [str(run), "--output", str(tmp_path / "link")],
        [str(run), "--output", str(base / "deeper")],
        [str(run), "--output", str(base.parent)],
        [str(run / "adapter"), "--output", str(base)],
        # What --model names, and what the run itself was trained on.
        [str(run), "--model", str(linked), "--output", str(base)],
        [str(run), "--model", str(linked), "--output", str(store)],
    ):
        assert "base model" in one_line(capsys, "export", *words, "--overwrite"), words
    assert snapshot(tmp_path) == before


def test_an_export_never_writes_into_a_run(
    place: Path, tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    said("export", "run", "--output", str(tmp_path / "out"))
    other = tmp_path / "other"
    shutil.copytree("run", other)
    (tmp_path / "link").symlink_to(other)
    before = snapshot(place / "run"), snapshot(other)
    for source in ("run", "run/adapter", "run/checkpoints/step_000002", str(tmp_path / "out")):
        for target in ("run", "run/sub", "run/checkpoints/new/deep", "run/adapter", str(other), f"{other}/a/b",
                       str(tmp_path / "link/x")):  # fmt: skip
            for words in ([], ["--overwrite"]):
                said_ = one_line(capsys, "export", source, "--output", target, *words)
                assert "lies in" in said_, (source, target)
    assert (snapshot(place / "run"), snapshot(other)) == before
    assert not (place / "run/sub").exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("run/adapter", tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"broken")
    assert "is damaged" in one_line(capsys, "export", str(tmp_path / "a"), "--output", str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


# streams


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))


def test_a_line_that_cannot_be_asked_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = b"1 + 2 = ?\r\n" + b"1 + 1 " * 200 + b"\n\n\xff\xfe = ?\n3 + 4 = ?"
    piped(monkeypatch, data)
    assert main(["sample", "run", "--json", "--seed", "1"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [bool(row["error"]) for row in rows] == [False, True, True, False]
    assert [row.get("line") for row in rows] == [None, 2, 4, None]
    assert [rows[0]["prompt"], rows[3]["prompt"]] == ["1 + 2 = ?", "3 + 4 = ?"]
    assert "512 positions" in rows[1]["error"]
    assert rows[1]["text"] is None
    assert "not valid UTF-8" in rows[2]["error"]
    assert rows[2]["prompt"] == "\\xff\\xfe = ?"
    piped(monkeypatch, data)
    assert main(["sample", "run", "--seed", "1"]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[-1] != ""
    assert text.count("[failed: line ") == 2
    assert rows[0]["text"] in text
    assert rows[3]["text"] in text
    assert "/reset" not in text


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_prompts_are_utf8_whatever_the_terminal_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    piped(monkeypatch, "1 \u00d7 2 = ?\n".encode(), encoding)
    assert main(["sample", "run", "--json", "--max-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "1 \u00d7 2 = ?"


def test_a_terminal_that_knows_less_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two characters, one of them beyond 16 bits.
    prompt = "1 \u00d7 \U0001f600 = ?"
    for words in (["--json"], []):
        raw = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
            assert main(["sample", "run", "--prompt", prompt, "--max-tokens", "2", *words]) == 0
            found = raw.getvalue()
        assert not words or json.loads(found)["prompt"] == prompt
        assert found.isascii()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample", "run", "--prompt", "\udcff"], "--prompt is not valid UTF-8"),
        (["sample", "run", "--prompt", "a", "--system", "\udcff"], "--system: its value is not valid UTF-8"),
        (["sample", "run", "--prompt", "a", "--stop", '["\udcff"]'], "not valid UTF-8"),
        (["eval", "run", "--instruction", "\udcff"], "--instruction: its value is not valid UTF-8"),
        (["eval", "\udcff"], "there is no such folder"),
        (["export", "run", "--output", "x", "--model", "\udcff"], "--model: its value is not valid UTF-8"),
    ],
)
def test_bytes_that_are_no_text_are_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", errors)
    assert main(words) == 2
    errors.seek(0)
    said = errors.read().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert capsys.readouterr().out == ""


def test_a_closed_stdin_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin is closed" in one_line(capsys, "sample", "run")
    assert main(["sample", "run", "--prompt", "1 + 1 = ?", "--max-tokens", "2"]) == 0


def test_json_stands_alone_on_stdout_whoever_else_prints(place: Path, tmp_path: Path) -> None:
    (place / "noisy.py").write_text(
        "import atexit, ctypes, os\n"
        "print('at import')\n"
        "atexit.register(print, 'at exit')\n"
        "def score(response, reference):\n"
        "    print('from print')\n"
        "    os.write(1, b'from the descriptor\\n')\n"
        "    ctypes.CDLL(None).puts(b'from C')\n"
        "    os.system('echo from a child')\n"
        "    return 1.0\n"
    )
    words = ["eval", "run", "--json", "--examples", "2", "--samples", "1", "--max-tokens", "2"]
    own = ["--reward-type", "custom", "--custom-module", "noisy", "--reward.isolate", "false"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(place), *sys.path]),
        "PYTHONIOENCODING": "ascii",
    }
    done = subprocess.run(
        [sys.executable, "-m", "retrain", *words, *own], cwd=place, env=environment, capture_output=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"\n") == 1
    assert json.loads(done.stdout)["metrics"]["eval/tasks"] == 2
    for said in (b"at import", b"from print", b"from the descriptor", b"from C", b"from a child", b"at exit"):
        assert said in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrain.cli.streams import Results
    from retrain.errors import RunError

    with pytest.raises(RunError, match="No space left"), open("/dev/full", "wb", buffering=0) as full:
        Results(io.TextIOWrapper(io.BufferedWriter(full))).line("x")


# mistakes


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Fix:" in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval"], "needs a run directory"),
        (["eval", "logs/none/there"], "there is no such folder"),
        (["eval", "none"], "there is no such folder"),
        (["eval", "nobody/nothing", "--source", "arithmetic"], "nobody/nothing"),
        (["eval", "."], "holds neither a run"),
        (["eval", "run/config.toml"], "is a file"),
        (["eval", "run", "other"], "unexpected argument 'other'"),
        (["eval", "run", "--checkpoint", "9"], "it has 1, 2, 3"),
        (["eval", "run", "--checkpoint", "bset"], "no checkpoint 'bset'"),
        (["eval", "retrain/tiny", "--checkpoint", "best"], "is no run"),
        (["eval", "run", "--lr", "1e-3"], "--lr does nothing in retrain eval"),
        (["eval", "run", "--log-dir", "x"], "--log-dir does nothing"),
        (["eval", "run", "--sauce", "math"], "did you mean --source?"),
        (["eval", "run", "--samples", "0"], "--samples: eval.samples must be"),
        (["eval", "run", "--source", "nope"], '--source: eval.source = "nope" is unknown'),
        (["eval", "run", "--source", "jsonl"], "needs eval.path"),
        (["eval", "run", "--source", "jsonl", "--path", "no.jsonl"], "no.jsonl"),
        (["eval", "run", "--split", "nope"], "no split 'nope'"),
        (["eval", "run", "--max-tokens", "600"], "512"),
        (["eval", "retrain/tiny"], "has no evaluation of its own"),
        (["eval", "run", "--overwrite"], "--overwrite is not an option of eval"),
        (["eval", "run", "--json=1"], "--json takes no value"),
        (["sample", "run", "--prompt"], "--prompt needs a value"),
        (["sample", "run", "--prompt", "a", "--index", "1"], "exclude each other"),
        (["sample", "run", "--task", "nope"], "no task has that id"),
        (["sample", "run", "--index", "99999999"], "--index"),
        (["sample", "run", "--index", "-1"], "whole number"),
        (["sample", "retrain/tiny", "--index", "1"], "has no data"),
        (["sample", "run", "--prompt", "a", "--n", "0"], "--n 0 is not a whole number"),
        (["sample", "run", "--prompt", "a", "--temperature", "0"], "temperature"),
        (["sample", "run", "--prompt", "1 + 1 " * 200], "512 positions"),
        (["export", "run"], "needs --output"),
        (["export", "run", "--output", "x", "--dtype", "bf16"], "--merged"),
        (["export", "run", "--output", "x", "--merged", "--dtype", "int3"], "float32, bf16 or float16"),
        (["export", "retrain/tiny", "--output", "x"], "no adapter to export"),
        (["export", "run", "--output", "run/inside"], "lies in what is exported"),
        (["eval", "run", "--instruction", "long " * 200], "the longest prompt ("),
        (["eval", "run", "--instruction", "long " * 200, "--max-tokens", "8"], "shorter data.instruction"),
        (["export", "run", "--output", "retrain.toml"], "--output"),
        (["export", "run", "--output", "x", "--lr", "1"], "--lr does nothing in retrain export"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in one_line(capsys, *words)
    assert not Path("x").exists()


def test_weights_that_do_not_belong_together_are_refused(
    place: Path, tmp_path: Path, random_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = random_model(hidden=96, layers=3)
    assert "tokenizer or chat template" in one_line(capsys, "eval", "run", "--model", str(other))
    assert "does not fit" in one_line(
        capsys, "eval", "run/adapter", "--model", str(other), "--source", "arithmetic", "--max-tokens", "8"
    )
    # The same tokenizer over other weights of the same shape.
    changed = tmp_path / "changed"
    shutil.copytree(model_path("retrain/tiny"), changed)
    from safetensors.torch import load_file, save_file

    tensors = load_file(changed / "model.safetensors")
    name = next(k for k in tensors if k.endswith("q_proj.weight"))
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert "are not those that the run was trained on" in one_line(
        capsys, "eval", "run", "--model", str(changed)
    )
    # A tokenizer with more tokens than the model has rows.
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [
        {"id": 384 + i, "content": f"<x{i}>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i in range(4)
    ]  # fmt: skip
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = one_line(capsys, "eval", str(changed), "--source", "arithmetic", "--max-tokens", "8")
    assert "the tokenizer has 388 tokens" in said


def test_an_adapter_that_our_forward_cannot_express_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, says in (
        ({"use_dora": True}, "DoRA"),
        ({"alpha_pattern": {"q_proj": 4}}, "differ in alpha"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "IA3"}, "not a LoRA adapter"),
        ({"base_model_name_or_path": ""}, "does not name its base model"),
        ({"lora_alpha": 2.5}, "not whole numbers"),
    ):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree("run/adapter", tmp_path / "a")
        file = tmp_path / "a/adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        assert says in one_line(capsys, "sample", str(tmp_path / "a"), "--prompt", "x")
