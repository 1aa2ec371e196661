"""Measured peaks: that they are of this device's order, and what the memory watch tells apart."""

from __future__ import annotations

import torch

from retrain import peaks

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_peaks_are_what_a_processor_can_do():
    roof, found = peaks.measure(CPU, torch.float32, 2**20)
    assert set(found) == {"matmul_fp32", "bandwidth"}
    # One slow shared core to a large server, with room on either side.
    assert 1e9 < roof.flops == found["matmul_fp32"] < 1e14
    assert 1e8 < roof.bandwidth == found["bandwidth"] < 1e13


def test_the_roof_is_the_faster_of_the_two_types(monkeypatch):
    rates = {torch.float32: 100.0, torch.bfloat16: 10.0}
    asked = []

    def rate(device, dtype, *, hopeless=0.0):
        asked.append((dtype, hopeless))
        return rates[dtype]

    monkeypatch.setattr(peaks, "matmul_flops", rate)
    monkeypatch.setattr(peaks, "bandwidth", lambda device, size: 7.0)
    roof, found = peaks.measure(CPU, torch.bfloat16, 8)
    assert roof == peaks.Peaks(100.0, 7.0)
    assert found == {"matmul_fp32": 100.0, "matmul_bf16": 10.0, "bandwidth": 7.0}
    assert asked == [(torch.float32, 0.0), (torch.bfloat16, 50.0)]
    rates[torch.bfloat16] = 500.0
    assert peaks.measure(CPU, torch.bfloat16, 8)[0].flops == 500.0


def test_an_emulated_type_is_not_waited_for(monkeypatch):
    runs = []
    monkeypatch.setattr(peaks, "_best", lambda work, device, seconds: runs.append(work) or 1.0)
    best = peaks.matmul_flops(CPU, torch.float32)
    assert len(runs) == 3
    assert best == 2 * 1024**3
    runs.clear()
    assert peaks.matmul_flops(CPU, torch.float32, hopeless=1e15) == 2 * 512**3
    assert len(runs) == 1


def test_a_measurement_is_the_shortest_of_several_runs(monkeypatch):
    now, steps = [0.0], iter([9.0, 3.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(steps)

    assert peaks._best(work, CPU, 0.0) == 1.0  # after 9.0 to warm up: 3.0, 1.0, 2.0
    assert next(steps) == 5.0


def test_on_a_cpu_the_process_is_what_is_watched():
    watch = peaks.MemoryWatch(CPU)

    def step(x):
        return x

    assert watch.learning(step) is step
    record = watch.record()
    assert record["resident_peak"] > 5e7
    assert record["sampler_peak"] is None
    assert record["learner_peak"] is None


def test_on_cuda_the_peaks_of_sampling_and_learning_are_apart(monkeypatch):
    state = {"peak": 0, "now": 10}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(peak=state["now"]))

    def reach(peak):
        state["peak"] = max(state["peak"], peak)
        return peak

    watch = peaks.MemoryWatch(torch.device("cuda", 0))
    step = watch.learning(reach)
    for sampling, learning in ((70, 40), (60, 50), (65, 45)):
        reach(sampling)
        assert step(learning) == learning
    record = watch.record()
    assert (record["sampler_peak"], record["learner_peak"]) == (70, 50)
