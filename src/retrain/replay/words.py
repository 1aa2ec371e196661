"""The run's tokenizer, by its file alone where that is there: text without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from retrain import plugins
from retrain.config.schema import Config
from retrain.renderer import ChatRenderer
from retrain.tracking import texts


class _Shim:
    """What ``ChatRenderer`` asks of a tokenizer to rebuild text, answered by the tokenizer's file alone."""

    chat_template = None
    eos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self.backend_tokenizer = tokenizer
        self.added_tokens_decoder = tokenizer.get_added_tokens_decoder()

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return cast("str | None", self.backend_tokenizer.id_to_token(token))

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        del clean_up_tokenization_spaces  # nothing here ever does
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


@dataclass
class Words:
    """The run's tokenizer, loaded when it is first asked for."""

    config: Config
    notes: list[str] = field(default_factory=list[str])

    @cached_property
    def tokenizer(self) -> Any:
        model = self.config.model
        found = texts.tokenizer_of(model.model, model.revision)
        if found is None:
            self.notes.append(
                f"The tokenizer of {model.model} is not on this machine: tokens are shown as numbers."
            )
        return found

    @cached_property
    def renderer(self) -> Any:
        """One with the run's offsets, for detectors; the whole tokenizer's where its file alone is not there."""
        if self.tokenizer is not None:
            return ChatRenderer(_Shim(self.tokenizer), name=self.config.model.model)
        return plugins.load("renderer", "chat")(self.config.model.model, revision=self.config.model.revision)
