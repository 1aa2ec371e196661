"""``retrain replay``, ``diff`` and ``why`` on short real runs: what comes back exactly, where runs part, what a step did."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrain.algorithms import credit
from retrain.cli.main import main
from retrain.config.load import load
from retrain.errors import UsageError
from retrain.preflight import inexact_because
from retrain.renderer import load_renderer
from retrain.replay.credit import settings
from retrain.replay.words import Words
from retrain.runner import execute
from retrain.tracking import rollouts
from retrain.tracking.read import RunRecord
from retrain.training import loop
from retrain.training.recredit import credited

torch.set_num_threads(1)

CONFIG: dict[str, Any] = {
    "model": {"model": "retrain/tiny", "lora_rank": 8},
    "backend": {"devices": "cpu"},
    "algorithm": {"advantage_mode": "grpo", "transform_mode": "gtpo_sepa"},
    "sepa": {
        "schedule": "auto",
        "delay_steps": 0,
        "steps": 20,
        "warmup_updates": 1,
        "correct_rate_gate": 0.05,
    },
    "training": {
        "seed": 5, "max_steps": 4, "batch_size": 3, "group_size": 6, "max_tokens": 48, "temperature": 1.0, "lr": 3e-3,
        "save_every": 2,
    },
    "data": {"source": "arithmetic"},
    "reward": {"type": "match"},
    "eval": {"source": "arithmetic", "split": "validation", "examples": 8},
    "logging": {"generations": 3},
}  # fmt: skip


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A TOML file of CONFIG with sections changed."""
    made = copy.deepcopy(CONFIG)
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    made["logging"]["log_dir"] = str(folder / name)
    lines = [f"[{s}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in made[s].items()) for s in made]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: ``first``; ``twin``, the same; ``other``, with another learning rate."""
    folder = tmp_path_factory.mktemp("replay")
    for name, changes in (("first", {}), ("twin", {}), ("other", {"training": {"lr": 1e-2}})):
        assert execute(load(write(folder, name, **changes)), plain=True).status == "done"
    return folder


@pytest.fixture
def said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command in the folder and gives what it printed; its exit status must be ``status``."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*words: str, status: int = 0) -> str:
        capsys.readouterr()  # what a run in the test itself printed
        found = main([*words])
        captured = capsys.readouterr()
        assert found == status, captured.err
        return captured.out if status in (0, 1) else captured.err

    return run


def test_the_loops_own_arrays_come_back_from_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored groups, advantages, uncertainties and planning marks of a real run, against what the loop had in hand."""
    seen: list[Any] = []
    real = loop.credit_step

    def recording(*arguments: Any) -> Any:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(loop, "credit_step", recording)
    execute(load(write(tmp_path, "run", training={"max_steps": 3})), plain=True)
    config = load(tmp_path / "run/config.toml").config
    decode = Words(config).renderer.decode
    assert len(seen) == 3
    for step, groups_P in enumerate(seen):
        stored, again_P = credited(tmp_path / "run", config, step, decode)
        assert stored.temperature == 1.0
        told = rollouts.read(tmp_path / "run", step, decode=decode)
        for p, (a, b) in enumerate(zip(groups_P, again_P, strict=True)):
            assert a.skipped == b.skipped == stored.skipped_P[p]
            assert a.scored.scores_G == b.scored.scores_G
            assert [r.text for r in a.scored.rollouts_G] == [r.text for r in told.groups_P[p].rollouts_G]
            for name in ("advantages_G_T", "uncertainty_G_T", "planning_G_T"):
                for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
                    assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes())


def test_the_runs_own_credit_and_gradients_come_back(place: Path, said: Callable[..., str]) -> None:
    text = said("replay", "first", "--learner")
    assert "Credit came back bit for bit in every step" in text
    assert [line.partition(" (")[0] for line in text.splitlines()[-2:]] == [
        "Gradient of step 0: reproduced bit for bit",
        "Gradient of step 2: reproduced bit for bit",
    ]
    record = json.loads(said("replay", "first", "--learner", "--json"))
    rows = [json.loads(line) for line in (place / "first/metrics.jsonl").read_text().splitlines()]
    hashes = {r["step"]: r["gradient_hash"] for r in rows if "gradient_hash" in r}
    assert {g["step"]: g["hash"] for g in record["gradients"]} == {s: h for s, h in hashes.items() if h}
    assert set(hashes) == {0, 1, 2, 3}
    assert hashes[0] != hashes[2]


def test_gradients_come_back_whatever_save_every_is_now(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    """A resume may have changed it: then the configuration does not say which steps were hashed."""
    run = tmp_path / "run"
    shutil.copytree(place / "first", run)
    path = run / "config.toml"
    assert "save_every = 2" in path.read_text()
    path.write_text(path.read_text().replace("save_every = 2", "save_every = 3"))
    record = json.loads(said("replay", str(run), "--learner", "--json"))
    assert [(g["step"], g["outcome"]) for g in record["gradients"]] == [(0, "reproduced"), (2, "reproduced")]
    shutil.rmtree(run / "checkpoints/step_000002")
    record = json.loads(said("replay", str(run), "--learner", "--steps", "1..", "--json"))
    assert [(g["step"], g["outcome"]) for g in record["gradients"]] == [(2, "its checkpoint is not kept")]
    assert "has a recorded hash" in said("replay", str(run), "--learner", "--steps", "3")


def test_other_weights_or_another_record_do_not_pass(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "first", run)
    for folder in ("step_000002", "step_000004"):
        assert (run / "checkpoints" / folder).is_dir()
    shutil.copy(
        run / "checkpoints/step_000004/adapter/adapter_model.safetensors",
        run / "checkpoints/step_000002/adapter/adapter_model.safetensors",
    )
    text = said("replay", str(run), "--steps", "2", "--learner", status=1)
    assert "Gradient of step 2: differs; its norm was" in text
    shutil.copy(run / "rollouts/step_000001.npz", run / "rollouts/step_000003.npz")
    stored = dict(np.load(run / "rollouts/step_000001.npz"))
    meta = json.loads(stored["meta"].tobytes())
    meta["credit_digest"] = "0" * 64
    stored["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez_compressed(run / "rollouts/step_000001.npz", **stored)
    text = said("replay", str(run), "--steps", "0..1", status=1)
    assert "came out differently in 1 of 2 steps, first in step 1" in text
    assert "bit for bit" not in text
    shutil.rmtree(run / "checkpoints/step_000002")
    assert "step 2: not computed, its checkpoint is not kept" in said(
        "replay", str(run), "--steps", "2", "--learner"
    )


def test_another_algorithms_credit_is_what_the_loop_would_have_computed(
    place: Path, said: Callable[..., str]
) -> None:
    record = json.loads(
        said("replay", "first", "--advantage-mode", "maxrl", "--transform-mode", "gtpo_hicra", "--json")
    )
    assert (record["own"], record["other"]) == ("grpo+gtpo_sepa", "maxrl+gtpo_hicra")
    assert record["changed"] == [
        "algorithm.advantage_mode was 'grpo' and is 'maxrl'", "algorithm.transform_mode was 'gtpo_sepa' and is 'gtpo_hicra'",
    ]  # fmt: skip
    renderer = load_renderer("retrain/tiny")
    config = load(place / "first.toml", {"algorithm.advantage_mode": "maxrl", "algorithm.transform_mode": "gtpo_hicra", **{
        f"sepa.{key}": value for key, value in {"schedule": "linear", "delay_steps": 50, "steps": 500, "warmup_updates": 50,
        "correct_rate_gate": 0.1}.items()}}).config  # fmt: skip
    algorithm = credit.build(config, renderer)
    own = load(place / "first/config.toml").config
    for row in record["steps"]:
        stored, a_P = credited(place / "first", own, row["step"], renderer.decode)
        b_P = credit.credit_step(stored.groups_P, algorithm, 0.0)
        pairs = [
            (x[r.sampled_T], y[r.sampled_T], m[r.sampled_T])
            for a, b in zip(a_P, b_P, strict=True)
            if not a.skipped
            for r, x, y, m in zip(
                a.scored.rollouts_G, a.advantages_G_T, b.advantages_G_T, b.planning_G_T, strict=True
            )
        ]
        x, y, planning = (np.concatenate(arrays).astype(float) for arrays in zip(*pairs, strict=True))
        assert row["tokens"] == len(x)
        assert row["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
        assert row["sign_changed"] == np.mean(np.sign(x) != np.sign(y))
        for name, values in (("own", x), ("other", y)):
            assert row[f"{name}_planning"] == pytest.approx(np.abs(values[planning == 1]).mean())
            assert row[f"{name}_execution"] == pytest.approx(np.abs(values[planning == 0]).mean())
        assert row["reproduced"]
        assert row["other_lambda"] == 0
        if row["step"] == record["largest"][0]["step"]:
            gap = abs(record["largest"][0]["other"] - record["largest"][0]["own"])
            assert gap == pytest.approx(np.abs(y - x).max())
    assert record["total"]["tokens"] == sum(row["tokens"] for row in record["steps"])
    assert record["largest"][0]["token"]


def test_correlations_are_those_of_a_statistics_package() -> None:
    from retrain.replay.differences import correlation, ranks

    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for _ in range(20):
        a = random.integers(-3, 4, 50) / 2
        b = a * random.normal(size=50) + random.integers(0, 2, 50)
        assert correlation(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
        assert correlation(ranks(a), ranks(b)) == pytest.approx(stats.spearmanr(a, b)[0])
    assert correlation(np.ones(3), np.arange(3.0)) is None


def test_sepas_schedule_follows_from_what_is_stored(place: Path, said: Callable[..., str]) -> None:
    """Another beta leaves lambda alone, so the schedule that is fed anew must give the run's own, from any step on."""
    record = json.loads(said("replay", "first", "--beta", "0.5", "--json"))
    own = [row["own_lambda"] for row in record["steps"]]
    assert len({*own}) == 4  # closed gate, then a lambda that moves
    assert [row["other_lambda"] for row in record["steps"]] == own
    (row,) = json.loads(said("replay", "first", "--beta", "0.5", "--steps", "3", "--json"))["steps"]
    assert row["other_lambda"] == own[3]


def test_a_schedule_follows_metrics_where_rollouts_are_gone(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(place / "first", tmp_path / "run")
    (tmp_path / "run/rollouts/step_000001.npz").unlink()
    record = json.loads(said("replay", str(tmp_path / "run"), "--beta", "0.5", "--json"))
    assert [row["step"] for row in record["steps"]] == [0, 2, 3]
    assert [row["other_lambda"] for row in record["steps"]] == [row["own_lambda"] for row in record["steps"]]
    assert "rollouts of step 1" in record["notes"][0]


def test_other_planning_phrases_are_found_without_transformers(place: Path, said: Callable[..., str]) -> None:
    """The tokenizer's file alone gives the offsets of the whole tokenizer."""
    config = load(place / "first/config.toml").config
    light, whole = Words(config).renderer, load_renderer("retrain/tiny")
    for group in rollouts.read(place / "first", 0).groups_P:
        for rollout in group.rollouts_G:
            ids = rollout.token_ids_T
            assert light.offsets(ids) == whole.offsets(ids)
            assert light.decode(ids) == whole.decode(ids)
    record = json.loads(
        said("replay", "first", "--transform-mode", "gtpo_hicra", "--strategic-grams", "Ones, Tens", "--json")
    )
    assert any("strategic_grams" in line for line in record["changed"])
    own = json.loads(said("replay", "first", "--transform-mode", "gtpo_hicra", "--json"))
    assert record["total"]["other_planning"] != own["total"]["other_planning"]


def test_each_side_is_split_by_its_own_planning_marks(place: Path, said: Callable[..., str]) -> None:
    other = {"transform_mode": "gtpo_hicra", "alpha": "5", "strategic_grams": '["ones", "tens"]'}
    words = [w for key, value in other.items() for w in (f"--{key.replace('_', '-')}", value)]
    record = json.loads(said("replay", "first", *words, "--json"))
    own, renderer = load(place / "first/config.toml").config, load_renderer("retrain/tiny")
    changes = {"algorithm.transform_mode": "gtpo_hicra", "hicra.alpha": 5.0}
    now = load(place / "first.toml", changes | {"logging.strategic_grams": other["strategic_grams"]}).config
    algorithm = credit.build(now, renderer)
    sums, counts, moved = [0.0, 0.0], [0, 0], set[bool]()
    for row in record["steps"]:
        stored, a_P = credited(place / "first", own, row["step"], renderer.decode)
        for a, b in zip(a_P, credit.credit_step(stored.groups_P, algorithm, 0.0), strict=True):
            for i, rollout in enumerate(a.scored.rollouts_G if not a.skipped else ()):
                marks_T = b.planning_G_T[i][rollout.sampled_T]
                moved |= {*(marks_T > a.planning_G_T[i][rollout.sampled_T]).tolist()}
                for k, m in enumerate((marks_T, ~marks_T)):
                    sums[k] += float(np.abs(b.advantages_G_T[i][rollout.sampled_T][m]).sum())
                    counts[k] += int(m.sum())
    assert True in moved  # planning on the other side only
    total = record["total"]
    assert total["other_planning"] == pytest.approx(sums[0] / counts[0])
    assert total["other_execution"] == pytest.approx(sums[1] / counts[1])
    assert any(d["other_planning"] and not d["own_planning"] for d in record["largest"])
    assert ", execution > planning" in said("replay", "first", *words)


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["--hicra-alpha", "0.9"], "hicra.alpha does nothing with algorithm.transform_mode"),
        (["--transform-mode", "none", "--beta", "0.9"], "gtpo.beta does nothing with algorithm.transform_mode"),
        (["--learner", "--steps", "0", "--alpha", "0.9"], "hicra.alpha does nothing with algorithm.transform_mode"),
    ],
)
def test_flags_that_do_nothing_are_announced(said: Callable[..., str], words: list[str], note: str) -> None:
    notes = [line for line in said("replay", "first", *words).splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert note in notes[0]
    assert notes[0].removeprefix("note: ").startswith(words[-2] + ": ")
    assert "note: " not in said("replay", "first", "--beta", "0.9")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "9"], "no rollouts of step 9"),
        (["--steps", "1-2"], "no range of steps"),
        (["--steps", ".."], "no range of steps"),
        (["--lr", "1"], "does nothing in retrain replay"),
        (["--truncated", "soft"], "part of the stored rewards"),
        (["--learner", "--beta", "0.3"], "other settings of credit"),
        (["--transform-mode", "nope"], "nope"),
    ],
)
def test_what_cannot_be_replayed_is_said_in_a_line(
    said: Callable[..., str], words: list[str], message: str
) -> None:
    text = said("replay", "first", *words, status=2)
    assert message in text
    assert "Traceback" not in text


def test_a_plug_ins_uncertainty_is_stored_and_the_plug_in_not_needed(
    tmp_path: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugins").mkdir()
    plugin = tmp_path / "plugins/replayed_uncertainty.py"
    plugin.write_text(
        "import numpy as np\n\ndef mine(rollout):\n"
        "    return np.where(rollout.sampled_T, 0.5 + len(rollout.text) % 7, np.nan).astype(np.float32)\n"
    )
    monkeypatch.chdir(tmp_path)
    algorithm = {"uncertainty_kind": "replayed_uncertainty:mine", "transform_mode": "gtpo"}
    path = write(tmp_path, "run", algorithm=algorithm, training={"max_steps": 1})
    path.write_text(
        path.read_text().partition("[sepa]")[0] + "[training]" + path.read_text().partition("[training]")[2]
    )
    execute(load(path), plain=True)
    plugin.unlink()
    sys.modules.pop("replayed_uncertainty")
    run = RunRecord.at(tmp_path / "run")
    assert rollouts.read(run.path, 0).uncertainty_P_G_T is not None
    before, _ = settings(run, [])
    stored, groups_P = credited(run.path, before, 0, lambda ids: "")
    assert rollouts.digest_of(groups_P) == stored.credit_digest


def test_equal_runs_differ_nowhere(said: Callable[..., str]) -> None:
    record = json.loads(said("diff", "first", "twin", "--json"))
    assert record["settings"] == []
    # The checkout may be worked on between two runs.
    assert [fact for fact in record["facts"] if fact["about"] != "code"] == []
    parted = record["results"]["diverged"]
    assert (parted["step"], parted["identical"], parted["common"]) == (None, 6, 6)
    text = said("diff", "first", "twin")
    assert "nowhere: all 6 common rows of metrics.jsonl are identical" in text
    assert "B - A: +0.0 points" in text


def test_where_two_runs_part(place: Path, said: Callable[..., str]) -> None:
    record = json.loads(said("diff", "first", "other", "--json"))
    (setting,) = record["settings"]
    assert (setting["key"], setting["a"], setting["b"]) == ("training.lr", 0.003, 0.01)
    parted = record["results"]["diverged"]
    assert (parted["step"], parted["evaluation"], parted["identical"]) == (1, False, 2)
    rows = {
        name: [json.loads(x) for x in (place / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "other")
    }
    for key, pair in parted["values"].items():
        assert [pair["a"], pair["b"]] == [rows[n][2][key] for n in ("first", "other")]
    last = [rows[n][-1] for n in ("first", "other")]
    (entry,) = record["results"]["evaluations"]
    assert [entry[s]["accuracy"] for s in "ab"] == [row["eval/accuracy"] for row in last]
    gap = entry["difference"]
    assert gap["value"] == last[1]["eval/accuracy"] - last[0]["eval/accuracy"]
    widest = max(row["eval/accuracy_high"] - row["eval/accuracy_low"] for row in last)
    assert widest < gap["high"] - gap["low"] < 2 * widest
    text = said("diff", "first", "other")
    assert "step 1 is the first that differs; everything before it is identical" in text
    assert "One run each: whatever differs here may be the seed." in text


def test_accuracies_on_different_tasks_are_not_compared(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "other", run)
    facts = json.loads((run / "run.json").read_text())
    facts["facts"]["eval_tasks"] = "f" * 64
    (run / "run.json").write_text(json.dumps(facts))
    record = json.loads(said("diff", "first", str(run), "--json"))
    assert record["results"]["evaluations"][0]["difference"] is None
    assert any("different tasks" in note for note in record["notes"])
    assert [f["what"] for f in record["facts"] if f["about"] == "data"] == ["evaluation tasks"]


def test_accuracies_are_compared_after_the_same_number_of_steps(
    place: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "other", run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (r for r in rows if "eval/accuracy" in r)
    assert (first["step"], last["step"]) == (0, 4)
    rows.remove(last)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    record = json.loads(said("diff", "first", str(run), "--json"))
    (entry,) = record["results"]["evaluations"]
    assert [entry[s]["step"] for s in "ab"] == [4, 0]
    assert [entry["common"][s]["step"] for s in "ab"] == [0, 0]
    assert entry["difference"]["value"] == 0.0  # nothing was trained yet
    text = said("diff", "first", str(run))
    assert "B - A after 0 steps: +0.0 points" in text
    assert "last evaluated after 4 and 0 steps: compared are those after 0" in text
    first["step"] = 3
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    record = json.loads(said("diff", "first", str(run), "--json"))
    (entry,) = record["results"]["evaluations"]
    assert (entry["common"], entry["difference"]) == (None, None)
    assert any("no step is common" in note for note in record["notes"])


def test_other_training_tasks_are_seen(tmp_path: Path, said: Callable[..., str]) -> None:
    """Two runs of one path whose file was changed between them, and an older run, which did not record it."""
    for name, answer in (("a", "7"), ("b", "8")):
        (tmp_path / "tasks.jsonl").write_text(json.dumps({"question": "3+4", "answer": answer}) + "\n")
        data = {"source": "jsonl", "path": str(tmp_path / "tasks.jsonl")}
        path = write(tmp_path, name, data=data, training={"max_steps": 1, "batch_size": 1})
        path.write_text(path.read_text().partition("[eval]")[0] + f'[logging]\nlog_dir = "{tmp_path / name}"\n')
        execute(load(path), plain=True)
    record = json.loads(said("diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"))
    assert record["settings"] == []
    assert [f["what"] for f in record["facts"] if f["about"] == "data"] == ["training tasks"]
    facts = RunRecord.at(tmp_path / "a").facts["facts"]
    older = {key: value for key, value in facts.items() if key != "train_tasks"}
    assert inexact_because(load(tmp_path / "a/config.toml").config, older, facts, 0) == []


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("metrics.jsonl", lambda text: text + '{"step": "x"}\n', "a row has step = 'x'"),
        ("metrics.jsonl", lambda text: text + "{}\n", "a row has step = None"),
        ("metrics.jsonl", lambda text: text.replace('"correct_rate":', '"correct_rate": "x", "y":'), "correct_rate = 'x'"),
        ("run.json", lambda text: '{"facts": 3}', "its facts are 3"),
    ],
)
def test_damaged_files_are_named_in_a_line(
    place: Path, said: Callable[..., str], tmp_path: Path, name: str, damage: Callable[[str], str], message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "first", run)
    (run / name).write_text(damage((run / name).read_text()))
    for words in (["diff", "other", str(run)], ["diff", str(tmp_path), "other"], ["why", str(run), "last"], ["replay", str(run)]):
        text = said(*words, status=2)
        assert f"{run / name} is damaged: " in text
        assert message in text
        assert len(text.splitlines()) == 1


def test_damage_in_what_why_could_do_without(place: Path, said: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "first", run)
    shutil.rmtree(run / "rollouts")
    (run / "emergence/steps.jsonl").write_text('{"step": 1, "tasks": [{"task": 3}]}\n')
    (run / "emergence/generations.jsonl").write_text('{"step": 1, "credit": {"advantages": [1.0]}}\n')
    record = json.loads(said("why", str(run), "1", "--json"))
    assert (record["groups"], record["tokens"]) == ([], [])
    assert ["is damaged where it is about this step" in text for text in record["missing"]] == [True, True]


def test_settings_that_a_plug_in_ignores_do_not_differ(
    tmp_path: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/diffed_transform.py").write_text(
        "def plain(group, advantages_G_T, context):\n    return advantages_G_T\n\n"
        "def timed(group, advantages_G_T, context):\n    return advantages_G_T\n\ntimed.uses_sepa = True\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, keys in (("plain", []), ("timed", ["sepa.steps"]), ("gone", ["sepa.steps"])):
        for side, steps in (("a", 20), ("b", 30)):
            algorithm = {"transform_mode": f"diffed_transform:{name}"}
            write(tmp_path, f"{name}_{side}", algorithm=algorithm, sepa={"steps": steps})
        record = json.loads(said("diff", f"{name}_a.toml", f"{name}_b.toml", "--json"))
        assert [s["key"] for s in record["settings"]] == keys


def test_files_and_folders_can_be_compared(place: Path, said: Callable[..., str]) -> None:
    record = json.loads(said("diff", "first.toml", "other.toml", "--json"))
    (setting,) = record["settings"]
    assert setting["key"] == "training.lr"
    line = 1 + (place / "first.toml").read_text().splitlines().index("lr = 0.003")
    assert setting["a_origin"].endswith(f"first.toml:{line}")
    assert record["results"] is None
    record = json.loads(said("diff", "first.toml", "first", "--json"))
    assert record["settings"] == []
    record = json.loads(said("diff", ".", "first", "--json"))
    assert [s["key"] for s in record["settings"]] == ["training.lr"]
    assert [len(side["runs"]) for side in record["runs"]] == [3, 1]
    assert record["runs"][0]["conditions"]["grpo+gtpo_sepa"]["runs"] == 3
    assert "No verdict" in said("diff", ".", "first")


def test_a_step_is_explained(place: Path, said: Callable[..., str]) -> None:
    record = json.loads(said("why", "first", "2", "--json"))
    rows = [json.loads(line) for line in (place / "first/metrics.jsonl").read_text().splitlines()]
    row = next(r for r in rows if r["step"] == 2 and "loss" in r)
    tasks = [json.loads(line) for line in (place / "first/emergence/steps.jsonl").read_text().splitlines()]
    assert record["groups"] == tasks[2]["tasks"]
    assert record["update"]["loss"] == row["loss"]
    assert record["checkpoints"] == {"before": 2, "after": 4}
    assert record["missing"] == []
    config = load(place / "first/config.toml").config
    _, groups_P = credited(place / "first", config, 2, lambda ids: "")
    largest = max(float(np.abs(a_T).max()) for g in groups_P for a_T in g.advantages_G_T)
    assert abs(record["tokens"][0]["advantage"]) == largest
    sizes = [abs(t["advantage"]) for t in record["tokens"]]
    assert sizes == sorted(sizes, reverse=True)
    text = said("why", "first", "2")
    trained = sum(t["outcome"] == "trained" for t in tasks[2]["tasks"])
    assert f"Groups: {trained} of 3 trained" in text
    assert "before it after 2 steps, where this one begins; after it after 4 steps" in text
    assert said("why", "first", "last") == said("why", "first", "3")


def test_what_a_run_did_not_keep_is_said(place: Path, said: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "first", run)
    whole = json.loads(said("why", str(run), "1", "--json"))
    (run / "rollouts/step_000001.npz").unlink()
    record = json.loads(said("why", str(run), "1", "--json"))
    assert (whole["tokens_from"], record["tokens_from"]) == ("rollouts", "generations")
    assert "no rollouts of step 1. The tokens are those of the 3 rollouts" in record["missing"][0]
    by_member = {(t["task"], t["member"]): t for t in whole["tokens"]}
    for token in record["tokens"]:
        known = by_member.get((token["task"], token["member"]))
        if known:
            assert token["advantage"] == pytest.approx(known["advantage"], rel=1e-5)
            assert (token["token"], token["position"]) == (known["token"], known["position"])
    (run / "emergence/generations.jsonl").write_text("")
    (run / "emergence/steps.jsonl").write_text("")
    record = json.loads(said("why", str(run), "1", "--json"))
    assert (record["tokens"], record["groups"], len(record["missing"])) == ([], [], 2)
    assert "missing: " in said("why", str(run), "1")
    assert "no step 7. Fix: steps are counted from 0; its last is 3." in said("why", str(run), "7", status=2)


def test_nothing_here_loads_torch_but_the_learner(place: Path) -> None:
    words = [
        ["diff", "first", "other"],
        ["why", "first", "2"],
        ["replay", "first", "--strategic-grams", "Ones"],
    ]
    script = (
        "import sys\nfrom retrain.cli.main import main\n"
        f"assert [main(w) for w in {words!r}] == [0, 0, 0]\n"
        "found = {'torch', 'transformers', 'peft'} & set(sys.modules)\nassert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_reads_its_own_steps_while_it_goes_on(place: Path, tmp_path: Path) -> None:
    """A step's file is there whole or not at all."""
    stop, wrong = threading.Event(), list[str]()
    path = place / "first"

    def reader() -> None:
        while not stop.is_set():
            for step in rollouts.stored_steps(tmp_path):
                try:
                    rollouts.read(tmp_path, step)
                except UsageError as error:
                    wrong.append(str(error))

    thread = threading.Thread(target=reader)
    thread.start()
    store = rollouts.RolloutStore(tmp_path)
    config = load(path / "config.toml").config
    _, groups_P = credited(path, config, 0, lambda ids: "")
    for _ in range(30):
        store.write(0, groups_P)
    stop.set()
    thread.join()
    assert wrong == []


def test_gradients_with_every_term_of_the_loss_come_back(tmp_path: Path, said: Callable[..., str]) -> None:
    """What else enters a batch: groups without a signal, masked rollouts, dropout, a fixed denominator, two updates."""
    path = write(
        tmp_path, "run",
        loss={"kind": "ppo", "kl": 0.1, "entropy": 0.01, "agg": "fixed"},
        lora={"dropout": 0.1},
        training={
            "max_steps": 2, "save_every": 1, "updates_per_batch": 2, "truncated": "mask", "max_tokens": 30, "min_signal": 0.9,
            "max_oversample": 2.0,
        },
    )  # fmt: skip
    execute(load(path), plain=True)
    record = json.loads(said("replay", str(tmp_path / "run"), "--learner", "--json"))
    assert [(g["step"], g["outcome"]) for g in record["gradients"]] == [(0, "reproduced"), (1, "reproduced")]
    groups = [s["groups"] for s in record["steps"]]
    assert max(groups) > 3  # oversampled
    assert min(s["own_trains"] for s in record["steps"]) < max(groups)  # and some without a signal
