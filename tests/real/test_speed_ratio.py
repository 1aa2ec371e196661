"""A whole step of ours beside the same step in plain transformers and PEFT: a ratio of CPU times in one process, so that
neither the machine nor its neighbours decide. The floor is far below what is measured; falling under it is a regression."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

GROUPS, MEMBERS, PROMPT, LENGTH = 4, 8, 40, 48
STEPS = 4
FLOOR = 1.4


class PlainStep:
    """The step as one writes it with the libraries' own calls: ``generate``, one padded forward, AdamW."""

    def __init__(self) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from retrain.renderer import model_path

        torch.manual_seed(0)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        base = AutoModelForCausalLM.from_pretrained(model_path("retrain/tiny"), dtype=torch.float32)
        base.generation_config.eos_token_id = None
        self.model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def __call__(self) -> None:
        prompts = torch.randint(5, 260, (GROUPS, PROMPT)).repeat_interleave(MEMBERS, 0)
        with torch.no_grad():
            ids = self.model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, max_new_tokens=LENGTH, pad_token_id=0,
            )  # fmt: skip
        assert ids.shape[1] == PROMPT + LENGTH
        rewards = torch.arange(MEMBERS).remainder(2).float().repeat(GROUPS, 1)
        rewards[1::2] = 1.0
        advantages = (rewards - rewards.mean(1, keepdim=True)).reshape(-1, 1)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
        loss = -((logprobs - logprobs.detach()).exp() * advantages).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


class Turns(threading.Event):
    """The loop asks ``is_set`` before each step: here the other side has its turn, and both are timed."""

    def __init__(self, plain: Callable[[], None]) -> None:
        super().__init__()
        self.plain = plain
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._begun: float | None = None

    def is_set(self) -> bool:
        if self._begun is not None:
            self.ours.append(time.process_time() - self._begun)
        before = time.process_time()
        self.plain()
        self._begun = time.process_time()
        self.theirs.append(self._begun - before)
        return len(self.ours) > STEPS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's calls of transformers
def test_a_whole_step_takes_a_fraction_of_the_libraries_cpu_time(
    tmp_path: Path, make_config: Callable[..., Any]
) -> None:
    from retrain.trace import CoinReward, Flat, TracedEnvironment, TracedTasks
    from retrain.training.build import build
    from retrain.training.loop import train

    config = make_config(
        training={
            "batch_size": GROUPS, "group_size": MEMBERS, "max_tokens": LENGTH, "max_steps": 100, "lr": 1e-4,
            "save_every": 0,
        },
        logging={"log_dir": str(tmp_path / "run")},
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    try:
        turns = Turns(PlainStep())
        with build(config, tmp_path / "run", clear=False, plain=True, check=lambda *_: None) as parts:
            parts.tasks = TracedTasks(PROMPT, vocab_size=260)
            parts.environment = TracedEnvironment(None, Flat(LENGTH))
            parts.reward = CoinReward()
            train(config, parts, turns)
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    # The first step of each is a warm-up; the least time is the one that neighbours disturbed least.
    ours, theirs = min(turns.ours[1:]), min(turns.theirs[1:])
    assert theirs / ours > FLOOR, f"{theirs:.3f} s beside {ours:.3f} s: {theirs / ours:.2f}"
    print(f"ratio {theirs / ours:.2f}")
