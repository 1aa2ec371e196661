"""The embedded model: its files say what both transformers majors read, and what they say is true."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retrain
from retrain.environments.arithmetic import TINY_INSTRUCTION, problems

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

FOLDER = Path(retrain.__file__).parent / "assets" / "tiny"
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "pretrain_tiny.py"
LOADED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def _json(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_tiny", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_files_are_there_and_small() -> None:
    names = {p.name for p in FOLDER.iterdir()}
    assert names == {*LOADED, "README.md", "checksums.json"}
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 3_000_000


def test_files_are_the_recorded_ones() -> None:
    recorded = _json("checksums.json")
    assert set(recorded) == set(LOADED)
    for name, digest in recorded.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_config_is_readable_by_both_majors() -> None:
    config = _json("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"
    assert config["rope_theta"] == 10000.0
    assert "rope_parameters" not in config  # 4.57 would not see it
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["head_dim"] == 32
    assert config["tie_word_embeddings"] is True
    tokenizer_config = _json("tokenizer_config.json")
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|im_start|>" in tokenizer_config["chat_template"]


def test_weights_are_finite_bfloat16_and_fit_the_config(model: Any) -> None:
    config = _json("config.json")
    with safetensors.safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "lm_head.weight" not in tensors
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert set(tensors) == set(model.state_dict()) - {"lm_head.weight"}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.num_parameters() < 500_000


def test_config_says_how_the_weights_were_trained(model: Any) -> None:
    parameters = model.config.rope_parameters
    assert parameters["rope_theta"] == 10000.0
    assert parameters["rope_type"] == "default"


def test_end_tokens_agree(tokenizer: Any) -> None:
    config, generation = _json("config.json"), _json("generation_config.json")
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token_id == config["eos_token_id"] == end
    assert tokenizer.pad_token_id == config["pad_token_id"] == generation["pad_token_id"] == pad
    assert generation["eos_token_id"] == [end, pad]
    # Nothing here may bend the sampled distribution.
    assert set(generation) == {"do_sample", "temperature", "eos_token_id", "pad_token_id"}
    assert generation["temperature"] == 1.0
    loaded = transformers.GenerationConfig.from_pretrained(FOLDER)
    assert loaded.eos_token_id == [end, pad]


def test_vocabulary_matches_the_model(tokenizer: Any) -> None:
    assert len(tokenizer) == _json("config.json")["vocab_size"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_every_digit_is_one_token(tokenizer: Any) -> None:
    digits = {str(d): tokenizer.encode(str(d), add_special_tokens=False) for d in range(10)}
    assert all(len(ids) == 1 for ids in digits.values())
    for text in ("47 + 38 = ?", "Ones: 7+8=15.", " \\boxed{1085}", "x123y", " 1234567890"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        written = [digit for i in ids for digit, one in digits.items() if one == [i]]
        assert "".join(written) == "".join(re.findall(r"\d", text))
    inside = [token for token in tokenizer.get_vocab() if re.search(r"\d", token) and len(token) > 1]
    assert not inside


@lru_cache(maxsize=1)
def _tokenizer_file() -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_text_comes_back_as_it_was(text: str) -> None:
    fast = _tokenizer_file()
    assert fast.decode(fast.encode(text).ids, skip_special_tokens=False) == text


def test_chat_template_renders(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}]
    closed = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1 = ?<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == closed
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == closed + "<|im_start|>assistant\n"
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [start]
    # No begin token is put in front of what the template wrote.
    assert tokenizer.encode(opened) == tokenizer.encode(opened, add_special_tokens=False)


def test_the_prompt_is_the_one_of_pre_training(tokenizer: Any, script: ModuleType) -> None:
    problem = problems([2], "validation")[0]
    message = {"role": "user", "content": f"{problem.question}\n{TINY_INSTRUCTION}"}
    rendered = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert any(script.prompt(random.Random(seed), problem) == rendered for seed in range(10))


def test_pre_training_text(tokenizer: Any, script: ModuleType) -> None:
    rng = random.Random(0)
    pools = script.train_pools()
    held_out = {p.id for split in ("validation", "test") for p in problems([1, 2], split)}
    assert not held_out & {p.id for pool in pools for p in pool}
    right, texts = 0, []
    for _ in range(2000):
        problem = script.draw(rng, pools)
        text = script.response(rng, problem)
        boxes = BOXED.findall(text)
        assert len(boxes) <= 1
        right += boxes == [problem.answer]
        texts.append(text)
    assert 0.2 < right / len(texts) < 0.5
    longest = max(len(tokenizer.encode(text + "<|im_end|>")) for text in texts)
    assert longest <= 80
    # Two of the default planning phrases have to occur, or the planning transforms have nothing to act on.
    assert any("Wait, let me" in text for text in texts)
    assert any("double check" in text for text in texts)


def test_sampled_accuracy_leaves_room_to_learn(tokenizer: Any, model: Any) -> None:
    tasks = problems([2], "validation")[:128]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{p.question}\n{TINY_INSTRUCTION}"}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for p in tasks
    ]
    ids = torch.tensor(tokenizer(prompts)["input_ids"])  # all two-digit prompts are equally long
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=80)
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    right = sum(BOXED.findall(text)[-1:] == [task.answer] for task, text in zip(tasks, texts, strict=True))
    assert 0.15 < right / len(tasks) < 0.45


def test_nothing_names_a_machine() -> None:
    for name in (*LOADED, "README.md"):
        if name != "model.safetensors":
            text = (FOLDER / name).read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|mnt)/", text)
            assert "_name_or_path" not in text
