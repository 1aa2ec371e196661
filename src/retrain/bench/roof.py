"""The roof over a measured step: this device's peaks, measured now, for the model of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retrain.config.schema import Config
from retrain.errors import ModelError
from retrain.roofline import Peaks, Shape


@dataclass(frozen=True, slots=True)
class DeviceRoof:
    """What a step's floor is computed from: the model's shape, this device's peaks, and bytes per number."""

    shape: Shape
    peaks: Peaks
    itemsize: int
    kv_itemsize: float
    adapter: int
    sampled_adapter: int
    """Weights of the adapter that sampling reads apart from the model's; 0 where it is merged."""
    measured: dict[str, float]


def roof_of(config: Config, policy: Any) -> DeviceRoof | None:
    """The device's peaks for this model; None where the learner is elsewhere or the model is not counted (mixtures,
    4-bit weights)."""
    if policy is None or config.model.quantization:
        return None
    from retrain import peaks

    try:
        shape = Shape.of(policy.model.config)
    except ModelError:
        return None
    itemsize = int(policy.dtype.itemsize)
    size = (shape.block_weights + shape.head_weights) * itemsize
    roof, measured = peaks.measure(policy.device, policy.dtype, size)
    adapter = int(policy.trainable)
    # In bf16 a merge would round small updates away. A CPU without units for it merges into float32 copies; one with
    # them is given the lower floor.
    merged = itemsize == 4 or policy.device.type == "cpu"
    eight_bit = config.inference.kv_cache_dtype == "fp8"
    return DeviceRoof(
        shape, roof, itemsize, kv_itemsize(shape, itemsize, eight_bit=eight_bit), adapter, 0 if merged else adapter, measured
    )  # fmt: skip


def kv_itemsize(shape: Shape, itemsize: int, *, eight_bit: bool) -> float:
    """Bytes per number of keys and values: with eight bits one, and a float32 scale for every token and head."""
    return 1 + 4 / shape.head_dim if eight_bit else itemsize
