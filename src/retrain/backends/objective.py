"""What a batch is trained on: the policy loss with its correction for the sampler, the KL term and the entropy bonus,
summed with one set of weights; and what is reported about them. Leaves out: forward passes and the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from retrain import plugins
from retrain.backends.loss import LossFn, LossSettings, LossTokens, kl_estimate, settings_of
from retrain.config.schema import Loss
from retrain.errors import ConfigError, PluginError, RetrainError, RunError


@dataclass(frozen=True, slots=True)
class Scored:
    """A microbatch's sampled tokens as every policy scores them, all (N,): logprobs in nats at the training temperature.

    ``new_N`` and ``entropy_N`` are differentiable. ``plain_N`` is ``new_N`` without dropout and gradient; ``learner_N``
    the learner before the batch's first update, also without dropout, ``base_N`` the model without adapter; None where
    the objective needs them not. ``unmoved``: the batch has not moved the policy yet. ``weights_N`` are the
    aggregation's.
    """

    new_N: torch.Tensor
    plain_N: torch.Tensor
    sampler_N: torch.Tensor
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    row_N: torch.Tensor
    learner_N: torch.Tensor | None = None
    base_N: torch.Tensor | None = None
    entropy_N: torch.Tensor | None = None
    unmoved: bool = False


@dataclass(frozen=True, slots=True)
class Tally:
    """Per-token facts of a microbatch, without gradient: what a StepReport averages. None: the objective has no such
    term."""

    gap_N: torch.Tensor
    clipped_N: torch.Tensor | None
    capped_N: torch.Tensor | None
    kl_N: torch.Tensor | None
    entropy_N: torch.Tensor | None


class Objective:
    """The weighted loss of a microbatch, as [loss] describes it."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._settings: LossSettings = settings_of(loss)
        self._function: LossFn = plugins.load("loss", loss.kind)
        # importance_sampling corrects for the sampler with its own ratio. Every other loss may clip, and takes its ratio
        # against the learner: numerics, temperature and dropout part that from the sampler by more than gspo's bounds.
        # With tis_cap it weighs the token with the capped ratio of learner to sampler as well.
        self.needs_learner = loss.kind != "importance_sampling"
        self.needs_base = loss.kl > 0
        self.needs_entropy = loss.entropy != 0
        # Each of the package's losses is a multiple of the advantage; of a plug-in that is not known.
        self.needs_advantage = not (
            self.needs_base or self.needs_entropy or plugins.is_own("loss", loss.kind)
        )
        if 0 < loss.dual_clip <= 1:
            raise ConfigError(
                f"loss.dual_clip = {loss.dual_clip} is not above 1.", fix="3 is usual; 0 switches it off."
            )
        self._check_signature()

    def __call__(self, scored: Scored) -> tuple[torch.Tensor, Tally]:
        """The microbatch's share of the loss, a scalar, and what to report; PluginError for a loss of a wrong shape,
        RunError for a plug-in that raises."""
        loss, old = self._loss, scored.sampler_N
        if scored.learner_N is not None:
            # Of the same forward while nothing has moved: a ratio between two draws of dropout is noise.
            old = scored.new_N.detach() if scored.unmoved else scored.learner_N
        tokens = LossTokens(scored.new_N, old, scored.advantages_N, scored.row_N)
        per_token, clipped = self._checked(self._called(tokens), tokens)
        capped = kl = None
        if loss.tis_cap:
            weight = torch.exp(
                (scored.plain_N if scored.learner_N is None else scored.learner_N) - scored.sampler_N
            )
            capped = weight > loss.tis_cap
            if scored.learner_N is not None:
                per_token = per_token * weight.clamp_max(loss.tis_cap)
        if scored.base_N is not None:
            kl = kl_estimate(scored.new_N, scored.base_N, loss.kl_kind)
            per_token = per_token + loss.kl * kl
        if scored.entropy_N is not None:
            per_token = per_token - loss.entropy * scored.entropy_N
        tally = Tally(
            scored.plain_N - scored.sampler_N,
            None if loss.kind == "importance_sampling" else clipped,
            capped,
            None if kl is None else kl.detach(),
            None if scored.entropy_N is None else scored.entropy_N.detach(),
        )
        return (per_token * scored.weights_N).sum(), tally

    def _called(self, tokens: LossTokens) -> object:
        kind = self._loss.kind
        if not plugins.is_own("loss", kind):
            return self._function(tokens, self._settings)
        try:
            return self._function(tokens, self._settings)
        except RetrainError:
            raise
        except (Exception, SystemExit) as error:
            raise RunError(plugins.raised("loss", kind, error), fix="correct the plug-in.") from error

    def _check_signature(self) -> None:
        try:
            inspect.signature(self._function).bind(None, None)
        except (TypeError, ValueError) as error:
            raise PluginError(
                f"loss {self._loss.kind!r} cannot be called with (tokens, settings): {error}.",
                fix="define it as def my_loss(tokens, settings), returning (loss_N, clipped_N).",
            ) from error

    def _checked(self, made: object, tokens: LossTokens) -> tuple[torch.Tensor, torch.Tensor]:
        shape, name = tokens.new_N.shape, f"loss {self._loss.kind!r}"
        fix = "return (loss_N, clipped_N): the loss of each token and a bool per token."
        parts = list(cast("tuple[object, ...]", made)) if isinstance(made, tuple) else [made]
        if len(parts) != 2 or not all(isinstance(part, torch.Tensor) for part in parts):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise PluginError(f"{name} returned {kinds}, not two tensors.", fix=fix)
        per_token, clipped = cast("list[torch.Tensor]", parts)
        if per_token.shape != shape or clipped.shape != shape or clipped.dtype != torch.bool:
            raise PluginError(
                f"{name} returned {tuple(per_token.shape)} {per_token.dtype} and {tuple(clipped.shape)} {clipped.dtype} "
                f"for {tuple(shape)} tokens.",
                fix=fix,
            )
        if tokens.new_N.requires_grad and not per_token.requires_grad:
            raise PluginError(f"{name} does not depend on tokens.new_N: it has no gradient.", fix=fix)
        return per_token, clipped


def summary(tallies: Sequence[Tally]) -> dict[str, float | None]:
    """Means over all tokens: the ratio to the sampler with its extremes and KL (k3), and the shares and terms that the
    objective has, None for the others. NaN or infinite where a logprob is."""

    def mean(values: Sequence[torch.Tensor | None]) -> float | None:
        known = [v for v in values if v is not None]
        return float(torch.cat(known).double().mean()) if known else None

    gap = torch.cat([t.gap_N for t in tallies]).double()
    ratio = gap.exp()
    return {
        "ratio_mean": float(ratio.mean()),
        "ratio_min": float(ratio.min()),
        "ratio_max": float(ratio.max()),
        "approx_kl": float((ratio - 1 - gap).mean()),
        "clip_share": mean([t.clipped_N for t in tallies]),
        "tis_capped": mean([t.capped_N for t in tallies]),
        "kl_base": mean([t.kl_N for t in tallies]),
        "entropy": mean([t.entropy_N for t in tallies]),
    }
