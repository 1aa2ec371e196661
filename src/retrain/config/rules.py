"""What one setting means for another: names, what this version builds, and settings that do nothing here.

A setting that cannot act is refused where its author must have meant something else, and announced where
switching it off is ordinary.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping

from retrain.config import campaigns, names, own, squeezes
from retrain.config.fields import literal
from retrain.config.idle import findings, get, own_source, path_of, stated
from retrain.config.problems import Problem, dotted
from retrain.config.schema import Config
from retrain.config.tables import check_tables

NAMED = {
    "backend.backend": "backend",
    "inference.engine": "engine",
    "algorithm.advantage_mode": "advantage",
    "algorithm.transform_mode": "transform",
    "algorithm.algorithm_mode": "algorithm",
    "algorithm.uncertainty_kind": "uncertainty",
    "planning.detector": "detector",
    "reward.type": "reward",
    "data.source": "source",
    "eval.source": "source",
    "environment.provider": "environment",
    "loss.kind": "loss",
    "backpressure.controller": "backpressure",
    "training.truncated": "truncated",
    "training.lr_schedule": "lr_schedule",
}
"""Settings that hold a name, and the kind of name in ``names``."""

INTERNAL = {"environment": "single_turn", "reward": "routed", "sink": "console"}
"""Names that the plug-in table holds and no configuration writes."""

FIELDS = ("question", "answer", "id")
"""What a row is made of, for data.fields."""

PYTORCH_LACKS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "inference.dtype": (("fp8", "fp4"), 'it computes in bf16 or fp32; write "auto", "bf16" or "fp32".'),
    "inference.kv_cache_dtype": (("int8",), 'it caches in the model\'s format or in fp8; write "auto".'),
    "inference.attention_kernel": (("triton", "tk", "cutlass"), 'it has "default" and "flash".'),
}
"""Setting -> the choices that the engine ``pytorch`` refuses, and the fix; an engine of one's own may have them."""


def written(kind: str, key: str = "") -> list[str]:
    """The built-in names of a kind that a configuration may write, at the setting ``key`` where that matters."""
    without = (INTERNAL.get(kind), "mixture" if key == "eval.source" else None)
    return [name for name in names.BUILT[kind] if name not in without]


def check(config: Config) -> Iterator[Problem]:
    """Every finding across settings, refusals and announcements."""
    yield from _names(config)
    yield from check_tables(config)
    yield from _not_yet(config)
    yield from _combinations(config)
    yield from campaigns.check(config)
    yield from squeezes.check(config)
    yield from findings(config)


def _names(config: Config) -> Iterator[Problem]:
    for key, kind in NAMED.items():
        if get(config, key):
            yield from _name(config, key, kind, get(config, key))
    for index, tracker in enumerate(config.logging.trackers):
        yield from _name(config, "logging.trackers", "sink", tracker, index)


def _name(config: Config, key: str, kind: str, value: str, index: int | None = None) -> Iterator[Problem]:
    built = written(kind, key)
    if value in names.BUILT[kind] and value != INTERNAL.get(kind):
        return
    path = path_of(key) if index is None else (*path_of(key), index)
    shown = stated(config, key) if index is None else f"{key}: {literal(value)}"
    use = " or ".join(f"{key} = {literal(n)}" for n in built) if index is None else " or ".join(map(literal, built))
    if value in names.LATER[kind]:
        yield Problem(
            path,
            f"{shown} is not in this version.",
            f"write {use}." if built else "leave it out.",
            later=True,
        )
    elif kind in names.OPEN and ("." in value or ":" in value or value in own.installed(kind)):
        return
    elif "." in value or ":" in value:
        yield Problem(
            path, f"{shown}: a {kind} of your own is not in this version.", f"write {use}.", later=True
        )
    elif kind == "algorithm":
        yield Problem(
            path,
            f"{shown} is unknown.",
            'write the dotted path of your own, such as "my_module.my_algorithm", or use the two modes.',
        )
    else:
        near = difflib.get_close_matches(value, [*built, *names.LATER[kind]], n=1, cutoff=0.6)
        known = ", ".join(built) or "none in this version"
        yield Problem(
            path, f"{shown} is unknown.", f"did you mean {literal(near[0])}?" if near else f"known: {known}."
        )


def _not_yet(config: Config) -> Iterator[Problem]:
    """Settings whose effect a later version builds."""
    if re.fullmatch(r"\s*(gpu:\d+|cpu)(\s*,\s*(gpu:\d+|cpu))+\s*", config.backend.devices):
        yield Problem(
            ("backend", "devices"),
            f"{stated(config, 'backend.devices')}: more than one device is not in this version.",
            f"name one: {literal(config.backend.devices.split(',')[0].strip())}.",
            later=True,
        )


def _combinations(config: Config) -> Iterator[Problem]:
    devices = config.backend.devices
    if "," not in devices and not re.fullmatch(r"cpu|gpu:\d{1,3}", devices):
        near = {"cuda": "gpu:0", "gpu": "gpu:0", "mps": "cpu", "auto": "gpu:0"}.get(
            devices.partition(":")[0].lower(), "cpu"
        )
        near = (
            devices.lower().replace("cuda", "gpu") if re.fullmatch(r"cuda:\d{1,3}", devices.lower()) else near
        )
        yield Problem(
            ("backend", "devices"),
            f"{stated(config, 'backend.devices')} is not gpu:N or cpu.",
            f"for example {literal(near)}.",
        )
    elif "," in devices and not re.fullmatch(r"\s*(gpu:\d+|cpu)(\s*,\s*(gpu:\d+|cpu))+\s*", devices):
        yield Problem(
            ("backend", "devices"),
            f"{stated(config, 'backend.devices')} is not gpu:N or cpu.",
            'for example "gpu:0".',
        )
    if config.model.trust_remote_code:
        yield Problem(
            ("model", "trust_remote_code"),
            "model.trust_remote_code = true would run code that ships with the model.",
            "set it to false and use a model that transformers supports itself.",
        )
    yield from _engine(config)
    yield from _reward(config)
    yield from _updates(config)
    if config.reward.type == "custom" and not config.reward.custom_module:
        yield Problem(
            ("reward", "type"),
            'reward.type = "custom" needs reward.custom_module.',
            'name your module, for example custom_module = "my_rewards".',
        )
    # A source of one's own has fields of its own, which only the built-in ones that read fields refuse.
    own_fields = own_source(config) and not {config.data.source, config.eval.source} & {"jsonl", "hf"}
    for name in () if own_fields else config.data.fields:
        if name not in FIELDS:
            yield Problem(
                ("data", "fields", name),
                f"data.fields.{name} is not one of our fields.",
                "use question, answer and id.",
            )
    yield from _data(config)
    low, high = config.backpressure.min_batch_size, config.backpressure.max_batch_size
    if low > high:
        yield Problem(
            ("backpressure", "min_batch_size"),
            f"backpressure.min_batch_size = {low} is above max_batch_size = {high}.",
            "set it to at most that.",
        )
    elif config.backpressure.enabled and config.backpressure.controller == "usl" and high - low < 2:
        yield Problem(
            ("backpressure", "max_batch_size"),
            f"backpressure.min_batch_size = {low} and max_batch_size = {high} leave fewer than the three sizes that a fit "
            f"takes: the batch size {f'is always {low}' if low == high else 'follows no measurement'}.",
            note=True,
        )
    if config.campaign is not None and config.backpressure.enabled:
        yield Problem(
            ("backpressure", "enabled"),
            "backpressure.enabled = true: batch sizes would follow the clock, and differ between runs that are compared.",
            'leave it out, or declare it: set "backpressure.enabled" = true in every condition that is to have it.',
        )
    if config.campaign is None and config.training.warmup_steps >= config.training.max_steps:
        yield Problem(
            ("training", "warmup_steps"),
            f"training.warmup_steps = {config.training.warmup_steps} and max_steps = "
            f"{config.training.max_steps}: the learning rate reaches lr in the last step or never.",
            note=True,
        )


def _engine(config: Config) -> Iterator[Problem]:
    inference = config.inference
    if config.algorithm.uncertainty_kind == "shannon_entropy" and inference.engine in names.LATER["engine"]:
        yield Problem(
            ("algorithm", "uncertainty_kind"),
            'algorithm.uncertainty_kind = "shannon_entropy" needs the whole distribution of every token, '
            "which only the in-process engine has.",
            'write inference.engine = "pytorch", or uncertainty_kind = "surprisal".',
            because="inference.engine",
        )
    if inference.engine != "pytorch":
        return
    for key, (values, fix) in PYTORCH_LACKS.items():
        if get(config, key) in values:
            yield Problem(
                path_of(key),
                f'{stated(config, key)} does not work with inference.engine = "pytorch".',
                fix,
                because="inference.engine",
            )
    if inference.attention_kernel == "flash" and config.backend.devices == "cpu":
        yield Problem(
            ("inference", "attention_kernel"),
            'inference.attention_kernel = "flash" needs CUDA, and backend.devices = "cpu".',
            'write attention_kernel = "default".',
            because="backend.devices",
        )


def _reward(config: Config) -> Iterator[Problem]:
    reward, training = config.reward, config.training
    if reward.type == "composite" and not reward.parts:
        yield Problem(
            ("reward", "type"),
            'reward.type = "composite" needs reward.parts.',
            'add a table per part: [[reward.parts]] with type = "math" and weight = 1.0.',
        )
    generated = "reasoning_gym" in (
        config.data.source,
        config.eval.source,
        *(table.get("source") for table in (*config.data.mixture, *config.eval.suites)),
    )
    if reward.type == "reasoning_gym" and not generated:
        yield Problem(
            ("reward", "type"),
            'reward.type = "reasoning_gym" scores tasks of the source reasoning_gym only.',
            'write data.source = "reasoning_gym", or reward.type = "math".',
        )
    if config.data.source == "reasoning_gym" and reward.type in ("match", "math"):
        yield Problem(
            ("reward", "type"),
            f"{stated(config, 'reward.type')}: many reasoning_gym tasks have several right answers, which only "
            'reward.type = "reasoning_gym" knows.',
            note=True,
        )
    if training.truncated == "soft":
        if config.algorithm.advantage_mode == "maxrl" and not config.algorithm.algorithm_mode:
            yield Problem(
                ("training", "truncated"),
                'training.truncated = "soft" takes rewards below 0, and advantage_mode = "maxrl" needs them in [0, 1].',
                'write algorithm.advantage_mode = "grpo", or truncated = "mask".',
                because="algorithm.advantage_mode",
            )
        if training.soft_tokens >= training.max_tokens:
            yield Problem(
                ("training", "soft_tokens"),
                f"training.soft_tokens = {training.soft_tokens} leaves nothing of max_tokens = {training.max_tokens}.",
                "set it lower; 0 is a fifth of max_tokens.",
            )


def _updates(config: Config) -> Iterator[Problem]:
    """What repeated updates, clipping and the terms of the loss mean for each other."""
    loss, updates = config.loss, config.training.updates_per_batch
    if loss.dual_clip and loss.kind == "ppo" and loss.dual_clip <= 1:
        yield Problem(
            ("loss", "dual_clip"),
            f"loss.dual_clip = {loss.dual_clip:g} must be above 1: it bounds the ratio of tokens with negative advantage.",
            "3 is usual; 0 turns it off.",
        )
    if loss.kind in ("ppo", "gspo", "cispo") and updates == 1:
        yield Problem(
            ("loss", "kind"),
            f"loss.kind = {literal(loss.kind)} clips nothing with training.updates_per_batch = 1: the ratio of the only "
            "update is 1.",
            because="training.updates_per_batch",
            note=True,
        )
    if loss.kind == "importance_sampling" and updates > 1 and loss.tis_cap == 0:
        yield Problem(
            ("training", "updates_per_batch"),
            f"training.updates_per_batch = {updates} with loss.kind = \"importance_sampling\": nothing bounds the ratio of "
            "the later updates; ppo, gspo and cispo clip it, loss.tis_cap caps it.",
            because="loss.kind",
            note=True,
        )
    first = updates == 1 or loss.kind != "importance_sampling"
    if loss.tis_cap and config.inference.engine == "pytorch" and first:
        yield Problem(
            ("loss", "tis_cap"),
            "loss.tis_cap caps nothing with the in-process engine: it compares the learner before the update with the "
            "sampler, which agree here.",
            because="inference.engine",
            note=True,
        )
    if loss.kl and loss.kl_kind == "k1":
        yield Problem(
            ("loss", "kl_kind"),
            'loss.kl_kind = "k1": as a term of the loss its gradient is zero on average, so it does not hold the policy; '
            "k2 has the gradient of the KL divergence.",
            note=True,
        )
    if config.model.quantization and config.backend.devices == "cpu":
        yield Problem(
            ("model", "quantization"),
            f'{stated(config, "model.quantization")} needs CUDA: on the CPU its 4-bit kernels are slower than the whole '
            "model, and are not tested.",
            'leave it empty, or write backend.devices = "gpu:0".',
            because="backend.devices",
        )
    if config.model.quantization and config.inference.dtype == "fp32":
        yield Problem(
            ("model", "quantization"),
            f'{stated(config, "model.quantization")} computes in bf16, and inference.dtype = "fp32".',
            'write inference.dtype = "bf16", or leave quantization empty.',
            because="inference.dtype",
        )
    if config.lora.dropout:
        yield Problem(
            ("lora", "dropout"),
            f"lora.dropout = {config.lora.dropout:g}: the learner drops adapter inputs that the sampler kept, so the loss's "
            "ratio is noisy; ratio_mean and ratio_max are measured with dropout off.",
            note=True,
        )


def _data(config: Config) -> Iterator[Problem]:
    data, held_out = config.data, config.eval
    if data.source == "jsonl" and not data.path:
        yield Problem(
            ("data", "source"),
            'data.source = "jsonl" needs data.path.',
            'name the file, for example path = "problems.jsonl".',
        )
    path = held_out.path or (data.path if held_out.source == data.source else "")
    if held_out.source == "jsonl" and not path:
        yield Problem(
            ("eval", "source"),
            'eval.source = "jsonl" needs eval.path.',
            'name the file, for example path = "held-out.jsonl".',
        )
    if data.source == "hf" and not data.path:
        yield Problem(
            ("data", "source"),
            'data.source = "hf" needs data.path.',
            'name the data set, for example path = "openai/gsm8k".',
        )
    if data.source == "mixture" and not data.mixture:
        yield Problem(
            ("data", "source"),
            'data.source = "mixture" needs data.mixture.',
            'add a table per source: [[data.mixture]] with source = "gsm8k" and weight = 1.0.',
        )
    for place, source in [
        *((("data", "mixture", i, "source"), t.get("source")) for i, t in enumerate(data.mixture)),
        *((("eval", "suites", i, "source"), t.get("source")) for i, t in enumerate(held_out.suites)),
        (("eval", "source"), held_out.source),
    ]:
        if source == "mixture":
            yield Problem(place, f"{dotted(place)} cannot be a mixture itself.", "name its sources one by one.")
    shared = held_out.source == data.source and path == data.path
    if shared and (held_out.split == data.split or path.endswith(".jsonl")):
        yield Problem(
            ("eval", "source"),
            "the evaluation uses the training tasks, so its accuracy is not a held-out one.",
            note=True,
        )
