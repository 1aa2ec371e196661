"""What every test may use: shared data, random models of any shape, fixed thread counts, no network."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers run side by side: more threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so; children of the tests would inherit it and never see Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_root() -> Path | None:
    """The folder of shared real data, or None."""
    root = Path(os.environ.get("RETRAIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    return root if (root / "data").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared real data; the test skips where there is none."""
    root = shared_root()
    if root is None:
        pytest.skip("needs the shared data: set RETRAIN_SHARED or put it at ../shared")
    return root


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A maker of folders with a random Qwen3 model and a byte (or another) tokenizer."""
    import json
    import shutil

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    specials = ["<|pad|>", "<|end|>"]

    def byte_tokenizer(folder: Path) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*specials, *alphabet])}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens(specials)
        made.save(str(folder / "tokenizer.json"))
        facts = {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>",
            "chat_template": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(facts))

    def make(
        *, hidden: int = 64, layers: int = 2, heads: int = 2, kv_heads: int = 1, head_dim: int = 32, vocab: int = 0,
        seed: int = 0,
        tokenizer: Path | None = None, generation: dict[str, Any] | None = None, scale: float = 1.0, sharpness: float = 1.0,
    ) -> Path:  # fmt: skip
        folder = tmp_path_factory.mktemp("model")
        if tokenizer is None:
            byte_tokenizer(folder)
        else:
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                if (tokenizer / name).exists():
                    shutil.copy(tokenizer / name, folder / name)
        loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        eos, pad = loaded.token_to_id(settings["eos_token"]), loaded.token_to_id(settings["pad_token"])
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=vocab or loaded.get_vocab_size(), hidden_size=hidden, intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=4096,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=eos, pad_token_id=pad,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
            model.get_output_embeddings().weight.mul_(sharpness)
        model.save_pretrained(folder)
        if generation is not None:
            path = folder / "generation_config.json"
            facts = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**facts, **generation}))
        return folder

    return make


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """A maker of configurations: the tiny template's essentials, changed by ``section={key: value}``."""
    from retrain.config.schema import Config

    def make(**sections: dict[str, Any]) -> Any:
        base: dict[str, dict[str, Any]] = {
            "backend": {"devices": "cpu"},
            "model": {"model": "retrain/tiny", "lora_rank": 16},
            "lora": {"alpha": 32},
            "algorithm": {"advantage_mode": "grpo", "transform_mode": "none"},
            "training": {
                "seed": 1,
                "max_steps": 4,
                "batch_size": 4,
                "group_size": 4,
                "max_tokens": 32,
                "temperature": 1.0,
                "lr": 1e-3,
            },
            "data": {"source": "arithmetic"},
            "reward": {"type": "match"},
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values}
        return Config.model_validate(base)

    return make
