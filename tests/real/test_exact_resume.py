"""Exact resume with the real model, real processes and a real SIGKILL: byte for byte, for every condition."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from retrain.renderer import model_path

CONDITIONS = [
    ("grpo", "none"),
    ("maxrl", "none"),
    ("maxrl", "gtpo"),
    ("maxrl", "gtpo_hicra"),
    ("maxrl", "gtpo_sepa"),
]

REWARD = '''
import asyncio, pathlib, random, re

async def score(response, reference):
    """Right or wrong by the last box; as slow and as unordered as it likes when told so."""
    if pathlib.Path(__file__).with_name("sleepy").exists():
        await asyncio.sleep(random.Random().random() * 0.02)
    boxes = re.findall(r"\\\\boxed\\{([^{}]*)\\}", response)
    return float(bool(boxes) and boxes[-1].strip() == reference)
'''


def config(run: Path, advantage: str, transform: str, **changes):
    made = {
        "backend": {"devices": "cpu"},
        "model": {"model": "retrain/tiny", "lora_rank": 8},
        "algorithm": {"advantage_mode": advantage, "transform_mode": transform},
        "training": {
            "seed": 11,
            "max_steps": 8,
            "batch_size": 3,
            "group_size": 6,
            "max_tokens": 56,
            "temperature": 1.0,
            "lr": 2e-3,
            "warmup_steps": 2,
            "save_every": 3,
        },
        "data": {"source": "arithmetic"},
        "reward": {"type": "match"},
        "eval": {"source": "arithmetic", "split": "validation", "examples": 8, "every": 4},
        "logging": {"log_dir": str(run)},
    }
    if transform == "gtpo_sepa":
        made["sepa"] = {
            "schedule": "auto",
            "delay_steps": 1,
            "steps": 4,
            "warmup_updates": 2,
            "correct_rate_gate": 0.25,
        }
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return made


def run_jobs(tmp_path, jobs, **env):
    path = tmp_path / f"jobs-{len(list(tmp_path.glob('jobs-*')))}.json"
    path.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("resume_jobs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def timeless(run: Path) -> list[dict]:
    keep = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        keep.append({k: v for k, v in row.items() if not k.endswith("_s") and k != "tokens_per_second"})
    return keep


def prints(run: Path) -> dict[str, str]:
    """Digests of everything that must be equal to the byte."""
    newest = run / json.loads((run / "trainer_state.json").read_text())["checkpoint"]
    files = [
        *sorted(p for p in newest.rglob("*") if p.is_file() and p.name not in ("state.json", "manifest.json")),
        run / "adapter/adapter_model.safetensors", run / "emergence/steps.jsonl", run / "emergence/generations.jsonl",
        *sorted((run / "rollouts").glob("*.npz")),
    ]  # fmt: skip
    return {f.name + str(i): hashlib.sha256(f.read_bytes()).hexdigest() for i, f in enumerate(files)}


def state(run: Path) -> dict:
    """Everything in the newest state.json but the machine's facts and the byte counts, which hold timings."""
    newest = run / json.loads((run / "trainer_state.json").read_text())["checkpoint"]
    found = json.loads((newest / "state.json").read_text())
    del found["facts"], found["log"]["bytes"]
    assert found
    return found


def assert_equal_runs(a: Path, b: Path) -> None:
    assert timeless(a) == timeless(b)
    assert prints(a) == prints(b)
    assert state(a) == state(b)


@pytest.mark.slow
@pytest.mark.parametrize(("advantage", "transform"), CONDITIONS)
def test_eight_steps_equal_three_a_kill_and_the_rest(tmp_path, advantage, transform):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    resumed = {"config": config(cut, advantage, transform, resume={"from": str(cut)})}
    jobs = [
        {"config": config(whole, advantage, transform)},
        {"config": config(cut, advantage, transform), "kill_at": 3},
        {**resumed, "kill_at": 6},
        resumed,
    ]
    results = run_jobs(tmp_path, jobs)
    assert [r["status"] for r in results] == [0, -9, -9, 0], results[-1]["output"]
    assert all("byte-exact: yes" in r["output"] for r in results[2:]), results[2]["output"]
    assert_equal_runs(whole, cut)
    rows = [r for r in timeless(whole) if "condition" in r]
    assert len(rows) == 8
    assert any(r["num_datums"] for r in rows)
    if transform == "gtpo_sepa":
        gates = [r["sepa_gate_open"] for r in rows]
        assert gates[0] is False
        assert gates[-1] is True
        assert rows[-1]["sepa_lambda"] > 0
        assert state(whole)["schedule"]["var_0"] is not None


MIXTURE = {
    "source": "mixture",
    "mixture": [
        {"name": "easy", "source": "arithmetic", "levels": [1], "weight": 1.0},
        {"name": "hard", "source": "arithmetic", "levels": [2, 3], "weight": 2.0},
    ],
}
SUITES = {
    "suites": [
        {"name": "sums", "source": "arithmetic", "levels": [1], "split": "test", "examples": 6, "samples": 2},
    ]
}


def with_methods(run: Path, kind: str, **more):
    """Runs in which many methods have state at once."""
    training = {
        **config(run, "grpo", "none")["training"],
        "updates_per_batch": 2,
        "min_signal": 1.0,
        "max_oversample": 2.0,
        "lr_schedule": "cosine",
    }
    if kind == "ppo":
        return config(
            run, "reinforce_pp", "gtpo_sepa_amp",
            training={**training, "truncated": "mask"},
            loss={"kind": "ppo", "clip_high": 0.28, "dual_clip": 3.0, "kl": 0.05, "kl_kind": "k3"},
            lora={"dropout": 0.1},
            data=MIXTURE, eval=SUITES,
            sepa={"delay_steps": 1, "steps": 4, "correct_rate_gate": 0.05},
            **more,
        )  # fmt: skip
    return config(
        run, "rloo", "entropy_mask",
        training={**training, "truncated": "soft", "lr_schedule": "linear", "lr_final_share": 0.1},
        loss={"kind": "cispo", "tis_cap": 2.0, "entropy": 0.001, "kl": 0.05, "kl_kind": "k2", "agg": "fixed"},
        lora={"rslora": True},
        algorithm={"advantage_mode": "rloo", "transform_mode": "entropy_mask", "uncertainty_kind": "shannon_entropy"},
        data=MIXTURE, eval=SUITES,
        **more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "cispo"])
def test_runs_with_many_methods_resume_to_the_byte(tmp_path, kind):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    resumed = {"config": with_methods(cut, kind, resume={"from": str(cut)})}
    jobs = [
        {"config": with_methods(whole, kind)},
        {"config": with_methods(cut, kind), "kill_at": 3},
        {**resumed, "kill_at": 6},
        resumed,
    ]
    results = run_jobs(tmp_path, jobs)
    assert [r["status"] for r in results] == [0, -9, -9, 0], results[-1]["output"]
    assert all("byte-exact: yes" in r["output"] for r in results[2:]), results[2]["output"]
    assert_equal_runs(whole, cut)
    rows = [r for r in timeless(whole) if "condition" in r]
    assert len(rows) == 8
    # Everything that the test is about did act.
    assert any(r["batch_size"] > 3 for r in rows)
    assert {r["num_updates"] for r in rows} == {2}
    assert len({r["lr"] for r in rows}) >= 6
    assert all(r["kl_base"] is not None for r in rows)
    assert any(r["moved_kl"] > r["approx_kl"] for r in rows)
    assert {"sources/easy/mean_reward", "sources/hard/mean_reward"} <= set().union(*rows)
    evaluations = [r for r in timeless(whole) if "eval/accuracy" in r]
    assert evaluations
    assert all("eval/sums/accuracy" in r and "eval/sums/pass@2" in r for r in evaluations)


@pytest.mark.slow
def test_a_longer_schedule_is_no_exact_continuation(tmp_path):
    run = tmp_path / "run"
    short = config(run, "grpo", "none", eval={"source": ""})
    short["training"] |= {"max_steps": 2, "lr_schedule": "linear"}
    longer = {**short, "training": {**short["training"], "max_steps": 3}, "resume": {"from": str(run)}}
    results = run_jobs(tmp_path, [{"config": short}, {"config": longer}])
    assert [r["status"] for r in results] == [0, 0], results[-1]["output"]
    # Also when the longer part is lost, and config.toml holds the longer schedule already.
    shutil.rmtree(run / "checkpoints/step_000003")
    assert "schedule ends was 2 and is 3" in run_jobs(tmp_path, [{"config": longer}])[0]["output"]
    assert "byte-exact: no, because the step at which the learning-rate schedule ends was 2 and is 3." in results[1]["output"]


@pytest.mark.slow
def test_slow_unordered_rewards_and_another_hash_seed_change_nothing(tmp_path):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "unordered.py").write_text(REWARD)
    reward = {"type": "custom", "custom_module": "unordered", "custom_function": "score"}
    extra = {"reward": reward, "plugins": {"search_paths": [str(plugins)]}}
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    first = run_jobs(tmp_path, [{"config": config(calm, "maxrl", "gtpo_sepa", **extra)}], PYTHONHASHSEED="0")
    cut = config(wild, "maxrl", "gtpo_sepa", **extra)
    again = {**cut, "resume": {"from": str(wild)}}
    (plugins / "sleepy").touch()
    rest = run_jobs(tmp_path, [{"config": cut, "kill_at": 3}, {"config": again}], PYTHONHASHSEED="77")
    assert [r["status"] for r in (*first, *rest)] == [0, -9, 0], rest[-1]["output"]
    assert_equal_runs(calm, wild)


@pytest.mark.slow
def test_what_a_resume_reports(tmp_path):
    run = tmp_path / "run"
    short = {"max_steps": 4, "save_every": 2}
    base = config(
        run,
        "grpo",
        "none",
        training={**config(run, "grpo", "none")["training"], **short},
        eval={"source": ""},
    )
    assert run_jobs(tmp_path, [{"config": base}])[0]["status"] == 0

    def variant(name, **changes):
        copy = tmp_path / name
        shutil.copytree(run, copy)
        made = {**base, "resume": {"from": str(copy)}}
        for section, values in changes.items():
            made[section] = {**made[section], **values}
        return copy, made

    _, threads_config = variant("threads", training={"max_steps": 5})
    torn, torn_config = variant("torn")
    (torn / "checkpoints/step_000004/manifest.json").unlink()
    rotten, rotten_config = variant("rotten")
    weights = rotten / "checkpoints/step_000004/optimizer.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    gone, gone_config = variant("gone")
    shutil.rmtree(gone / "checkpoints")
    _, changed_config = variant("changed", training={"lr": 1e-2})
    _, rank_config = variant("rank", model={"lora_rank": 4})
    _, shrunk_config = variant("shrunk", training={"max_steps": 2})

    folder = tmp_path / "model"
    shutil.copytree(model_path("retrain/tiny"), folder)
    own = tmp_path / "own"
    own_config = {**base, "model": {"model": str(folder), "lora_rank": 8}, "logging": {"log_dir": str(own)}}
    assert run_jobs(tmp_path, [{"config": own_config}])[0]["status"] == 0
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, folder / "model.safetensors", {"format": "pt"})
    swapped_config = {**own_config, "resume": {"from": str(own)}}

    results = run_jobs(
        tmp_path,
        [
            {"config": threads_config, "threads": 2}, {"config": torn_config}, {"config": rotten_config}, {"config": gone_config},
            {"config": changed_config}, {"config": rank_config}, {"config": shrunk_config}, {"config": swapped_config},
        ],
    )  # fmt: skip
    said = [r["output"] for r in results]
    assert "byte-exact: no, because the thread count was 1 and is 2." in said[0]
    for text, run_dir in ((said[1], torn), (said[2], rotten)):
        assert "step_000004 is damaged" in text
        assert "Resuming" in text
        assert "after 2 steps from step_000002" in text
        assert_equal_runs(run, run_dir)
    assert [r["status"] for r in results] == [0, 0, 0, 2, 2, 2, 2, 2]
    assert "no intact checkpoint" in said[3]
    assert "training.lr was 0.002 and is 0.01" in said[4]
    assert "model.lora_rank was 8 and is 4" in said[5]
    assert "already completed 4 steps" in said[6]
    assert "the base model's weights are not those of the run" in said[7]
