"""What a run will need and cost, by arithmetic alone: memory by part and time per step, on the device that is here or on
a card of the table.

Memory follows the plan that sampler and learner themselves follow (``memory.MemoryPlan``); time is the least work of a step
(``roofline``) over the share of a device's peaks that such work has been seen to reach. No torch, and nothing is loaded
but the model's config.json. Every number is an estimate but the adapter's size, which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrain import cards
from retrain.cards import Device
from retrain.config.schema import Config
from retrain.config.tables import suites
from retrain.memory import Card, Format, MemoryPlan, layer_bytes, merged_copies_fit
from retrain.roofline import Peaks, Row, Shape, decode, floor, learn, prefill

_MIB = 2**20
_CUDA_SPREAD = ((0.5, 0.7, 0.7), (2.0, 1.08, 1.35))
"""Low and high: what the runtime, sampling and learning may take of their estimates. Weights and adapter have exact sizes,
and the cache nearly so; activations depend on kernels, and the allocator leaves gaps. Not measured."""
_BASE = {"cpu": 465 * _MIB, "cuda": 800 * _MIB}
"""Python, PyTorch and transformers with what they load; on CUDA the context, the libraries' workspaces and recorded
steps. The first is measured (benches/estimate.py), the second is not."""
_TOKENIZER_ENTRY = 400
"""Bytes that a tokenizer holds per entry of its vocabulary, on the host."""
_CONTEXT = 300 * _MIB
"""What a CUDA context takes at least."""
_LOGIT_BYTES = {"cpu": 14, "cuda": 40}
"""Bytes that a draw holds per row and entry of the vocabulary: several numbers where all rows are drawn at once."""
_WIDE_VOCABULARY = 16_384
"""From here the CPU draws row by row."""
_TILE = {"cpu": 2**19, "cuda": 2**25}
"""Logits of one tile of the learner's head."""
_PACKED_HEAD = 2**20
"""Entries from which the CPU keeps a second, packed copy of the head."""
_SHORT = 0.2
"""Share of max_tokens that answers have at least on average, where nothing is known."""
_PROMPTS = {"arithmetic": 40, "gsm8k": 160, "math": 160}
_OTHER_PROMPT = 256


@dataclass(frozen=True, slots=True)
class Interval:
    """Low and high end."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The geometric mean of both ends: as many times above the one as below the other."""
        return (self.low * self.high) ** 0.5

    def times(self, factor: float) -> Interval:
        """Both ends scaled."""
        return Interval(self.low * factor, self.high * factor)

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)


@dataclass(frozen=True, slots=True)
class Model:
    """A model in numbers: ``shape`` of its layers, ``parameters`` in all, ``context`` positions (None: not said),
    ``generation`` as in its generation_config.json (None: not looked at), ``source`` where this is from, in words,
    ``folder`` its files where they are here."""

    name: str
    config: Any
    shape: Shape
    parameters: int
    context: int | None
    generation: Mapping[str, Any] | None
    source: str
    folder: Path | None = None


def model_of(config: Config, beside: Path | None = None) -> Model:
    """The model that the configuration names; ModelError where its shape is not known here."""
    files = cards.look_up(config.model.model, config.model.revision, beside)
    shape = Shape.of(files.config)
    norms = shape.hidden * (2 * shape.layers + 1)
    kind = getattr(files.config, "model_type", "")
    if kind.startswith("qwen3"):
        norms += 2 * shape.head_dim * shape.layers
    if kind == "qwen2" or getattr(files.config, "attention_bias", False):
        norms += (shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.layers
    context = getattr(files.config, "max_position_embeddings", None)
    return Model(
        files.name, files.config, shape, shape.weights + norms, context if isinstance(context, int) else None,
        files.generation, files.source, files.folder,
    )  # fmt: skip


def peaks_of(device: Device, itemsize: int) -> Peaks | None:
    """A device's roof for weights of ``itemsize`` bytes, None where it is unknown."""
    flops = device.flops_bf16 if itemsize < 4 and device.kind == "cuda" else device.flops_fp32
    return Peaks(flops, device.bandwidth) if flops and device.bandwidth else None


def itemsize_of(config: Config, kind: str) -> int:
    """Bytes per weight in the run's number format."""
    return {"auto": 2 if kind == "cuda" else 4, "bf16": 2, "fp32": 4}.get(config.inference.dtype, 2)


def prompt_tokens(config: Config, context: int | None) -> int:
    """Tokens of a prompt as assumed where no tokenizer has been asked."""
    assumed = _PROMPTS.get(config.data.source, _OTHER_PROMPT)
    room = context - config.training.max_tokens if context else 0
    return min(assumed, room) if room > 0 else assumed


@dataclass(frozen=True, slots=True)
class Step:
    """A step's arithmetic: counts at most, with every answer at ``max_tokens`` and every group trained on."""

    tasks: int
    group: int
    prompt: int
    longest: int
    updates: int
    microbatches: int

    @property
    def rollouts(self) -> int:
        """Rollouts of a step."""
        return self.tasks * self.group

    @property
    def sampled(self) -> int:
        """Sampled tokens, at most."""
        return self.rollouts * (self.longest - self.prompt)

    @property
    def packed(self) -> int:
        """Tokens that an update computes, at most: a prompt once for its group."""
        return self.tasks * self.prompt + self.sampled


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part. ``kept`` lives through the whole run; sampling and learning take turns, so the larger counts.

    ``certain`` cannot be avoided whatever the rollouts are: a device below it cannot run this. ``low`` and ``high``
    bound the peak.
    """

    kept: dict[str, int]
    sampling: dict[str, int]
    learning: dict[str, int]
    certain: int
    low: int
    high: int

    @property
    def peak(self) -> int:
        """The expected peak, when answers reach ``max_tokens``."""
        return sum(self.kept.values()) + max(sum(self.sampling.values()), sum(self.learning.values()))


@dataclass(frozen=True, slots=True)
class Estimate:
    """Everything that arithmetic says of a configuration on a device. ``seconds`` per phase of a step and ``evaluation``
    (seconds of one) are None where the device's speed is unknown."""

    device: Device
    model: Model
    plan: MemoryPlan
    step: Step
    rows: int
    trainable: int
    memory: Memory
    seconds: dict[str, Interval] | None
    evaluation: Interval | None
    evaluations: int

    @property
    def step_seconds(self) -> Interval | None:
        """One step."""
        return None if self.seconds is None else sum(self.seconds.values(), Interval(0.0, 0.0))

    def run_seconds(self, steps: int) -> Interval | None:
        """The whole run with its evaluations."""
        step = self.step_seconds
        if step is None:
            return None
        return step.times(steps) + (self.evaluation or Interval(0.0, 0.0)).times(self.evaluations)


def estimate(
    config: Config,
    model: Model,
    device: Device,
    *,
    prompt: int = 0,
    lengths: Interval | None = None,
    trained: Interval | None = None,
) -> Estimate:
    """Memory and time of ``config`` with ``model`` on ``device``.

    ``prompt``: tokens of a prompt (0: assumed); ``lengths``: tokens of an answer on average (None: from a fifth of
    max_tokens to all); ``trained``: share of groups that train (None: from half to all).
    """
    training, shape = config.training, model.shape
    itemsize = itemsize_of(config, device.kind)
    prompt = prompt or prompt_tokens(config, model.context)
    longest = prompt + training.max_tokens
    plan = MemoryPlan.for_model(
        model.config, Card(device.kind, device.bytes), Format(itemsize), model.parameters,
        prompt + max(training.max_tokens, config.eval.max_tokens),
    )  # fmt: skip
    limit = training.microbatch_tokens or plan.microbatch_tokens
    counts = Step(training.batch_size, training.group_size, prompt, longest, training.updates_per_batch, 1)
    counts = replace(counts, microbatches=-(-counts.packed // min(limit, counts.packed)))
    fitting = config.inference.max_rows or min(plan.sample_rows, max(1, plan.kv_tokens // _rounded(longest)))
    evaluated = sum(n for n, _ in _evaluated(config))
    rows = min(fitting, max(counts.rollouts, max((n for n, _ in _evaluated(config)), default=0)))
    trainable = shape.adapter_weights(config.model.lora_rank)
    seconds = evaluation = None
    peaks = peaks_of(device, itemsize)
    if peaks is not None and not config.model.quantization:
        lengths = lengths or Interval(max(1.0, _SHORT * training.max_tokens), training.max_tokens)
        trained = trained or Interval(0.5, 1.0)
        work = _Work(config, shape, device, peaks, itemsize, trainable, fitting, plan)
        seconds = work.step(counts, lengths, trained)
        evaluation = work.sampled(counts, evaluated, 1, lengths) if evaluated else Interval(0.0, 0.0)
    return Estimate(
        device, model, plan, counts, rows, trainable,
        memory_of(config, model, device, plan, counts, rows, trainable),
        seconds, evaluation, evaluations_of(config),
    )  # fmt: skip


def _rounded(length: int) -> int:
    return -(-length // 64) * 64


def _evaluated(config: Config) -> list[tuple[int, str]]:
    """Rollouts of each held-out set in one evaluation, at most."""
    found = [(config.eval.examples * config.eval.samples, "eval")] if config.eval.source else []
    return found + [((table.examples or 256) * table.samples, table.label) for table in suites(config)]


def evaluations_of(config: Config) -> int:
    """How often the run evaluates: before the first step, every ``eval.every``, and after the last."""
    if not _evaluated(config):
        return 0
    steps, every = config.training.max_steps, config.eval.every
    return len({0, steps, *(range(0, steps, every) if every else ())})


def memory_of(
    config: Config, model: Model, device: Device, plan: MemoryPlan, step: Step, rows: int, trainable: int
) -> Memory:
    """Bytes by part; the sums are what a device must have."""
    shape, kind = model.shape, device.kind
    itemsize = itemsize_of(config, kind)
    weights = model.parameters * itemsize
    if config.model.quantization:
        # Half a byte and the scales of blocks of 64 per weight; embedding and head keep their format.
        weights = int(shape.block_weights * 0.53) + (model.parameters - shape.block_weights) * itemsize
    kept = {"weights": weights}
    merged = kind == "cpu" or itemsize == 4
    if merged and merged_copies_fit(model.parameters, Card(kind, device.bytes), Format(itemsize)):
        kept["merged weights"] = 4 * shape.block_weights
    if kind == "cpu" and itemsize < 4:
        kept["float32 head"] = 4 * shape.head_weights
    if kind == "cpu" and rows >= 5 and _PACKED_HEAD <= shape.head_weights <= device.bytes // 80:
        kept["packed head"] = 4 * shape.head_weights
    kept["adapter"] = 4 * trainable
    kept["optimizer"] = 12 * trainable  # two moments and the gradient
    kept["runtime"] = _BASE[kind]
    if kind == "cpu":
        kept["runtime"] += _TOKENIZER_ENTRY * shape.vocab
        kept["checkpoint copy"] = 12 * trainable

    eight_bit = config.inference.kv_cache_dtype == "fp8"
    number = 1 + 4 / shape.head_dim if eight_bit else itemsize
    entries = min(rows * _rounded(step.longest), max(plan.kv_tokens, _rounded(step.longest)))
    logits = _LOGIT_BYTES["cuda" if kind == "cuda" or shape.vocab < _WIDE_VOCABULARY else "cpu"]
    layer = layer_bytes(model.config, shape.kv_heads, shape.head_dim, itemsize, kind == "cuda")
    prompts = min(plan.prefill_tokens, step.tasks * step.prompt)
    sampling = {
        "KV cache": int(shape.kv_numbers * number * entries),
        "draw": rows * shape.vocab * logits,
        "prompts": int(prompts * layer),
    }
    tokens = min(config.training.microbatch_tokens or plan.microbatch_tokens, step.packed)
    tokens = max(tokens, min(step.longest, step.packed))
    across = (
        itemsize * shape.hidden * shape.layers + 2 * layer
        if plan.checkpointing
        else layer * (shape.layers + 1)
    )
    positions = min(plan.head_tokens, tokens)
    wide = 2 if config.loss.entropy else 1
    learning = {
        "activations": int(tokens * across),
        "logits": 4 * _TILE[kind] * (1 + wide) + wide * shape.hidden * (tokens * itemsize + 8 * positions),
    }
    certain = weights + 16 * trainable + (_CONTEXT if kind == "cuda" else _BASE[kind] // 2)
    made = Memory(kept, sampling, learning, certain, 0, 0)
    if kind == "cpu":
        low, high = made.peak * 0.85, made.peak * 1.15
    else:
        fixed = sum(kept.values()) - kept["runtime"]
        low, high = (
            fixed + r * kept["runtime"] + max(s * sum(sampling.values()), t * sum(learning.values()))
            for r, s, t in _CUDA_SPREAD
        )
    return replace(made, low=max(certain, int(low)), high=int(high))


@dataclass(frozen=True, slots=True)
class _Reached:
    """Shares of the roof that a phase reaches, low and high, and seconds per layer and pass on top, low and high."""

    sample: tuple[float, float]
    learn: tuple[float, float]
    passes: tuple[float, float]


_REACHED = {
    "cpu": _Reached((0.3, 1.1), (0.3, 1.1), (1e-4, 2e-3)),
    "cuda": _Reached((0.25, 0.85), (0.2, 0.65), (0.0, 1e-4)),
}
"""On the CPU measured (benches/estimate.py); on CUDA assumed: nothing was measured there."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A step's phases as time on one device."""

    config: Config
    shape: Shape
    device: Device
    peaks: Peaks
    itemsize: int
    adapter: int
    fitting: int
    plan: MemoryPlan

    def step(self, counts: Step, lengths: Interval, trained: Interval) -> dict[str, Interval]:
        """Seconds of a step by phase."""
        return {
            "sample": self.sampled(counts, counts.rollouts, counts.group, lengths),
            "learn": Interval(
                self._learned(counts, lengths.low, trained.low, 1),
                self._learned(counts, lengths.high, trained.high, 0),
            ),
            "rest": Interval(0.002, 0.05 + 2e-6 * counts.sampled + 1e-9 * self.adapter * 10),
        }

    def sampled(self, counts: Step, rollouts: int, group: int, lengths: Interval) -> Interval:
        """Seconds of sampling so many rollouts, ``group`` of them on one prompt."""
        return Interval(
            self._sampled(counts.prompt, rollouts, group, lengths.low, 1),
            self._sampled(counts.prompt, rollouts, group, lengths.high, 0),
        )

    def _sampled(self, prompt: int, rollouts: int, group: int, length: float, best: int) -> float:
        reached = _REACHED[self.device.kind]
        # Merged where products are float32, and then no work of its own.
        adapter = 0 if self.itemsize == 4 or self.device.kind == "cpu" else self.adapter
        each = max(1, round(length))
        # A burst takes as many passes as its longest answer: at best all are alike, at worst one reaches the end.
        last = each if best else max(each, self.config.training.max_tokens)
        seconds, left = 0.0, rollouts
        while left > 0:
            rows = min(self.fitting, left)
            waves = left // rows
            prompts = [prompt] * -(-rows // group)
            pieces = [
                prefill(self.shape, prompts, self.itemsize, adapter=adapter),
                *decode(
                    self.shape, [prompt] * rows, [*[each] * (rows - 1), last], self.itemsize, adapter=adapter
                ),
            ]
            passes = len(pieces) * self.shape.layers * reached.passes[1 - best]
            # The draw reads its logits about ten times.
            drawn = each * rows * self.shape.vocab * 40 / self.peaks.bandwidth * (0.5 if best else 2.0)
            seconds += waves * (floor(pieces, self.peaks).seconds / reached.sample[best] + passes + drawn)
            left -= waves * rows
        return seconds

    def _learned(self, counts: Step, length: float, trained: float, best: int) -> float:
        reached = _REACHED[self.device.kind]
        each, groups = max(1, round(length)), max(1, round(counts.tasks * trained))
        first, other = Row(counts.prompt + each, each), Row(counts.prompt + each, each, counts.prompt)
        rows = [first, *[other] * (counts.group - 1)] * groups
        work = learn(self.shape, rows, self.itemsize, adapter=self.adapter)
        # A forward pass is a third of what is trained: recomputed activations, and the base model's or the dropout's own.
        further = (
            self.plan.checkpointing
            + (self.config.loss.kl > 0) / counts.updates
            + (self.config.lora.dropout > 0)
        )
        passes = 3 * self.shape.layers * counts.microbatches * reached.passes[1 - best]
        once = floor([work], self.peaks).seconds * (1 + further / 3) / reached.learn[best] + passes
        return once * counts.updates


def that_fit(config: Config, model: Model, device: Device) -> list[str]:
    """Single changes, in words, after which ``config`` most likely fits; the gentlest first. Empty when none is enough."""
    changes: list[tuple[str, str, str, object]] = []
    if itemsize_of(config, device.kind) == 4:
        changes.append(('inference.dtype = "bf16"', "inference", "dtype", "bf16"))
    if device.kind == "cuda" and not config.model.quantization:
        changes.append(('model.quantization = "nf4"', "model", "quantization", "nf4"))
    changes += [
        (f"model.lora_rank = {rank}", "model", "lora_rank", rank)
        for rank in (64, 32, 16, 8)
        if rank < config.model.lora_rank
    ]
    found: list[str] = []
    for text, section, key, value in changes:
        changed = config.model_copy(
            update={section: getattr(config, section).model_copy(update={key: value})}
        )
        made = estimate(changed, model, replace(device, bandwidth=0.0))
        if made.memory.low <= device.bytes and not (
            found and key == "lora_rank" and "lora_rank" in found[-1]
        ):
            found.append(text)
    return found


def cards_that_fit(need: int) -> Sequence[str]:
    """Names of cards of the table with at least ``need`` bytes, smallest first."""
    fitting = sorted(
        (s for s in cards.CARDS.values() if s.bytes >= need), key=lambda s: (s.memory_gb, s.bf16)
    )
    return [s.name for s in fitting]
