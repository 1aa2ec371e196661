"""The forward pass of a decoder over one flat axis of tokens, without padding: the model's own modules, with the
attention that the caller brings."""

# torch and transformers are only partly typed: what they return is Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch

from retrain.attention import Attend
from retrain.errors import ModelError

_NAME = "retrain"
_current = threading.local()


class Decoder(Protocol):
    """A backbone: token ids to final hidden states."""

    def __call__(self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states (N, H) after the last norm, in the adapter's current mode, differentiable."""
        ...


class StockDecoder:
    """The modules that transformers built, run as one row of N tokens; works for every model whose attention is
    pluggable."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        interface: Any = AttentionInterface
        interface.register(_NAME, _attention)
        self._model = model
        self._backbone: Any = getattr(model, model.base_model_prefix)

    def __call__(self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states (N, H)."""
        before = getattr(_current, "attend", None)
        _current.attend = attend
        kind = self._model.config._attn_implementation
        self._model.config._attn_implementation = _NAME
        try:
            out = self._backbone(input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False)
        finally:
            _current.attend = before
            self._model.config._attn_implementation = kind
        return out.last_hidden_state[0]


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **how: Any
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer, for one row: (1, heads, N, D) each."""
    if how.get("softcap"):
        raise ModelError(
            "the model caps its attention scores (softcap), which no kernel here does.",
            fix="use a model of the Qwen, Llama or Mistral family.",
        )
    attend: Attend = _current.attend
    scale, window = how.get("scaling"), how.get("sliding_window")
    out = attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
    )
    return out[None], None
