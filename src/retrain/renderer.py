"""Tokenizer and chat template of a model: messages to token ids, ids back to text with exact offsets.

Text is rebuilt from the bytes of each token, never by tokenising again. Only this module imports transformers
for a tokenizer; no torch is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from retrain.config.names import TINY_MODEL
from retrain.errors import ConfigError, ModelError
from retrain.types import IntArray, Message, TokenRanges

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_RESERVED_TEMPLATE_ARGS = (
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "return_dict",
    "tokenize",
)
_NOTHING: Mapping[str, Any] = MappingProxyType({})

_MOST_IDS = 2**21
"""No vocabulary is larger: an id from here on is one that no tokenizer has, not a reason for a longer table."""

Indices: TypeAlias = npt.NDArray[np.int64]


def model_path(name: str) -> str:
    """The packaged folder of ``retrain/tiny``, the expanded path of a local model, else the id as it is."""
    if name == TINY_MODEL:
        folder = files("retrain").joinpath("assets", "tiny")
        if not folder.is_dir():
            raise ModelError(f"the packaged model {TINY_MODEL!r} is missing.", fix="reinstall retrain.")
        return str(folder)
    local = Path(name).expanduser()
    return str(local) if local.is_dir() else name


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's printable stand-ins: visible Latin-1 characters stand for themselves, the other bytes follow
    # from U+0100 on in order.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(visible)]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _decode_bytes(data: bytes) -> tuple[str, Indices]:
    """Text of UTF-8 bytes (U+FFFD per invalid stretch) and the character index of every byte."""
    codes = np.frombuffer(data, dtype=np.uint8)
    index = np.zeros(len(data), dtype=np.int64)
    pieces: list[str] = []
    at = count = 0
    while at < len(data):
        try:
            piece, end, bad = data[at:].decode(), len(data), 0
        except UnicodeDecodeError as error:
            end = at + error.start
            piece, bad = data[at:end].decode(), error.end - error.start
        starts = (codes[at:end] & 0xC0) != 0x80
        index[at:end] = count + np.cumsum(starts) - 1
        pieces.append(piece)
        count += len(piece)
        if bad:
            pieces.append("\ufffd")
            index[end : end + bad] = count
            count += 1
        at = end + bad
    return "".join(pieces), index


class _Pieces:
    """The bytes of token ids, looked up for many at once: each id is asked for once and kept in flat tables.

    Tables are indexed by id + 1; entry 0 stands for every id that no tokenizer can have, which is empty.
    """

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._filling = threading.Lock()
        self._lengths: Indices = np.zeros(1, dtype=np.int64)
        self._starts: Indices = np.zeros(1, dtype=np.int64)
        self._bytes = np.zeros(0, dtype=np.uint8)

    def joined(self, token_ids: IntArray) -> tuple[bytes, Indices]:
        """All ids' bytes, one after the other, and how many bytes each has (T,)."""
        at_T = np.asarray(token_ids, dtype=np.int64) + 1
        if at_T.min(initial=0) < 0 or at_T.max(initial=0) > _MOST_IDS:
            at_T = np.where((at_T > 0) & (at_T <= _MOST_IDS), at_T, 0)
        # Lengths are read before what they point into, and written after it: a thread that reads while another
        # one fills sees a whole entry or none.
        lengths = self._lengths
        if at_T.max(initial=0) >= len(lengths) or lengths[at_T].min(initial=0) < 0:
            self._fill(at_T)
            lengths = self._lengths
        lengths_T = lengths[at_T]
        before_T = np.cumsum(lengths_T) - lengths_T
        picked = np.repeat(self._starts.take(at_T) - before_T, lengths_T)
        picked += np.arange(len(picked))
        return self._bytes.take(picked).tobytes(), lengths_T

    def _fill(self, at_T: Indices) -> None:
        with self._filling:
            more = int(at_T.max()) + 1 - len(self._lengths)
            if more > 0:
                self._starts = np.concatenate([self._starts, np.zeros(more, dtype=np.int64)])
                self._lengths = np.concatenate([self._lengths, np.full(more, -1, dtype=np.int64)])
            new = np.unique(at_T[self._lengths[at_T] < 0])
            pieces = [self._piece(i - 1) for i in new.tolist()]
            lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
            starts = len(self._bytes) + np.cumsum(lengths) - lengths
            self._bytes = np.concatenate([self._bytes, np.frombuffer(b"".join(pieces), dtype=np.uint8)])
            self._starts[new] = starts
            self._lengths[new] = lengths


class ChatRenderer:
    """A Renderer over one tokenizer. Made by ``load_renderer``; safe to share between threads."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str,
        tokenizer_json: bytes = b"",
        generation_config: Mapping[str, Any] = _NOTHING,
        context_length: int | None = None,
        template_args: Mapping[str, Any] = _NOTHING,
    ) -> None:
        reserved = [key for key in template_args if key in _RESERVED_TEMPLATE_ARGS]
        if reserved:
            raise ConfigError(
                f"data.template_args.{reserved[0]} is set by retrain itself.",
                fix="keep only the template's own variables, such as enable_thinking.",
            )
        self._tokenizer = tokenizer
        self._name = name
        self._template_args = dict(template_args)
        self._generation_config = generation_config
        self._context_length = context_length
        self._pieces = _Pieces(self._bytes)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        serialised = tokenizer_json or (backend.to_str().encode() if backend is not None else b"")
        self._byte_level = backend is not None and _is_byte_level(backend)
        added = cast("Mapping[int, Any]", tokenizer.added_tokens_decoder)
        self._special = frozenset(i for i, token in added.items() if token.special)
        template = cast("object", getattr(tokenizer, "chat_template", None))
        self._has_template = bool(template)
        digest = hashlib.sha256(serialised)
        digest.update(b"\0" + json.dumps(template, sort_keys=True).encode())
        self._fingerprint = digest.hexdigest()

    @property
    def name(self) -> str:
        """The model's name as configured."""
        return self._name

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included; a model's embedding may hold more rows."""
        return len(self._tokenizer)

    @property
    def context_length(self) -> int | None:
        """``max_position_embeddings`` of the model's config.json, in tokens; None where it does not say."""
        return self._context_length

    @property
    def has_template(self) -> bool:
        """False for a base model whose prompts are plain text."""
        return self._has_template

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's file and chat template: equal means ids mean the same text."""
        return self._fingerprint

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """End tokens of the tokenizer and of the model's generation config, sorted; may be empty."""
        found: set[int] = set()
        for value in (self._tokenizer.eos_token_id, self._generation_config.get("eos_token_id")):
            ids = cast("list[object]", value) if isinstance(value, list) else [value]
            found.update(i for i in ids if isinstance(i, int))
        return tuple(sorted(found))

    @cached_property
    def ignored_generation_settings(self) -> Mapping[str, Any]:
        """What the model's generation_config.json holds and is not allowed to set: temperature, top_k, ..."""
        kept = {
            key: value
            for key, value in sorted(self._generation_config.items())
            if value is not None
            and not key.startswith("_")
            and not key.endswith("_token_id")
            and key != "transformers_version"
        }
        return MappingProxyType(kept)

    def encode(self, messages: Sequence[Message]) -> IntArray:
        """int32 ids of the messages with the template's generation prompt.

        Without a template the contents are joined by blank lines. ValueError when the template refuses the
        messages (some know no system role).
        """
        tok = self._tokenizer
        if self._has_template:
            import jinja2

            chat = [{"role": m.role, "content": m.content} for m in messages]
            try:
                text = tok.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=False, **self._template_args
                )
            except jinja2.TemplateError as error:
                raise ValueError(
                    f"the chat template of {self._name} refused the messages: {error}"
                ) from error
            ids = tok.encode(text, add_special_tokens=False)
        else:
            ids = tok.encode("\n\n".join(m.content for m in messages))
        return np.asarray(ids, dtype=np.int32)

    def encode_text(self, text: str) -> IntArray:
        """int32 ids of a text as it is, without a template; special tokens written in it are taken as such."""
        return np.asarray(self._tokenizer.encode(text), dtype=np.int32)

    def encode_answer(self, text: str) -> IntArray:
        """int32 ids of a text as it would go on after a prompt: nothing is put before it or after it."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def shown(self, token_id: int) -> str:
        """What stands for one id on a screen: its text, ``\\xe2`` for bytes that are no whole character, or the name of
        a special token, such as ``<|im_end|>``."""
        piece = self._bytes(token_id) if self._byte_level else b""
        if piece:
            return piece.decode(errors="backslashreplace")
        return str(self._tokenizer.convert_ids_to_tokens(token_id) or f"<{token_id}>")

    def decode(self, token_ids: IntArray) -> str:
        """Text of the ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        if self._byte_level:
            return self._pieces.joined(token_ids)[0].decode(errors="replace")
        ids = [int(i) for i in token_ids]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def offsets(self, token_ids: IntArray) -> tuple[str, list[tuple[int, int]]]:
        """Text of the ids and the half-open character range of each token in it.

        A character that is split over tokens belongs to each of them. Special tokens, and ids beyond the
        vocabulary, cover an empty range at their place.
        """
        if not self._byte_level:
            return self._incremental_offsets(cast("Any", token_ids))
        text, ranges = self.lines(token_ids, [len(token_ids)])
        return text, [(start, end) for start, end in np.asarray(ranges).tolist()]

    def lines(self, token_ids: IntArray, counts: Sequence[int]) -> tuple[str, TokenRanges | Indices]:
        """``offsets`` of several sequences at once: their texts with a line feed between each two, and the range
        of every token in that: what ``np.asarray`` makes (N, 2) of.

        ``token_ids`` (N,) holds the sequences one after the other, ``counts[i]`` tokens of the i-th.
        """
        if not self._byte_level:
            return self._apart(token_ids, counts, self._incremental_offsets)
        data, lengths_N = self._pieces.joined(token_ids)
        ends_N = np.cumsum(lengths_N)
        edges = np.concatenate([[0], ends_N])[np.cumsum([0, *counts])].tolist()
        joined = b"\n".join([data[a:b] for a, b in itertools.pairwise(edges)])
        if len(counts) > 1:
            ends_N += np.repeat(np.arange(len(counts)), counts)
        try:
            return joined.decode(), TokenRanges(joined, lengths_N, ends_N)
        except UnicodeDecodeError:
            if len(counts) > 1:
                # Each by itself: the time that repairs take grows with the square of a text's length.
                return self._apart(token_ids, counts, self.offsets)
        text, index = _decode_bytes(joined)
        reached = np.concatenate([[0], index + 1])[ends_N]
        starts = np.append(index, 0)[ends_N - lengths_N]
        # An empty token lies where the last character before it ends.
        return text, np.stack([np.where(lengths_N > 0, starts, reached), reached]).T

    @staticmethod
    def _apart(
        token_ids: IntArray,
        counts: Sequence[int],
        offsets: Callable[[Any], tuple[str, list[tuple[int, int]]]],
    ) -> tuple[str, Indices]:
        texts: list[str] = []
        spans: list[Indices] = []
        at = first = 0
        for count in counts:
            text, found = offsets(token_ids[first : first + count])
            spans.append(np.array(found, dtype=np.int64).reshape(-1, 2) + at)
            texts.append(text)
            at, first = at + len(text) + 1, first + count
        return "\n".join(texts), np.concatenate([*spans, np.zeros((0, 2), dtype=np.int64)])

    def _bytes(self, token: int) -> bytes:
        text = None if token in self._special or token < 0 else self._tokenizer.convert_ids_to_tokens(token)
        if text is None:
            return b""
        if all(c in _ALPHABET for c in text):
            return bytes(_ALPHABET[c] for c in text)
        return str(text).encode()  # an added token outside the alphabet stands for its own text

    def _incremental_offsets(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        ids = [int(i) for i in token_ids]

        # A window from the last complete character but one gives the decoder its left context (leading
        # spaces depend on it); tokens wait until the characters they build are complete.
        def decode(window: list[int]) -> str:
            return str(
                self._tokenizer.decode(window, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )

        real = [(i, t) for i, t in enumerate(ids) if t not in self._special and 0 <= t < self.vocab_size]
        tokens = [t for _, t in real]
        covered: dict[int, tuple[int, int]] = {}
        text = ""
        context = pending = 0
        for k in range(1, len(tokens) + 1):
            before, now = decode(tokens[context:pending]), decode(tokens[context:k])
            complete = not now.endswith("\ufffd") or k == len(tokens)
            if complete:
                start, text = len(text), text + now[len(before) :]
                covered.update({real[j][0]: (start, len(text)) for j in range(pending, k)})
                context, pending = pending, k
        spans: list[tuple[int, int]] = []
        for i in range(len(ids)):
            at = spans[-1][1] if spans else 0
            spans.append(covered.get(i, (at, at)))
        return text, spans


def _is_byte_level(backend: Any) -> bool:
    decoder = cast("dict[str, Any]", json.loads(backend.to_str()).get("decoder") or {})
    parts = cast("list[dict[str, Any]]", decoder.get("decoders", [decoder]))
    # Any other step (a stripped prefix, a replaced character) would change the text after the bytes.
    return [part.get("type") for part in parts] == ["ByteLevel"]


def load_renderer(
    model_path_or_id: str, *, revision: str = "", template_args: Mapping[str, Any] = _NOTHING
) -> ChatRenderer:
    """The renderer of a local folder, of ``retrain/tiny`` or of a Hugging Face id.

    ``revision`` is a branch, tag or commit of the id; ``template_args`` are passed to the chat template.
    ModelError, in one line, when there is no such model or its tokenizer cannot be read. Code that a model
    repository carries is never run.
    """
    path = model_path(model_path_or_id)
    local = Path(path).is_dir()
    if local and not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"model {model_path_or_id!r}: the folder holds no tokenizer.",
            fix="copy the model's tokenizer.json into it.",
        )
    if not local and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ModelError(
            f"model {model_path_or_id!r}: there is no such folder, and it is no Hugging Face id.",
            fix='correct the path, or write "owner/name".',
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            "models need transformers, which is not installed.", fix='pip install "retrain[local]".'
        ) from error
    if not local:
        _require_on_hub(path, revision)
    try:
        loader = cast("Any", AutoTokenizer)
        tokenizer = loader.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"model {model_path_or_id!r}: its tokenizer cannot be loaded: {reason}",
            fix="check the name, the revision and the files; trust_remote_code stays off.",
        ) from error
    context = _json_file(path, revision, "config.json").get("max_position_embeddings")
    return ChatRenderer(
        tokenizer,
        name=model_path_or_id,
        tokenizer_json=_file(path, revision, "tokenizer.json") or b"",
        generation_config=_json_file(path, revision, "generation_config.json"),
        context_length=context if isinstance(context, int) else None,
        template_args=template_args,
    )


def _require_on_hub(model: str, revision: str) -> None:
    """Fail within seconds where a missing name or network would cost transformers a minute of retries."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    for name in _TOKENIZER_FILES:
        if isinstance(hub.try_to_load_from_cache(model, name, revision=revision or None), str):
            return
    try:
        hub.HfApi().model_info(model, revision=revision or None, timeout=15)
    except RevisionNotFoundError as error:
        raise ModelError(
            f"model {model!r} has no revision {revision!r}.", fix="correct model.revision."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model {model!r}: no such folder here and no such model on Hugging Face.",
            fix="correct the name; for a private or gated model set HF_TOKEN.",
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model {model!r}: Hugging Face refused: {reason}", fix="set HF_TOKEN, or try again."
        ) from error
    except Exception as error:  # the HTTP library's exception types differ by hub version
        raise ModelError(
            f"model {model!r}: no such folder, never downloaded, and Hugging Face cannot be reached.",
            fix="correct the path, or connect once to download it.",
        ) from error


def _file(path: str, revision: str, name: str) -> bytes | None:
    if Path(path).is_dir():
        file = Path(path) / name
        return file.read_bytes() if file.is_file() else None
    import transformers.utils.hub as hub

    found = cast("Any", hub).cached_file(
        path,
        name,
        revision=revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found).read_bytes() if found else None


def _json_file(path: str, revision: str, name: str) -> Mapping[str, Any]:
    content = _file(path, revision, name)
    if content is None:
        return _NOTHING
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ModelError(
            f"model {path!r}: {name} is not valid JSON: {error}", fix="download the model again."
        ) from error
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else _NOTHING
