"""The renderer: prompts, exact offsets for any sequence of ids, end tokens, and what is refused."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from retrain.algorithms.planning import RegexDetector
from retrain.errors import ConfigError, ModelError
from retrain.protocols import Renderer
from retrain.renderer import load_renderer, model_path
from retrain.types import Message

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ extra or '' }}"
)


def write_model(folder: Path, tokenizer: Tokenizer, template: str | None = TEMPLATE, **generation) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    if template is not None:
        facts["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": 64}))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def bytes_tokenizer() -> Tokenizer:
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def pieces_tokenizer() -> Tokenizer:
    """SentencePiece's kind: spaces as U+2581, unknown characters as byte tokens, a leading space stripped."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for token in ["\u2581", "\u2581wait", "\u2581let", "\u2581me", "w", "ait", ",", "é", "a"]:
        vocabulary[token] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load_renderer(str(write_model(tmp_path_factory.mktemp("bytes"), bytes_tokenizer())))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return load_renderer(str(write_model(tmp_path_factory.mktemp("pieces"), pieces_tokenizer())))


@pytest.fixture(scope="module")
def qwen(request):
    shared = request.getfixturevalue("shared")
    return load_renderer(str(shared / "tokenizers" / "qwen3"))


def ids_of(renderer, text: str) -> np.ndarray:
    return np.array(renderer._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)


def check_spans(text: str, spans: list[tuple[int, int]], count: int) -> None:
    """Spans are in order, inside the text, and leave no character out."""
    assert len(spans) == count
    reached = 0
    for start, end in spans:
        assert 0 <= start <= end <= len(text)
        assert start <= reached
        assert end >= reached
        reached = end
    assert reached == len(text)


def test_it_is_a_renderer(small):
    assert isinstance(small, Renderer)


def test_a_prompt_is_the_template_with_its_generation_prompt(small, tmp_path):
    ids = small.encode([Message("user", "5+5")])
    assert ids.dtype == np.int32
    assert ids[0] == 0
    assert small.decode(ids) == "5+5>"
    path = write_model(tmp_path / "m", bytes_tokenizer())
    loud = load_renderer(str(path), template_args={"extra": "!"})
    assert loud.decode(loud.encode([Message("user", "a")])) == "a>!"


def test_without_a_template_the_prompt_is_plain_text(tmp_path):
    plain = load_renderer(str(write_model(tmp_path / "m", bytes_tokenizer(), template=None)))
    assert not plain.has_template
    assert (
        plain.decode(plain.encode([Message("system", "be brief"), Message("user", "5+5")]))
        == "be brief\n\n5+5"
    )


def test_a_template_that_refuses_the_messages_is_a_value_error(small):
    with pytest.raises(ValueError, match="no system role"):
        small.encode([Message("system", "x"), Message("user", "y")])


def test_a_template_argument_that_is_ours_is_refused(tmp_path):
    path = write_model(tmp_path / "m", bytes_tokenizer())
    with pytest.raises(ConfigError, match="add_generation_prompt"):
        load_renderer(str(path), template_args={"add_generation_prompt": False})


@pytest.mark.parametrize("extra", [[0, 1], 0, None])
def test_stop_ids_come_from_tokenizer_and_generation_config_and_nothing_else_does(tmp_path, extra):
    stated = {"top_k": 2, "repetition_penalty": 1.5, "temperature": 0.6, "typical_p": None}
    other = {"pad_token_id": 7, "transformers_version": "5", "_from_model_config": True}
    path = write_model(tmp_path / "m", bytes_tokenizer(), eos_token_id=extra, **stated, **other)
    renderer = load_renderer(str(path))
    assert renderer.stop_ids == ((1,) if extra is None else (0, 1))
    assert dict(renderer.ignored_generation_settings) == {
        "repetition_penalty": 1.5,
        "temperature": 0.6,
        "top_k": 2,
    }


def test_facts_of_the_model(small):
    assert small.vocab_size == 258
    assert small.context_length == 64
    assert re.fullmatch("[0-9a-f]{64}", small.fingerprint)


def test_the_fingerprint_depends_on_tokenizer_and_template_alone(tmp_path):
    a = load_renderer(str(write_model(tmp_path / "a", bytes_tokenizer())))
    b = load_renderer(str(write_model(tmp_path / "b", bytes_tokenizer(), temperature=0.1)))
    c = load_renderer(str(write_model(tmp_path / "c", bytes_tokenizer(), template=None)))
    d = load_renderer(str(write_model(tmp_path / "d", pieces_tokenizer())))
    assert a.fingerprint == b.fingerprint
    assert len({a.fingerprint, c.fingerprint, d.fingerprint}) == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 259), max_size=40))
def test_offsets_of_any_bytes(small, ids):
    text, spans = small.offsets(np.array(ids, dtype=np.int32))
    alphabet = {c: b for b, c in enumerate(_gpt2_alphabet())}
    data = [
        b"" if i < 2 or i > 257 else bytes([alphabet[small._tokenizer.convert_ids_to_tokens(i)]]) for i in ids
    ]
    assert text == b"".join(data).decode(errors="replace") == small.decode(np.array(ids))
    check_spans(text, spans, len(ids))
    for piece, (start, end) in zip(data, spans, strict=True):
        assert end - start == len(piece)  # one byte belongs to exactly one character, a special token to none


def check_lines(renderer, sequences):
    """``lines`` is ``offsets`` of each sequence, joined."""
    ids = np.array([i for sequence in sequences for i in sequence], dtype=np.int32)
    text, spans = renderer.lines(ids, [len(sequence) for sequence in sequences])
    apart = [renderer.offsets(np.array(sequence, dtype=np.int32)) for sequence in sequences]
    assert text == "\n".join(line for line, _ in apart)
    assert len(spans) == len(ids)
    assert np.asarray(spans).shape == (len(ids), 2)
    expected, at = [], 0
    for line, found in apart:
        expected += [(at + a, at + b) for a, b in found]
        at += len(line) + 1
    assert list(map(tuple, np.asarray(spans).tolist())) == expected
    # The built-in detector marks the same tokens by an array as by a list, and by all lines as by each.
    detect = RegexDetector(["wait let me", "a", "\u00e9 b", "\U0001f600 a"])
    marks = detect(text, spans).tolist()
    assert marks == detect(text, expected).tolist()
    assert marks == [m for line, found in apart for m in detect(line, found).tolist()]


WORDS = ["wait", ", let", " me", "a", "\u00e9 b", "\U0001f600", "\n", "wait-let me", "\u03a3", "A\u03a3"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_lines_are_the_offsets_of_each_sequence(small, data):
    whole = st.lists(st.sampled_from(WORDS), max_size=8).map(lambda words: ids_of(small, "".join(words)).tolist())
    # Cut and mended at random: characters in pieces, with end tokens and ids that no tokenizer has inside them.
    changes = st.lists(st.tuples(st.integers(0, 20), st.sampled_from([1, 5, 200, -3, 4000, 2**31 - 1])), max_size=3)
    broken = st.tuples(whole, changes)

    def mended(drawn):
        ids, changes = drawn
        for at, token in changes:
            ids = [*ids[:at], token, *ids[at:]]
        return ids

    check_lines(small, data.draw(st.lists(st.one_of(whole, broken.map(mended)), min_size=1, max_size=5)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 275), max_size=12), min_size=1, max_size=4))
def test_lines_of_other_tokenizers(pieces, sequences):
    check_lines(pieces, sequences)


def test_threads_that_ask_for_new_tokens_at_once_get_the_same(tmp_path):
    folder = write_model(tmp_path, bytes_tokenizer())
    rng = np.random.default_rng(0)
    asked = [rng.permutation(260).astype(np.int32) for _ in range(16)]
    expected = [load_renderer(str(folder)).decode(ids) for ids in asked]
    for _ in range(5):
        shared = load_renderer(str(folder))
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(shared.decode, asked)) == expected


def _gpt2_alphabet() -> list[str]:
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = iter(range(256, 512))
    return [chr(b) if b in visible else chr(next(stand_in)) for b in range(256)]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_offsets_of_any_text_in_bytes(small, text):
    text = text.encode("utf-8", "ignore").decode()
    ids = ids_of(small, text)
    found, spans = small.offsets(ids)
    if "<s>" not in text and "</s>" not in text:
        assert found == text
    assert [s[0] for s in spans] == [i for i, c in enumerate(found) for _ in c.encode()]


def test_a_character_split_over_tokens_belongs_to_each_of_them(small):
    text, spans = small.offsets(ids_of(small, "a😀é"))
    assert text == "a😀é"
    assert spans == [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3), (2, 3)]


def test_a_special_token_inside_a_character_covers_nothing(small):
    emoji = ids_of(small, "😀").tolist()
    text, spans = small.offsets(np.array([*emoji[:2], 1, *emoji[2:]], dtype=np.int32))
    assert text == "😀"
    assert spans == [(0, 1), (0, 1), (1, 1), (0, 1), (0, 1)]


def test_offsets_of_other_tokenizers_are_decoded_piece_by_piece(pieces):
    assert not pieces._byte_level
    text, spans = pieces.offsets(np.array([1, 260, 265, 261, 262, 2], dtype=np.int32))
    assert text == "wait, let me"
    assert [text[a:b] for a, b in spans][1:] == ["wait", ",", " let", " me", ""]
    emoji = [3 + b for b in "😀".encode()]
    text, spans = pieces.offsets(np.array([260, *emoji, 262], dtype=np.int32))
    assert text == "wait😀 me"
    assert spans == [(0, 4), *[(4, 5)] * 4, (5, 8)]
    assert pieces.decode(np.array([1, 260, *emoji, 262, 2])) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 275), max_size=25))
def test_offsets_of_other_tokenizers_leave_nothing_out(pieces, ids):
    text, spans = pieces.offsets(np.array(ids, dtype=np.int32))
    check_spans(text, spans, len(ids))


@pytest.mark.shared_data
def test_the_chat_template_of_qwen3(qwen, shared):
    ids = qwen.encode([Message("system", "Be brief."), Message("user", "5+5")])
    raw = qwen._tokenizer.decode(ids)
    assert raw == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n5+5<|im_end|>\n<|im_start|>assistant\n"
    )
    quiet = load_renderer(str(shared / "tokenizers" / "qwen3"), template_args={"enable_thinking": False})
    assert quiet.decode(quiet.encode([Message("user", "5+5")])).endswith("<think>\n\n</think>\n\n")
    assert qwen.stop_ids == (151645,)
    assert qwen.vocab_size == 151669


@pytest.mark.shared_data
@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 151_935), max_size=60))
def test_offsets_of_any_qwen3_ids_are_the_bytes_of_each_token(qwen, ids):
    """Twin: decode every token's bytes by the tokenizer's own rule, one at a time."""
    text, spans = qwen.offsets(np.array(ids, dtype=np.int32))
    known = [i for i in ids if i < 151_669]
    assert text == qwen._tokenizer.decode(known, skip_special_tokens=True) == qwen.decode(np.array(ids))
    check_spans(text, spans, len(ids))
    for i, (start, end) in zip(ids, spans, strict=True):
        if i >= 151_669 or i in qwen._special:
            assert start == end
            continue
        alone = qwen._tokenizer.decode([i])
        if "\ufffd" not in alone:
            # A whole token's text stands where its span says, or begins by completing a character's bytes.
            assert text[start:end].endswith(alone)


@pytest.mark.shared_data
@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="waitlemthn ,'’😀é漢字👩‍🚀\n", max_size=40), st.data())
def test_offsets_of_qwen3_text_survive_any_cut(qwen, text, data):
    ids = ids_of(qwen, text)
    plain, spans = qwen.offsets(ids)
    assert (
        plain == qwen._tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        if len(text)
        else plain == ""
    )
    cut = data.draw(st.integers(0, len(ids)))
    head, head_spans = qwen.offsets(ids[:cut])
    assert head.rstrip("\ufffd") == plain[: len(head.rstrip("\ufffd"))]
    complete = len(head.rstrip("\ufffd"))
    assert [s for s in head_spans if s[1] <= complete] == [s for s in spans[:cut] if s[1] <= complete]


@pytest.mark.shared_data
def test_a_planning_phrase_of_qwen3_is_found_by_its_offsets(qwen):
    said = "Hmm 😀. Wait, let me check: that's not right"
    ids = ids_of(qwen, said)
    text, spans = qwen.offsets(ids)
    assert text == said
    for phrase in ("Wait, let me", "that's not right"):
        at = said.index(phrase)
        marked = [i for i, (a, b) in enumerate(spans) if a < at + len(phrase) and b > at]
        assert qwen.decode(ids[marked]).strip() == phrase


@pytest.mark.shared_data
def test_long_garbage_is_read_quickly(qwen):
    import time

    ids = np.random.default_rng(0).integers(0, 151_936, 8000)
    qwen.offsets(ids)
    started = time.perf_counter()
    qwen.offsets(ids)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nor/this/one", "no such folder"),
        ("a/b/c", "no such folder"),
        ("nobody-has/this-model", "nobody-has/this-model"),
    ],
)
def test_no_such_model_is_one_line_with_a_fix(name, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_renderer(name)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_a_broken_model_folder_is_one_line_with_a_fix(tmp_path):
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_renderer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_renderer(str(tmp_path))
    assert "\n" not in str(caught.value)
    write_model(tmp_path, bytes_tokenizer())
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_renderer(str(tmp_path))


def test_a_name_stays_a_name_and_a_folder_becomes_its_path(tmp_path):
    assert model_path("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert model_path(str(tmp_path)) == str(tmp_path)


def test_the_packaged_model():
    renderer = load_renderer("retrain/tiny")
    prompt = renderer.encode([Message("user", "1+1?\nPut the answer in \\boxed{}.")])
    assert 0 < len(prompt) < renderer.context_length
    assert len(renderer.stop_ids) >= 1
    said = "11+22 = 33, \\boxed{33}"
    text, spans = renderer.offsets(ids_of(renderer, said))
    assert text == said
    check_spans(text, spans, len(spans))


def test_an_answer_is_encoded_alone_and_every_id_can_be_shown():
    renderer = load_renderer("retrain/tiny")
    ids = renderer.encode_answer("Wait, let me\n\u00e9\u20ac")
    assert not set(ids.tolist()) & set(renderer.stop_ids)
    assert renderer.decode(ids) == "Wait, let me\n\u00e9\u20ac"
    assert [renderer.shown(i) for i in renderer.stop_ids] == ["<|endoftext|>", "<|im_end|>"]
    whole = "".join(renderer.shown(i) for i in ids.tolist())
    assert whole.startswith("Wait, let me\n")
    assert "\\x" in whole or whole.endswith("\u00e9\u20ac")
    assert renderer.shown(10**6) == "<1000000>"
