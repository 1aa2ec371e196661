"""One training run of ``equal_learning.py`` in TRL's environment: GRPOTrainer on given tasks, one seed.

    python benches/learn_trl.py '{"seed": 1, "tasks": "tasks.json", "out": "folder", ...}'

Saves the adapter every few steps and the CPU seconds that the steps before took, the saving itself left out. The prompts'
ids are given and the learning rate rises as ours does (its own warm-up begins at 0); everything else is TRL's.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
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

    torch.set_num_threads(1)
    # One pure module of ours, read by its path: the same reading of a box on both sides.
    spec = importlib.util.spec_from_file_location("boxed", job["boxed"])
    assert spec is not None
    assert spec.loader is not None
    boxed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(boxed)

    steps = json.loads(Path(job["tasks"]).read_text(encoding="utf-8"))
    out = Path(job["out"])
    groups, members = job["groups"], job["members"]
    now: dict[str, Any] = {"step": 0}

    def reward(completions: list[str], **_: Any) -> list[float]:
        answers = [t["reference"].strip() for t in steps[now["step"]] for _ in range(members)]
        boxes = [boxed.last_boxed(text) for text in completions]
        return [float(b is not None and b.strip() == a) for b, a in zip(boxes, answers, strict=True)]

    class Given(GRPOTrainer):
        """Prompts by their ids, and our warm-up."""

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [list(t["ids"]) for t in steps[now["step"]] for _ in range(members)], None, {}

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            warm = job["warmup"]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: min(1.0, (step + 1) / warm)
            )
            return self.lr_scheduler

    class Watch(TrainerCallback):
        """CPU seconds between the steps' beginnings; what is done here is left out."""

        def __init__(self) -> None:
            self.begun: float | None = None
            self.cpu: list[float] = []
            self.rewards: list[float] = []
            self.startup = 0.0

        def pause(self) -> None:
            if self.begun is not None:
                self.cpu.append(time.process_time() - self.begun)
            else:
                self.startup = time.process_time()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "reward" in logs:
                self.rewards.append(float(logs["reward"]))

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.pause()
            self.visit(state.global_step, model)
            self.begun = time.process_time()

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.pause()
            self.visit(state.global_step, model)

        def visit(self, step: int, model: Any) -> None:
            now["step"] = step
            if step and step % job["every"] == 0:
                model.save_pretrained(str(out / f"step-{step}"))

    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    watch = Watch()
    batch = groups * members
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=members,
        max_completion_length=job["max_tokens"],
        max_steps=len(steps),
        learning_rate=job["lr"],
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        loss_type="dapo",
        scale_rewards="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=job["seed"],
    )
    trainer = Given(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * max(batch, 8)}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=job["rank"], lora_alpha=2 * job["rank"], target_modules=LORA_TARGETS
        ),
        callbacks=[watch],
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.train()
    facts = {
        "seed": job["seed"],
        "startup_cpu_s": round(watch.startup, 3),
        "cpu_s": [round(c, 4) for c in watch.cpu],
        "rewards": [round(r, 5) for r in watch.rewards],
    }
    (out / "times.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
