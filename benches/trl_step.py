"""One side of ``against_trl.py``: TRL's GRPOTrainer, step by step. Runs in TRL's own environment, never imports retrain.

    python benches/trl_step.py '{"case": ..., "model": ..., "settings": {...}}'

What is replaced, and why it can only help TRL: the prompt's token ids are given (nothing is tokenised), end tokens are
switched off where they are looked up (min_new_tokens would mask logits at every position), a completion with a shorter
forced length is cut after generation (``generate`` computes a finished row until the longest ends, so nothing is added),
and rewards are looked up. Everything else is TRL's own step: sampling, its metrics, forward, backward, clipping, AdamW.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from worker import Pipe

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    job = json.loads(sys.argv[1])
    pipe = Pipe()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    import logging
    import tempfile
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PrinterCallback,
        ProgressCallback,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(job["threads"])
    groups, members, longest = job["groups"], job["members"], job["longest"]
    batch = groups * members
    chosen: dict[str, Any] = job["settings"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen.get("weights", job["dtype"])]
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=dtype, attn_implementation=chosen.get("attention", "sdpa")
    )
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    now: dict[str, Any] = {}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [r for row in now["rewards"] for r in row]

    @contextmanager
    def timed(name: str) -> Any:
        before = time.perf_counter()
        yield
        pipe.parts[name] = pipe.parts.get(name, 0.0) + time.perf_counter() - before

    class Traced(GRPOTrainer):
        """The trainer with given prompts and forced lengths; the timers cost microseconds."""

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [list(p) for p in now["prompts"] for _ in range(members)], None, {}

        def _generate_single_turn(self, *given: Any, **named: Any) -> Any:
            lengths = [n for row in now["lengths"] for n in row]
            self.generation_config.max_new_tokens = max(lengths)
            for part in (self.model, self.model.base_model, self.model.base_model.model):
                # The trainer writes the tokenizer's end token back when training starts.
                part.generation_config.eos_token_id = None
            with timed("sample"):
                ids, logprobs = super()._generate_single_turn(*given, **named)
            if any(len(row) < n for row, n in zip(ids, lengths, strict=True)):
                raise SystemExit(
                    f"completions of {sorted({len(r) for r in ids})} tokens, forced are {lengths}"
                )
            return [row[:n] for row, n in zip(ids, lengths, strict=True)], logprobs

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            with timed("forward"):
                return super().compute_loss(*given, **named)

    class Turns(TrainerCallback):
        """Waits for the driver before every step, and answers when the loop comes round again, its logging included."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            message = pipe.next()
            if message is None:
                os._exit(0)
            now.update(message["work"])

    rows = chosen.get("rows", batch)
    folder = tempfile.mkdtemp(prefix="trl-")
    args = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=batch // rows,
        num_generations=members,
        max_completion_length=longest,
        max_steps=1_000_000,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim=chosen.get("optim", "adamw_torch"),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        loss_type="dapo",
        scale_rewards="none",
        bf16=bool(chosen.get("autocast", False)),
        fp16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        use_liger_kernel=False,
        cache_implementation=chosen.get("cache"),
        use_transformers_continuous_batching=bool(chosen.get("continuous", False)),
        transformers_continuous_batching_config=chosen.get("continuous_config"),
        torch_compile=bool(chosen.get("compile", False)),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        seed=1,
    )
    trainer = Traced(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w5"] * max(batch, 8)}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=job["rank"], lora_alpha=2 * job["rank"], target_modules=LORA_TARGETS
        ),
        callbacks=[Turns()],
    )
    # Ending is by length only.
    trainer.eos_token_ids = [-1]
    trainer.generation_config.eos_token_id = None
    trainer.generation_kwargs["eos_token_id"] = None
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.train()


if __name__ == "__main__":
    main()
