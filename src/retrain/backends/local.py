"""The local learner: PyTorch forward and backward over a LoRA adapter, in microbatches whose plan depends only
on configuration and lengths. Leaves out: more than one device."""

# torch, peft and safetensors are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from retrain.adapter import write_adapter
from retrain.backends.loss import token_weights
from retrain.backends.objective import Objective, Scored, Tally, summary
from retrain.backends.packing import Packed, families, pack_rows, plan_microbatches
from retrain.config.schema import Config
from retrain.errors import ModelError, OutOfMemory, ResumeError, is_out_of_memory
from retrain.memory import MemoryPlan
from retrain.models import Policy, load_policy
from retrain.protocols import Renderer
from retrain.types import Capabilities, OptimStep, SharedWeights, StepReport, TrainBatch

log = logging.getLogger("retrain")


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What stays the same over a batch's updates: the learner's version before the first one, and by the rows of the
    microbatch the logprobs of that learner and of the base model."""

    batch: TrainBatch | None = None
    version: int = 0
    learner: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict[tuple[int, ...], torch.Tensor])
    base: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict[tuple[int, ...], torch.Tensor])


class LocalBackend:
    """Backend over a ``Policy`` in this process."""

    def __init__(self, policy: Policy, config: Config, objective: Objective | None = None) -> None:
        self.policy = policy
        self._config = config
        self._objective = objective or Objective(config.loss)
        self._fixed = _Fixed()
        self._agg = config.loss.agg
        self._microbatch_tokens = config.training.microbatch_tokens
        self._plan: MemoryPlan | None = None
        self._version = 0
        self._parameters = list(policy.adapter.values())
        self._adam = torch.optim.AdamW(self._parameters, lr=0.0, fused=True)
        self.timings = dict.fromkeys(
            ("forward", "head", "backward", "optimizer", "trained_tokens", "packed_tokens"), 0.0
        )
        """Cumulative seconds of the learner's parts, sampled tokens trained on and tokens passed forward; the backward pass
        includes what is recomputed in it."""

    @property
    def capabilities(self) -> Capabilities:
        """Everything the loop can ask for."""
        return Capabilities(loop=True, token_advantages=True, resume=True, reports_loss=True)

    def facts(self) -> dict[str, str]:
        """Device, threads, the base model's digest, and whether CUDA kernels are held to deterministic ones."""
        device = self.policy.device
        cuda = device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(device) if cuda else "cpu",
            "threads": str(torch.get_num_threads()),
            "weights": self.policy.base_digest(),
            # What the Hub resolved model.revision to; "" for a local folder.
            "model_commit": str(getattr(self.policy.model.config, "_commit_hash", None) or ""),
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "deterministic": "yes" if not cuda or torch.are_deterministic_algorithms_enabled() else "no",
        }

    def publish(self) -> SharedWeights:
        """The live policy with its version (completed updates), fingerprint and canary."""
        policy = self.policy
        return SharedWeights(self._version, policy.fingerprint(), policy, policy.canary())

    def train_step(self, batch: TrainBatch, optim: OptimStep) -> StepReport:
        """Accumulate the batch's gradient over microbatches, clip, update; a non-finite one changes nothing.

        Called again with the same batch object it is a further update of that batch: what the policy was before the
        first one is remembered where the loss needs it. OutOfMemory where the gradient does not fit.
        """
        if batch.is_empty:
            raise ValueError("train_step needs at least one row")
        ran_out, stats = "", {}
        try:
            stats = self.gradient(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        if ran_out:
            # Only here, where the traceback with all its tensors is gone.
            self._adam.zero_grad(set_to_none=True)
            self._fixed = _Fixed()
            raise OutOfMemory(
                f"memory ran out in learning ({ran_out}).",
                fix="lower training.microbatch_tokens, training.batch_size or training.max_tokens, or set "
                "backpressure.enabled = true, which finds the batch size that fits.",
            )
        loss = stats["loss"]
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        started = self._now()
        # Only of a batch's first update: later ones start from weights that no checkpoint holds.
        first = optim.hash_gradient and self._version == self._fixed.version
        fingerprint = self._gradient_hash() if first else ""
        norm = float(torch.nn.utils.get_total_norm(gradients))
        skipped = ""
        if loss is None or not math.isfinite(loss):
            skipped = f"the loss is {loss}"
        elif not math.isfinite(norm):
            skipped = f"the gradient norm is {norm}"
        clipped = not skipped and optim.grad_clip > 0 and norm > optim.grad_clip
        if not skipped:
            if clipped:
                torch._foreach_mul_(gradients, optim.grad_clip / norm)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
            for group in self._adam.param_groups:
                group.update(
                    lr=optim.lr,
                    betas=(optim.beta1, optim.beta2),
                    eps=optim.eps,
                    weight_decay=optim.weight_decay,
                )
            self._adam.step()
            self._version += 1
        self._adam.zero_grad(set_to_none=True)
        self.timings["optimizer"] += self._now() - started

        def known(name: str) -> float | None:
            value = stats[name]
            return value if value is not None and math.isfinite(value) else None

        return StepReport(
            loss=known("loss"),
            loss_is_placeholder=False,
            grad_norm=norm if math.isfinite(norm) else None,
            grad_clipped=clipped,
            ratio_mean=known("ratio_mean"),
            ratio_min=known("ratio_min"),
            ratio_max=known("ratio_max"),
            approx_kl=known("approx_kl"),
            update_skipped=skipped,
            num_microbatches=int(stats["microbatches"] or 0),
            clip_share=known("clip_share"),
            tis_capped=known("tis_capped"),
            kl_base=known("kl_base"),
            entropy=known("entropy"),
            gradient_hash=fingerprint,
        )

    def _gradient_hash(self) -> str:
        """sha256 over the adapter's gradients as float32, in the order of the parameters' names."""
        found = hashlib.sha256()
        for name, p in sorted(self.policy.adapter.items()):
            found.update(name.encode() + b"\0")
            if p.grad is not None:
                found.update(p.grad.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return found.hexdigest()

    def gradient(self, batch: TrainBatch) -> dict[str, float | None]:
        """Leave the batch's gradient in the adapter's ``.grad`` and return loss, ratios and shares."""
        self._adam.zero_grad(set_to_none=True)
        if self._fixed.batch is not batch:
            self._fixed = _Fixed(batch, self._version)
        memory = self._memory(max(len(row.token_ids_T) for row in batch.rows))
        weights = token_weights(batch, self._agg)
        losses: list[float] = []
        tallies: list[Tally] = []
        for number, (picked, trains) in enumerate(self._microbatches(batch, memory)):
            loss, tally = self._microbatch(batch, picked, weights, memory, self._noise_seed(number), trains)
            losses.append(loss)
            tallies.append(tally)
        total = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
        return {"loss": total, **summary(tallies), "microbatches": len(losses)}

    def _microbatches(self, batch: TrainBatch, memory: MemoryPlan) -> list[tuple[tuple[int, ...], bool]]:
        """Row numbers of each microbatch, and whether it has a gradient: rows without any advantage (masked ones) are only
        scored, for the ratio to the sampler, where no other term of the loss trains on them."""
        limit = self._microbatch_tokens or memory.microbatch_tokens
        rows = batch.rows
        live = list(range(len(rows)))
        if self._objective.needs_advantage:
            live = [i for i in live if rows[i].advantages_T.any()] or live
        rest = sorted(set(range(len(rows))).difference(live))
        return [
            (tuple(numbers[j] for j in picked), trains)
            for numbers, trains in ((live, True), (rest, False))
            for picked in plan_microbatches(families([rows[i] for i in numbers]), limit)
        ]

    def _now(self) -> float:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        return time.perf_counter()

    def _noise_seed(self, number: int) -> int:
        """Seed of the dropout in one microbatch of the coming update: a function of what a checkpoint holds."""
        text = f"{self._config.training.seed} {self._version} {number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def _memory(self, longest: int) -> MemoryPlan:
        if self._plan is None:
            policy = self.policy
            # The longest row that the configuration allows decides, not the longest of the first step.
            bound = max(longest, self._config.training.max_tokens)
            self._plan = MemoryPlan.for_model(
                policy.model.config, policy.device, policy.dtype, policy.parameters_total, bound
            )
            if self._plan.checkpointing:
                self.policy.recompute_activations()
        return self._plan

    def _microbatch(
        self,
        batch: TrainBatch,
        picked: tuple[int, ...],
        weights: Sequence[npt.NDArray[np.float64]],
        memory: MemoryPlan,
        noise_seed: int,
        trains: bool,
    ) -> tuple[float, Tally]:
        """Add one microbatch's gradient if it ``trains``; its share of the loss, and what to report."""
        objective, policy, fixed = self._objective, self.policy, self._fixed
        piece = pack_rows([batch.rows[i] for i in picked], [weights[i] for i in picked], policy.device)
        self.timings["trained_tokens"] += len(piece.targets_M)
        dropout = self._config.lora.dropout
        plain: torch.Tensor | None = None
        with torch.no_grad():
            if dropout:
                plain, _ = self._score(piece, batch.temperature, memory)
            if objective.needs_base and picked not in fixed.base:
                fixed.base[picked], _ = self._score(piece, batch.temperature, memory, kind="base")
        # The backward pass is inside: where activations are recomputed, the forward runs again there.
        with policy.dropout(dropout, noise_seed), torch.set_grad_enabled(trains):
            new, entropy = self._score(piece, batch.temperature, memory, entropy=objective.needs_entropy)
            plain = new.detach() if plain is None else plain
            if objective.needs_learner and picked not in fixed.learner:
                fixed.learner[picked] = plain
            loss, tally = objective(
                Scored(
                    new_N=new,
                    plain_N=plain,
                    sampler_N=piece.sampler_M,
                    advantages_N=piece.advantages_M,
                    weights_N=piece.weights_M,
                    row_N=piece.row_M,
                    learner_N=fixed.learner.get(picked),
                    base_N=fixed.base.get(picked),
                    entropy_N=entropy,
                    unmoved=self._version == fixed.version,
                )
            )
            if trains:
                started = self._now()
                loss.backward()
                self.timings["backward"] += self._now() - started
        return float(loss.detach()), tally

    def _score(
        self,
        piece: Packed,
        temperature: float,
        memory: MemoryPlan,
        *,
        kind: Literal["adapter", "base"] = "adapter",
        entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logprobs (N,) of the sampled tokens, and with ``entropy`` the policy's entropies (N,) where they were drawn."""
        policy = self.policy
        started = self._now()
        with policy.mode(kind):
            hidden = policy.forward(piece.ids_N, piece.positions_N, piece.attend)
        passed = self._now()
        states, targets = hidden.index_select(0, piece.before_M), piece.targets_M
        entropies: torch.Tensor | None = None
        if entropy:
            values, entropies = policy.selected_logprobs_and_entropies(
                states, targets, temperature, memory.head_tokens
            )
        else:
            values = policy.selected_logprobs(states, targets, temperature, memory.head_tokens)
        self.timings["forward"] += passed - started
        self.timings["head"] += self._now() - passed
        self.timings["packed_tokens"] += len(piece.ids_N)
        return values, entropies

    def save(self, directory: Path) -> None:
        """Write ``adapter/``, ``optimizer.safetensors`` and ``learner.json``; OSError when that fails."""
        self.snapshot()(directory)

    def snapshot(self) -> Callable[[Path], None]:
        """What ``save`` would write now, copied to memory: the function returned writes it, from any thread."""
        policy = self.policy

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to("cpu", copy=True).contiguous()

        adapter = {name: copied(p) for name, p in policy.adapter.items()}
        moments: dict[str, torch.Tensor] = {}
        updates = 0.0
        for name, p in policy.adapter.items():
            state = self._adam.state.get(p)
            if state:
                moments[f"{name}.exp_avg"] = copied(state["exp_avg"])
                moments[f"{name}.exp_avg_sq"] = copied(state["exp_avg_sq"])
                updates = float(state["step"])
        facts = {
            "version": self._version,
            "updates": updates,
            "memory_plan": None if self._plan is None else astuple(self._plan),
        }

        def write(directory: Path) -> None:
            from safetensors import SafetensorError
            from safetensors.torch import save_file

            try:
                write_adapter(directory / "adapter", adapter, policy.peft_config)
                save_file(moments, directory / "optimizer.safetensors")
            except SafetensorError as error:
                # Its own type for a full disk; callers know OSError.
                raise OSError(errno.EIO, str(error), str(directory)) from error
            text = json.dumps(facts, sort_keys=True) + "\n"
            (directory / "learner.json").write_text(text, encoding="utf-8")

        return write

    def restore(self, directory: Path) -> None:
        """Read what ``save`` wrote; ResumeError when the files belong to another adapter."""
        from safetensors.torch import load_file

        try:
            self.policy.load_adapter(directory / "adapter")
        except ModelError as error:
            raise ResumeError(error.message, fix=error.fix) from error
        facts = json.loads((directory / "learner.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "optimizer.safetensors")
        self._adam.state.clear()
        self._fixed = _Fixed()
        for name, p in self.policy.adapter.items():
            if f"{name}.exp_avg" in tensors:
                self._adam.state[p] = {
                    "step": torch.tensor(facts["updates"], dtype=torch.float32, device=p.device),
                    "exp_avg": tensors[f"{name}.exp_avg"].to(p.device),
                    "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(p.device),
                }
        self._version = int(facts["version"])
        if facts["memory_plan"]:
            self._plan = MemoryPlan(*facts["memory_plan"])
            if self._plan.checkpointing:
                self.policy.recompute_activations()

    def close(self) -> None:
        """Drop gradients; the model goes with the object."""
        self._adam.zero_grad(set_to_none=True)


def build(config: Config, renderer: Renderer) -> LocalBackend:
    """Load the model and adapter that the configuration names."""
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    objective = Objective(config.loss)  # a loss that cannot be called is found before the model loads
    policy = load_policy(config, seed=config.training.seed)
    policy.merge()
    return LocalBackend(policy, config, objective)
