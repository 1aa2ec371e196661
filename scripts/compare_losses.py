"""Our losses and advantages beside those of TRL and verl: their own functions, called on the same tensors in float64.

    python scripts/compare_losses.py [--env FOLDER] [--out docs/compared.md]

makes an environment of its own (in a temporary folder unless ``--env`` names one, which is kept and used again), installs
pinned versions there, runs every comparison in it and writes a table: the largest difference of the value and of the
gradient, and, where there is one, why. Exit 1 when a difference has no stated reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSTALLS = (
    ["torch==2.13.0"],
    ["trl==1.16.0", "transformers==5.23.0", "peft", "accelerate", "numpy", "pydantic", "tomlkit", "rich"],
    ["--no-deps", "verl==0.9.1"],
    [
        "ray",
        "codetiming",
        "torchdata",
        "hydra-core",
        "omegaconf",
        "pylatexenc",
        "pybind11",
        "tensordict==0.10.0",
    ],
)
SAME = 1e-9


@dataclass(frozen=True)
class Row:
    """One comparison: ours and theirs in their own words, the two differences, and the reason for them."""

    ours: str
    theirs: str
    value: float
    gradient: float | None
    why: str = ""

    @property
    def same(self) -> bool:
        return max(self.value, self.gradient or 0.0) <= SAME


def outside(env: Path, out: Path) -> int:
    """Make the environment where it is missing and run the comparisons in it."""
    python = env / "bin" / "python"
    if not (env / "complete").exists():
        venv.create(env, with_pip=True, clear=True)
        for packages in INSTALLS:
            print("installing", *packages, flush=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (env / "complete").touch()
    return subprocess.run([python, __file__, "--inside", "--out", str(out)], check=False).returncode


def inside(out: Path) -> int:
    """Compare, print and write the page."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    sys.path.insert(0, str(ROOT / "src"))
    from importlib.metadata import version

    rows = {"TRL": list(against_trl()), "verl": []}
    missing = ""
    try:
        import verl.trainer.ppo.core_algos  # noqa: F401
    except ImportError as error:
        missing = f"verl {version('verl')} could not be imported here ({error}): not compared."
    if not missing:
        rows["verl"] = list(against_verl())
    packages = [f"{name} {version(name)}" for name in ("torch", "trl", "verl", "transformers")]
    text = page(rows, packages, missing)
    print(text)
    out.write_text(text, encoding="utf-8")
    unexplained = [r for of in rows.values() for r in of if not r.same and not r.why]
    return 1 if unexplained else 0


def page(rows: dict[str, list[Row]], packages: list[str], missing: str) -> str:
    lines = [
        "# Compared with TRL and verl",
        "",
        "<!-- written by scripts/compare_losses.py -->",
        "",
        "Their own functions and ours on the same random tensors in float64: 8 rows of unequal lengths in 2 groups, ratios",
        "between 0.3 and 3. The columns hold the largest absolute difference of the value and of any element of its",
        f"gradient; at most {SAME:g} counts as equal. Versions: {', '.join(packages)}.",
    ]
    for name, of in rows.items():
        lines += ["", f"## {name}", ""]
        if name == "verl" and missing:
            lines += [missing]
            continue
        lines += ["| ours | theirs | value | gradient | verdict |", "| --- | --- | --- | --- | --- |"]
        for r in of:
            gradient = "" if r.gradient is None else f"{r.gradient:.1e}"
            verdict = "equal" if r.same else r.why or "NOT EXPLAINED"
            if r.same and r.why:
                verdict += f"; {r.why}"
            lines.append(f"| {r.ours} | {r.theirs} | {r.value:.1e} | {gradient} | {verdict} |")
    return "\n".join(lines) + "\n"


class Example:
    """Logprobs of every policy for 8 padded rows (B, T), advantages per row, and our objective on them."""

    def __init__(self) -> None:
        import numpy as np
        import torch

        rng = np.random.default_rng(7)
        self.rows, self.width, self.horizon = 8, 12, 20
        self.lengths = rng.integers(3, self.width + 1, self.rows)
        shape = (self.rows, self.width)
        self.mask = torch.tensor(np.arange(self.width)[None] < self.lengths[:, None], dtype=torch.float64)
        self.old = torch.tensor(rng.uniform(-4, -0.05, shape))
        self.new = (self.old + torch.tensor(rng.normal(0, 0.35, shape))).requires_grad_()
        self.sampler = self.old - torch.tensor(rng.normal(0, 0.5, shape))
        self.base = self.old + torch.tensor(rng.normal(0, 0.5, shape))
        self.entropy = torch.tensor(rng.uniform(0.1, 3, shape), requires_grad=True)
        self.advantages = torch.tensor(rng.normal(0, 1, self.rows))
        self.rewards = [1.0, 0.0, 0.0, 1.0, 0.2, 0.9, 0.9, 0.0]

    def differences(
        self, theirs: Any, leaf: str = "new", *, horizon: int | None = None, **loss: Any
    ) -> tuple[float, float]:
        """Largest difference of value and gradient between ``theirs`` and our objective with the settings ``loss``."""
        import torch

        ours = self.objective(horizon, **loss)
        of = getattr(self, leaf)
        slopes = [torch.autograd.grad(v, of, retain_graph=True)[0] for v in (ours, theirs)]
        if float(slopes[1].abs().max()) == 0:
            raise AssertionError("a comparison without any gradient shows nothing")
        return float((ours - theirs).detach().abs()), float((slopes[0] - slopes[1]).abs().max())

    def objective(self, horizon: int | None, **loss: Any) -> Any:
        import numpy as np
        import torch

        from retrain.backends.loss import token_weights
        from retrain.backends.objective import Objective, Scored
        from retrain.config.schema import Loss
        from retrain.types import TrainBatch, TrainRow

        on = self.mask.bool()
        rows = []
        for n in self.lengths:
            sampled = np.arange(n + 1) >= 1
            zeros = np.zeros(n + 1, np.float32)
            rows.append(TrainRow(np.zeros(n + 1, np.int32), sampled, zeros, zeros))
        fixed = self.rows * (horizon or self.horizon)
        batch = TrainBatch(tuple(rows), int(self.lengths.sum()), self.rows, fixed, 1.0)
        section = Loss(**loss)
        weights = np.concatenate([w[1:] for w in token_weights(batch, section.agg)])
        objective = Objective(section)
        value, _ = objective(
            Scored(
                new_N=self.new[on],
                plain_N=self.new.detach()[on],
                sampler_N=(self.sampler if objective.needs_learner else self.old)[on],
                advantages_N=self.advantages[:, None].expand_as(self.mask)[on],
                weights_N=torch.tensor(weights),
                row_N=torch.arange(self.rows)[:, None].expand_as(self.mask)[on],
                learner_N=self.old[on] if objective.needs_learner else None,
                base_N=self.base[on] if objective.needs_base else None,
                entropy_N=self.entropy[on] if objective.needs_entropy else None,
            )
        )
        return value

    def groups(self, advantage: Callable[[Any], Any]) -> Any:
        """Our advantages of the two groups' rewards, one after the other."""
        import numpy as np

        return np.concatenate([advantage(np.array(self.rewards[i : i + 4])) for i in (0, 4)])


def against_trl() -> Iterator[Row]:
    """TRL's GRPOTrainer and RLOOTrainer on the embedded model; only their forward pass is replaced by the example's
    logprobs."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from retrain.algorithms import advantages

    example = Example()
    model_path = str(ROOT / "src" / "retrain" / "assets" / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def trainer(kind: Any, settings: Any, **more: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            args = settings(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                report_to=[],
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=example.horizon,
                gradient_accumulation_steps=1,
                **more,
            )
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
            data = Dataset.from_list([{"prompt": "1 + 1 ="}] * 8)
            return kind(
                model=model,
                reward_funcs=lambda completions, **_: example.rewards,
                args=args,
                train_dataset=data,
                processing_class=tokenizer,
            )

    grpo = trainer(GRPOTrainer, GRPOConfig)
    grpo.model.train()
    grpo.current_gradient_accumulation_steps = 1

    def loss(**changed: Any) -> Any:
        defaults: dict[str, Any] = {
            "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0,
            "use_vllm": False, "_entropy_bonus_enabled": False, "delta": None,
            "use_bias_correction_kl": False,
        }  # fmt: skip
        for name, value in {**defaults, **changed}.items():
            setattr(grpo.args if name in ("delta", "use_bias_correction_kl") else grpo, name, value)
        grpo._get_per_token_logps_and_entropies = lambda *_, **__: (example.new, example.entropy, None)
        ids = torch.zeros((example.rows, 2), dtype=torch.long)
        inputs = {
            "prompt_ids": ids,
            "prompt_mask": torch.ones_like(ids),
            "completion_ids": torch.zeros(example.mask.shape, dtype=torch.long),
            "completion_mask": example.mask,
            "advantages": example.advantages,
            "old_per_token_logps": example.old,
            "ref_per_token_logps": example.base,
            "num_items_in_batch": example.mask.sum() * grpo.args.steps_per_generation,
            "importance_sampling_ratio": torch.exp(example.old - example.sampler).clamp(max=2.0),
        }
        return grpo._compute_loss(grpo.model, inputs)

    clip = {"clip_low": 0.2, "clip_high": 0.28}

    def row(ours: str, theirs: str, made: Any, why: str = "", **settings: Any) -> Row:
        return Row(ours, theirs, *example.differences(made, **settings), why)

    yield row("ppo, sequence_mean", "loss_type grpo", loss(), kind="ppo", agg="sequence_mean", **clip)
    yield row("ppo, token_mean", "loss_type dapo", loss(loss_type="dapo"), kind="ppo", **clip)
    yield row("ppo, token_mean", "loss_type bnpo", loss(loss_type="bnpo"), kind="ppo", **clip)
    yield row("ppo, fixed", "loss_type dr_grpo", loss(loss_type="dr_grpo"), kind="ppo", agg="fixed", **clip)
    yield row(
        "cispo, clip_low 1, clip_high 4", "loss_type cispo, epsilon_high 5", loss(loss_type="cispo", epsilon_high=5.0),
        "their epsilon_high is the bound itself, ours its distance from 1", kind="cispo",
    )  # fmt: skip
    yield row(
        "cispo, clip_high 0.5", "loss_type cispo, epsilon_high 1.5", loss(loss_type="cispo", epsilon_high=1.5),
        kind="cispo", clip_high=0.5,
    )  # fmt: skip
    narrow = {"epsilon_low": 3e-4, "epsilon_high": 4e-4}
    wide = {"epsilon_low": 0.1, "epsilon_high": 0.1}
    for bounds in (narrow, wide):
        yield row(
            f"gspo, sequence_mean, clip {bounds['epsilon_low']:g} / {bounds['epsilon_high']:g}",
            "loss_type grpo, importance_sampling_level sequence", loss(importance_sampling_level="sequence", **bounds),
            kind="gspo", agg="sequence_mean", clip_low=bounds["epsilon_low"], clip_high=bounds["epsilon_high"],
        )  # fmt: skip
    yield row(
        "ppo, dual_clip 1.5",
        "delta 1.5",
        loss(loss_type="dapo", delta=1.5),
        kind="ppo",
        dual_clip=1.5,
        **clip,
    )
    for corrected, why in (
        (False, ""),
        (
            True,
            "their default weighs the estimate with the ratio, whose gradient is then the divergence's; ours: kl_kind k2",
        ),
    ):
        made = loss(loss_type="dapo", beta=0.3, use_bias_correction_kl=corrected)
        theirs = f"beta 0.3, use_bias_correction_kl {str(corrected).lower()}"
        yield row("ppo, kl 0.3 (k3)", theirs, made, why, kind="ppo", kl=0.3, **clip)
    vllm = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    for kind, more, theirs in (
        ("ppo", clip, {"loss_type": "dapo"}),
        ("cispo", {}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    ):
        yield row(
            f"{kind}, tis_cap 2", f"loss_type {theirs['loss_type']}, vllm_importance_sampling_correction, token_truncate 2",
            loss(**theirs, **vllm), kind=kind, tis_cap=2.0, **more,
        )  # fmt: skip
    bonus = {"_entropy_bonus_enabled": True, "use_adaptive_entropy": False, "entropy_coef": 0.1}
    yield row(
        "entropy 0.1, token_mean", "entropy_coef 0.1", loss(loss_type="dapo", **bonus), leaf="entropy", kind="ppo",
        entropy=0.1, **clip,
    )  # fmt: skip
    yield row(
        "entropy 0.1, sequence_mean", "entropy_coef 0.1, loss_type grpo", loss(**bonus),
        "ours weighs the bonus as the loss, theirs is always a mean over tokens",
        leaf="entropy", kind="ppo", agg="sequence_mean", entropy=0.1, **clip,
    )  # fmt: skip

    def credit(of: Any, **changed: Any) -> Any:
        for name, value in changed.items():
            setattr(of, name, value)
        with torch.no_grad():
            made = of._generate_and_score_completions([{"prompt": "1 + 1 ="}] * 8)
        return made["advantages"].double().numpy()

    def scored(ours: str, theirs: str, mine: Any, made: Any, why: str) -> Row:
        return Row(ours, theirs, float(abs(mine - made).max()), None, why)

    single = "they compute in float32"
    yield scored(
        "grpo",
        "scale_rewards none",
        example.groups(advantages.grpo),
        credit(grpo, scale_rewards="none"),
        single,
    )
    yield scored(
        "grpo_std", "scale_rewards group", example.groups(advantages.grpo_std), credit(grpo, scale_rewards="group"),
        "they add 1e-4 to the standard deviation, ours 1e-6",
    )  # fmt: skip
    import numpy as np

    pooled = advantages.reinforce_pp([np.array(example.rewards[:4]), np.array(example.rewards[4:])])
    yield scored(
        "reinforce_pp", "scale_rewards batch", np.concatenate(pooled), credit(grpo, scale_rewards="batch"),
        "they divide by the standard deviation of the raw rewards (and add 1e-4), ours by that of what is left after the "
        "group means",
    )  # fmt: skip
    leave_one_out = trainer(RLOOTrainer, RLOOConfig, normalize_advantages=False)
    leave_one_out.model.train()
    yield scored("rloo", "RLOOTrainer", example.groups(advantages.rloo), credit(leave_one_out), single)


def against_verl() -> Iterator[Row]:
    """verl's core_algos, called as its actor does."""
    import numpy as np
    import torch
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    from retrain.algorithms import advantages

    example = Example()
    spread = example.advantages[:, None].expand_as(example.mask)

    def policy(name: str, agg: str, weights: Any = None, **changed: Any) -> Any:
        config = ActorConfig(
            strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=8, use_dynamic_bsz=True,
            **{"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1e6, **changed},
        )  # fmt: skip
        if agg == "seq-mean-token-sum-norm":
            config.global_batch_info["loss_scale_factor"] = example.horizon
        made, _ = core_algos.get_policy_loss_fn(name)(
            old_log_prob=example.old, log_prob=example.new, advantages=spread, response_mask=example.mask,
            loss_agg_mode=agg, config=config, rollout_is_weights=weights,
        )  # fmt: skip
        return made

    clip = {"clip_low": 0.2, "clip_high": 0.28}

    def row(ours: str, theirs: str, made: Any, why: str = "", **settings: Any) -> Row:
        return Row(ours, theirs, *example.differences(made, **settings), why)

    added = "they add 1e-8 to a row's length"
    yield row("ppo, token_mean", "vanilla, token-mean", policy("vanilla", "token-mean"), kind="ppo", **clip)
    yield row(
        "ppo, sequence_mean", "vanilla, seq-mean-token-mean", policy("vanilla", "seq-mean-token-mean"), added, kind="ppo",
        agg="sequence_mean", **clip,
    )  # fmt: skip
    yield row(
        "ppo, fixed", "vanilla, seq-mean-token-sum-norm", policy("vanilla", "seq-mean-token-sum-norm"), kind="ppo",
        agg="fixed", **clip,
    )  # fmt: skip
    yield row(
        "ppo, dual_clip 1.5", "vanilla, clip_ratio_c 1.5", policy("vanilla", "token-mean", clip_ratio_c=1.5), kind="ppo",
        dual_clip=1.5, **clip,
    )  # fmt: skip
    for low, high in ((3e-4, 4e-4), (0.1, 0.1)):
        yield row(
            f"gspo, sequence_mean, clip {low:g} / {high:g}", "gspo, seq-mean-token-mean",
            policy("gspo", "seq-mean-token-mean", clip_ratio_low=low, clip_ratio_high=high), added, kind="gspo",
            agg="sequence_mean", clip_low=low, clip_high=high,
        )  # fmt: skip
    yield row("cispo, clip 0.2 / 0.28", "cispo", policy("cispo", "token-mean"), kind="cispo", **clip)
    weights = torch.exp(example.old - example.sampler).clamp(max=2.0)
    for kind, theirs in (("ppo", "vanilla"), ("cispo", "cispo")):
        yield row(
            f"{kind}, tis_cap 2", f"{theirs}, rollout_is_weights of threshold 2", policy(theirs, "token-mean", weights),
            kind=kind, tis_cap=2.0, **clip,
        )  # fmt: skip
    for kind in ("k1", "k2", "k3"):
        term = core_algos.kl_penalty(example.new, example.base, kind)
        made = policy("vanilla", "token-mean") + 0.3 * core_algos.agg_loss(term, example.mask, "token-mean")
        yield row(f"kl 0.3, {kind}", f"kl_penalty {kind}", made, kind="ppo", kl=0.3, kl_kind=kind, **clip)
    bonus = policy("vanilla", "token-mean") - 0.1 * core_algos.agg_loss(
        example.entropy, example.mask, "token-mean"
    )
    yield row("entropy 0.1", "entropy_coeff 0.1", bonus, leaf="entropy", kind="ppo", entropy=0.1, **clip)

    last = torch.zeros_like(example.mask)
    last[torch.arange(example.rows), torch.tensor(example.lengths) - 1] = torch.tensor(
        example.rewards, dtype=torch.float64
    )
    index = np.repeat([0, 1], 4)

    def scored(ours: str, theirs: str, mine: Any, name: str, why: str = "", **more: Any) -> Row:
        made, _ = core_algos.get_adv_estimator_fn(name)(
            token_level_rewards=last.clone(), response_mask=example.mask, index=index, **more
        )
        return Row(
            ours, theirs, float((torch.tensor(mine)[:, None] * example.mask - made).abs().max()), None, why
        )

    yield scored(
        "grpo", "grpo, norm_adv_by_std_in_grpo false", example.groups(advantages.grpo), "grpo",
        norm_adv_by_std_in_grpo=False,
    )  # fmt: skip
    yield scored("grpo_std", "grpo", example.groups(advantages.grpo_std), "grpo")
    yield scored("rloo", "rloo", example.groups(advantages.rloo), "rloo")
    pooled = advantages.reinforce_pp([np.array(example.rewards[:4]), np.array(example.rewards[4:])])
    yield scored(
        "reinforce_pp", "reinforce_plus_plus_baseline", np.concatenate(pooled), "reinforce_plus_plus_baseline",
        "they whiten over tokens (a long rollout counts more, and its mean is subtracted), ours over rollouts",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", type=Path, help="folder of the environment, kept and used again")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "compared.md")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return inside(args.out)
    if args.env:
        return outside(args.env, args.out.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return outside(Path(folder), args.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
