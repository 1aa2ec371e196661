"""What is compared: models, batch shapes, and per step the prompts, forced lengths and rewards that both sides get.

Only numpy, so that it runs in any environment. Every number is a function of the case's name and the step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "src" / "retrain" / "assets" / "tiny"

MEDIUM_LAYOUT: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
}
"""Keys of transformers' Qwen3Config: a Qwen3 in small with the vocabulary of the large ones."""


@dataclass(frozen=True)
class Case:
    """One workload: ``groups`` prompts, ``members`` rollouts of each, lengths in tokens.

    ``spread`` 0: every completion is ``length`` tokens long. Else lengths are log-normal with that median and with
    ``spread`` as 95th percentile, cut at ``cap``.
    """

    name: str
    model: str
    groups: int
    members: int
    prompt: tuple[int, int]
    length: int
    spread: int = 0
    cap: int = 0
    rank: int = 16

    @property
    def longest(self) -> int:
        """Most tokens of a completion."""
        return self.cap or self.length

    @property
    def vocabulary(self) -> int:
        """Ids that prompts are drawn from lie below this."""
        return 384 if self.model == "tiny" else int(MEDIUM_LAYOUT["vocab_size"])


CASES = {
    case.name: case
    for case in (
        Case("tiny", "tiny", 8, 16, (30, 50), 64),
        Case("tiny-lognormal", "tiny", 8, 16, (30, 50), 44, 80, 80),
        Case("tiny-small", "tiny", 2, 4, (30, 50), 16),
        Case("medium", "medium", 4, 8, (64, 100), 128),
        Case("medium-lognormal", "medium", 4, 8, (64, 100), 88, 256, 256),
        Case("medium-small", "medium", 2, 8, (24, 32), 32),
    )
}
"""tiny is the demo's batch; medium is 4 x 8 x 128; -lognormal keeps the shape 700 / 2,048 of reasoning, scaled."""


@dataclass(frozen=True)
class Work:
    """One step: token ids of every prompt, and by group and member the forced lengths and the rewards."""

    prompts: list[list[int]]
    lengths: list[list[int]]
    rewards: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"prompts": self.prompts, "lengths": self.lengths, "rewards": self.rewards}

    @property
    def tokens(self) -> int:
        """Completion tokens of the step."""
        return sum(map(sum, self.lengths))


def work(case: Case, step: int) -> Work:
    """Prompts, lengths and rewards of one step. Rewards are fair coins in every second group, of which no group shows
    one side only; the others are all 1 or all 0, so that exactly half of the groups carry a signal."""
    seed = int.from_bytes(hashlib.sha256(f"{case.name} {step}".encode()).digest()[:8], "big")
    rng = np.random.Generator(np.random.Philox(seed))
    low, high = case.prompt
    prompts = [
        rng.integers(5, min(case.vocabulary, 260 if case.model == "tiny" else case.vocabulary), n).tolist()
        for n in rng.integers(low, high + 1, case.groups)
    ]
    shape = (case.groups, case.members)
    if case.spread:
        sigma = np.log(case.spread / case.length) / 1.6448536
        drawn = np.exp(np.log(case.length) + sigma * rng.standard_normal(shape))
        lengths = np.clip(np.rint(drawn), 1, case.cap).astype(int)
    else:
        lengths = np.full(shape, case.length)
    rewards = np.zeros(shape)
    for g in range(case.groups):
        if g % 2 == 0:
            while rewards[g].min() == rewards[g].max():
                rewards[g] = rng.integers(0, 2, case.members)
        else:
            rewards[g] = float(rng.integers(0, 2))
    return Work(prompts, lengths.tolist(), rewards.tolist())


def make_medium(folder: Path) -> Path:
    """Write the medium model with random weights (float32) and a tokenizer of one word per id; kept when it is there.

    Needs torch, transformers and tokenizers.
    """
    if (folder / "complete").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    size = int(MEDIUM_LAYOUT["vocab_size"])
    config = Qwen3Config(**MEDIUM_LAYOUT, eos_token_id=1, pad_token_id=0, bos_token_id=None, dtype="float32")
    Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, size)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder
    )
    (folder / "complete").touch()
    return folder


def model_folder(case: Case, models: Path) -> Path:
    """Folder of the case's model; a random one is made in ``models`` when it is missing."""
    return TINY if case.model == "tiny" else make_medium(models / "medium")
