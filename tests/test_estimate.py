"""The estimate against what it stands for: the real plan, the real adapter, real spellings of real cards."""

from __future__ import annotations

import json

import pytest

from retrain import cards, estimate, preflight, runner
from retrain.config.load import Override, load
from retrain.errors import ConfigError, ModelError, UsageError
from retrain.memory import MemoryPlan, class_of
from retrain.tracking import layout


def cpu(gigabytes=16):
    return cards.Device("CPU", "cpu", gigabytes * 2**30, 0.0, 100e9, 10e9, True)


@pytest.mark.parametrize("rank", [4, 16])
def test_plan_parameters_and_adapter_are_those_of_the_loaded_model(make_config, random_model, rank):
    from retrain.models import load_policy

    folder = str(random_model(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32))
    config = make_config(model={"model": folder, "lora_rank": rank})
    policy = load_policy(config, seed=1)
    made = estimate.estimate(config, estimate.model_of(config), cpu(), prompt=30)
    assert made.trainable == policy.trainable
    assert made.model.parameters == policy.parameters_total
    longest = 30 + config.training.max_tokens
    real = MemoryPlan.for_model(
        policy.model.config, policy.device, policy.dtype, policy.parameters_total, longest
    )
    assert made.plan == real


def test_the_cache_is_the_one_that_the_engine_held(make_config, tmp_path):
    """A full batch of full-length answers: the engine's own count of its cache."""
    from retrain.training.build import build
    from retrain.training.probe import _without_traces
    from retrain.training.rollout import RewardErrors, collect

    # So hot that most answers go on to max_tokens.
    config = _without_traces(
        make_config(training={"max_tokens": 64, "batch_size": 4, "group_size": 8, "temperature": 10.0})
    )
    with build(config, tmp_path, clear=False, plain=True, check=lambda *_: None) as parts:
        parts.engine.load(parts.backend.publish())
        got = collect(
            parts.events, parts.tasks.take(4), 8, parts.environment, parts.reward, parts.engine, parts.sampling,
            seed=1, step=0, deadline_s=60, errors=RewardErrors(1.0),
        )  # fmt: skip
        held = parts.engine.kv_peak
    prompt = max(len(r.token_ids_T) - r.num_sampled for g in got.groups_P for r in g.rollouts_G)
    made = estimate.estimate(config, estimate.model_of(config), cpu(), prompt=prompt)
    assert 0.5 * made.memory.sampling["KV cache"] <= held <= made.memory.sampling["KV cache"]


def test_every_part_grows_with_what_it_is_made_of(make_config):
    def parts(**training):
        config = make_config(training=training)
        memory = estimate.estimate(config, estimate.model_of(config), cpu()).memory
        return {**memory.kept, **memory.sampling, **memory.learning}

    small, long, wide = parts(), parts(max_tokens=128), parts(batch_size=8)
    assert long["KV cache"] > small["KV cache"]
    assert wide["KV cache"] == 2 * small["KV cache"]
    assert wide["activations"] > small["activations"]
    assert wide["weights"] == small["weights"]
    ranks = [estimate.estimate(c, estimate.model_of(c), cpu()).memory.kept for c in (
        make_config(model={"lora_rank": r}) for r in (8, 16)
    )]  # fmt: skip
    assert 2 * ranks[0]["optimizer"] == ranks[1]["optimizer"]


@pytest.mark.parametrize(
    ("every", "steps", "times"), [(0, 10, 2), (5, 10, 3), (4, 10, 4), (10, 10, 2), (20, 10, 2), (1, 3, 4)]
)
def test_evaluations_are_counted_as_the_loop_does(make_config, every, steps, times):
    config = make_config(training={"max_steps": steps}, eval={"source": "arithmetic", "every": every})
    assert estimate.evaluations_of(config) == times
    assert estimate.evaluations_of(make_config(training={"max_steps": steps})) == 0


def test_a_faster_card_is_faster_and_longer_answers_take_longer(make_config):
    config = make_config(
        model={"model": "Qwen/Qwen3-4B"}, backend={"devices": "gpu:0"}, training={"max_tokens": 512}
    )
    model = estimate.model_of(config)

    def step(name, **more):
        return estimate.estimate(config, model, cards.card(name), **more).step_seconds

    assert step("H100").high < step("A100 80GB").high < step("L4").high
    short, long = (step("H100", lengths=estimate.Interval(n, n)) for n in (100, 400))
    assert short.low < long.low
    assert 0 < step("H100").low < step("H100").high


@pytest.mark.parametrize(
    ("driver", "gib", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", 40, "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", 80, "H100"),
        ("NVIDIA H100 PCIe", 80, "H100 PCIe"),
        ("NVIDIA H200", 140, "H200"),
        ("NVIDIA A10", 22.5, "A10"),
        ("NVIDIA L4", 22.5, "L4"),
        ("NVIDIA L40S", 45, "L40S"),
        ("NVIDIA L40", 45, "L40"),
        ("NVIDIA A10G", 22.5, "A10G"),
        ("NVIDIA H100 NVL", 93.6, "H100 NVL"),
        ("NVIDIA H200 NVL", 140.4, "H200 NVL"),
        ("NVIDIA GeForce RTX 4090 D", 24, "RTX 4090 D"),
        ("NVIDIA GeForce RTX 3090 Ti", 24, "RTX 3090 Ti"),
        ("NVIDIA RTX 6000 Ada Generation", 48, "RTX 6000 Ada"),
        ("Tesla T4", 15, None),
    ],
)
def test_cards_are_known_by_what_drivers_call_them(driver, gib, name):
    found = cards.of_driver(driver, int(gib * 2**30))
    assert (found and found.name) == name


def test_cards_are_found_however_they_are_spelt():
    for name in ("4090", "rtx4090", "NVIDIA GeForce RTX 4090"):
        assert cards.find(name).name == "RTX 4090"
    for name, found in (("a100", "A100 80GB"), ("h100 80gb", "H100"), ("L40", "L40"), ("l4 24GB", "L4")):
        assert cards.find(name).name == found
    with pytest.raises(UsageError, match="did you mean H200"):
        cards.find("H20O")


@pytest.mark.parametrize(
    ("name", "driver_mib", "torch_gib", "gigabytes"),
    [
        ("RTX 3090", 24576, 23.69, 24),
        ("RTX 3090 Ti", 24564, 23.69, 24),
        ("RTX 4090", 24564, 23.51, 24),
        ("RTX 4090 D", 24564, 23.52, 24),
        ("RTX 5090", 32607, 31.36, 32),
        ("RTX A6000", 49140, 47.53, 48),
        ("RTX 6000 Ada", 49140, 47.50, 48),
        ("A10", 23028, 22.06, 22),
        ("A10G", 23028, 22.19, 22),
        ("L4", 23034, 22.03, 22),
        ("L40", 46068, 44.39, 44),
        ("L40S", 46068, 44.53, 44),
        ("A100 40GB", 40960, 39.39, 40),
        ("A100 80GB", 81920, 79.14, 80),
        ("H100", 81559, 79.10, 80),
        ("H100 PCIe", 81559, 79.11, 80),
        ("H100 NVL", 95830, 93.00, 96),
        ("H200", 143771, 139.81, 141),
        ("H200 NVL", 143771, 139.81, 141),
        ("B200", 183359, 178.35, 178),
    ],
)
def test_the_table_the_driver_and_torch_lead_to_one_memory_class(name, driver_mib, torch_gib, gigabytes):
    sizes = (cards.card(name).bytes, driver_mib * 2**20, int(torch_gib * 2**30))
    assert [class_of(size) for size in sizes] == [gigabytes] * 3


def driver(monkeypatch, tmp_path, line):
    """A driver's tool that says this of its one card."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{line}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_a_card_under_another_name_is_said_to_be_taken_as_one_of_the_table(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, note in (
        ("NVIDIA H100 80GB HBM3", "data sheet"), ("NVIDIA H100 XYZ", "taken as H100; data sheet"),
        ("NVIDIA RTX 6000 Ada Generation", "data sheet"),
    ):  # fmt: skip
        driver(monkeypatch, tmp_path, f"{name}, {49140 if 'Ada' in name else 81559}, GPU-1")
        assert cards.present("gpu:0", speed=False).note == note


def test_a_gpu_that_only_torch_can_see_never_stops_a_run(make_config, monkeypatch, tmp_path):
    driver(monkeypatch, tmp_path, "NVIDIA H100 80GB HBM3, 81559, GPU-1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    monkeypatch.setattr(cards, "_host_bytes", lambda: 100 * 2**20)
    monkeypatch.setattr(cards, "_swap_bytes", lambda: 0)
    preflight.check_fit(make_config(backend={"devices": "gpu:0"}))
    found = cards.present("gpu:0", speed=False)
    assert (found.guessed, found.note) == (True, "gpu:0 is a part of a card, whose memory and speed are not known before a run")
    with pytest.raises(ConfigError, match="cannot fit on CPU"):
        preflight.check_fit(make_config(backend={"devices": "cpu"}))


@pytest.mark.parametrize(
    ("stated", "seen"),
    [
        ("1,0", ["1", "0"]),
        ("MIG-aa,MIG-bb", ["MIG-aa", "MIG-bb"]),
        ("MIG-GPU-11/7/0, 1", ["MIG-GPU-11/7/0", "1"]),
        ("MIG-aa,MIG-aa", ["MIG-aa"]),
        ("0,0", ["0"]),
        ("0,GPU-11aa,1", ["0", "1"]),
        # CUDA sees what stands before the first name that is none.
        ("0,-1,1", ["0"]),
        ("0,7,1", ["0"]),
        ("1,,0", ["1"]),
        ("GPU-22", ["GPU-22"]),
        ("GPU-", []),
        ("", []),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_see(monkeypatch, tmp_path, stated, seen):
    driver(monkeypatch, tmp_path, "NVIDIA H100 80GB HBM3, 81559, GPU-11aa\nNVIDIA L4, 23034, GPU-22bb")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", stated)
    assert cards.visible() == seen


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (15, 2.131), (20, 2.086)])
def test_students_quantiles(freedom, value):
    from retrain.training.probe import _t95

    assert _t95(freedom) == pytest.approx(value, abs=1e-3)


def test_a_model_is_found_in_the_local_cache(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = make_config(model={"model": "some/model"})
    with pytest.raises(ModelError, match="not on this machine"):
        estimate.model_of(config)
    place = tmp_path / "models--some--model"
    snapshot = place / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(dict(cards.MODELS["Qwen/Qwen3-4B"])))
    found = estimate.model_of(config)
    assert (found.source, found.shape.layers) == ("the local cache", 36)


def test_a_mixture_of_experts_is_not_known(make_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 8}))
    with pytest.raises(ModelError, match="mixtures of experts"):
        estimate.model_of(make_config(model={"model": str(tmp_path)}))


def test_a_run_that_cannot_fit_stops_before_its_model_loads(make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cards, "_host_bytes", lambda: 100 * 2**20)
    monkeypatch.setattr(cards, "_swap_bytes", lambda: 0)
    config = make_config(logging={"log_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="cannot fit on CPU with 100 MiB"):
        runner.execute(load(config), plain=True)
    assert not (tmp_path / "run" / layout.METRICS).exists()
    said = capsys.readouterr().out
    assert "Loading tokenizer" in said
    assert "Loading train model" not in said


def test_a_run_keeps_where_its_settings_came_from(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        '[model]\nmodel = "retrain/tiny"\nlora_rank = 4\n[backend]\ndevices = "cpu"\n[data]\nsource = "arithmetic"\n'
        f'[training]\nmax_steps = 1\nbatch_size = 2\ngroup_size = 2\nmax_tokens = 8\n[logging]\nlog_dir = "{tmp_path}/run"\n'
    )

    def origins():
        return json.loads((tmp_path / "run" / layout.RUN).read_text())["origins"]

    runner.execute(load(toml, [Override.of("training.lr", 1e-4, "--lr")]), plain=True)
    first = origins()
    assert first["model.lora_rank"] == f"{toml}:3"
    assert first["training.lr"] == "--lr"
    assert "training.seed" not in first
    again = [
        Override.of("resume.from", str(tmp_path / "run"), "--resume"),
        Override.of("training.max_steps", 2, "--max-steps"),
    ]
    runner.execute(load(tmp_path / "run" / layout.CONFIG, again), plain=True)
    assert origins() == first | {"training.max_steps": "--max-steps"}
