"""The bench on a CUDA device: peaks of its order, and memory of sampler and learner apart."""

from __future__ import annotations

import json

import pytest
import torch

from retrain import peaks
from retrain.cli.main import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: scripts/gpu-tests"),
]


def test_peaks_of_the_device():
    roof, found = peaks.measure(torch.device("cuda", 0), torch.bfloat16, 8 * 10**9)
    assert found["matmul_bf16"] > found["matmul_fp32"] > 1e12
    assert roof.bandwidth > 1e11


def test_the_bench_runs_unchanged(random_model, tmp_path, monkeypatch, capsys):
    model = random_model(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64)
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(model), "--devices", "gpu:0", "--batch-size", "4", "--group-size", "4"]
    assert main(["bench", *words, "--steps", "2", "--trace", "flat:64", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["weights"]["dtype"] == "bfloat16"
    assert min(record["memory"].values()) > 0
    for name in ("sample", "learn"):
        assert 0 < record["roofline"][name]["share"] < 1.2
