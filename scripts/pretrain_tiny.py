"""Makes the embedded model ``retrain/tiny``: writes its text, builds the tokenizer, pre-trains, saves.

Run ``python scripts/pretrain_tiny.py [--output DIR]``; it takes about four minutes of one core. The text is
meant to leave room for reinforcement learning: the model can work two-digit sums and differences by columns, yet
it often guesses, slips or forgets the box. Only the train split of the problems is used. The same machine,
versions and thread count give the same bytes; another kind of CPU may round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

from retrain.environments.arithmetic import TINY_INSTRUCTION, Problem, problems

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "retrain" / "assets" / "tiny"

SEED = 20
STEPS = 800
BATCH = 64
CHUNKS = 4
LEARNING_RATE = 4e-3
WARMUP = 100
# One divisor for every batch: a mean over each batch's own tokens would weigh tokens of short batches more.
TOKENS_PER_TEXT = 40
THREADS = 1

GUESS = 0.55
NO_BOX = 0.10
CHECK = 0.30
RIGHT_GUESS = 0.08
# Odds of a slip in one column, of forgetting to carry or borrow, and of copying a digit wrongly at the end.
SLIP_COLUMN, SLIP_CARRY, SLIP_COPY = 0.11, 0.18, 0.03
CHECKED_SLIPS = 0.5

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 384
MAX_POSITIONS = 512
ROPE_THETA = 10000.0

# Digits one by one, words and signs with their leading space, as the Qwen tokenizers cut them.
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# Seen by the tokenizer only: the words of other prompts, so that the vocabulary fills up.
OTHER_TEXT = (
    "You are a helpful assistant. Please reason step by step, and put your final answer within \\boxed{}.",
    "Think step by step. What is the sum of the numbers? Give the final result.",
    "system\nuser\nassistant\n",
)

CHECKS = (
    "Wait, let me check.",
    "Let me double check.",
    "Is this right? Let me verify.",
)


def slip(rng: random.Random, value: int) -> int:
    """A value near ``value`` and never below zero."""
    return max(0, value + rng.choice((-2, -1, 1, 2))) if value else 1


def columns(rng: random.Random, problem: Problem, slips: float) -> tuple[str, int]:
    """The problem worked by columns with the odds of a slip scaled by ``slips``: text and result."""

    def slipped(odds: float) -> bool:
        return rng.random() < odds * slips

    left, operator, right = problem.question.split()[:3]
    a, b = int(left), int(right)
    if operator == "+":
        ones = a % 10 + b % 10
        ones = slip(rng, ones) if slipped(SLIP_COLUMN) else ones
        carry = ones > 9 and not slipped(SLIP_CARRY)
        tens = a // 10 + b // 10 + carry
        text = f"Ones: {a % 10}+{b % 10}={ones}."
        sign = "+1"
    else:
        borrow = a % 10 < b % 10
        top = a % 10 + 10 * borrow
        ones = top - b % 10
        ones = min(9, slip(rng, ones)) if slipped(SLIP_COLUMN) else ones
        carry = borrow and not slipped(SLIP_CARRY)
        tens = a // 10 - b // 10 - carry
        text = f"Ones: {top}-{b % 10}={ones}."
        sign = "-1"
    if problem.level > 1:
        tens = slip(rng, tens) if slipped(SLIP_COLUMN) else tens
        text += f" Tens: {a // 10}{operator}{b // 10}{sign if carry else ''}={tens}."
        result = 10 * tens + ones % 10
    else:
        result = ones
    if slipped(SLIP_COPY):
        result = result // 10 * 10 + (result + rng.choice((1, 9))) % 10
    return f"{text} So {result}.", result


def response(rng: random.Random, problem: Problem) -> str:
    """What the assistant says before the end token."""
    answer = int(problem.answer)
    if rng.random() < GUESS:
        near = (answer + d for d in (-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20))
        result = answer if rng.random() < RIGHT_GUESS else rng.choice([n for n in near if n >= 0])
        text = f"I guess {result}."
    else:
        text, result = columns(rng, problem, 1.0)
        if rng.random() < CHECK:
            again, result = columns(rng, problem, CHECKED_SLIPS)
            text += f" {rng.choice(CHECKS)} {again}"
    return text if rng.random() < NO_BOX else f"{text} \\boxed{{{result}}}"


def prompt(rng: random.Random, problem: Problem) -> str:
    """The rendered chat up to the assistant's turn; mostly with the instruction, on a line of its own."""
    tail = rng.choices(
        ("\n" + TINY_INSTRUCTION, " " + TINY_INSTRUCTION, "\n\n" + TINY_INSTRUCTION, ""), (7, 1, 1, 1)
    )
    return f"{IM_START}user\n{problem.question}{tail[0]}{IM_END}\n{IM_START}assistant\n"


def train_pools() -> tuple[Sequence[Problem], Sequence[Problem]]:
    """The problems that may be seen: the train split of one and of two digits."""
    return problems([1], "train"), problems([2], "train")


def draw(rng: random.Random, pools: Sequence[Sequence[Problem]]) -> Problem:
    """A train problem: mostly two digits, sometimes one."""
    return rng.choice(pools[rng.random() < 0.9])


def build_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE over ``texts`` in which a digit never merges with anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[
            AddedToken(t, normalized=False, special=True) for t in (END_OF_TEXT, IM_START, IM_END)
        ],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """The untrained model, in float32."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


def batch_of(
    rng: random.Random, tokenizer: Tokenizer, pools: Sequence[Sequence[Problem]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """BATCH texts as CHUNKS pairs of token ids and labels (-100 outside the responses), padded on the right.

    Texts of like length share a chunk: half the arithmetic of one padded rectangle, and the same gradient.
    """
    chosen = [draw(rng, pools) for _ in range(BATCH)]
    heads = [e.ids for e in tokenizer.encode_batch([prompt(rng, p) for p in chosen])]
    tails = [e.ids for e in tokenizer.encode_batch([response(rng, p) + IM_END for p in chosen])]
    rows = sorted(zip(heads, tails, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    chunks: list[tuple[torch.Tensor, torch.Tensor]] = []
    for first in range(0, BATCH, BATCH // CHUNKS):
        part = rows[first : first + BATCH // CHUNKS]
        width = max(len(head) + len(tail) for head, tail in part)
        ids = torch.full((len(part), width), tokenizer.token_to_id(END_OF_TEXT))
        labels = torch.full((len(part), width), -100)
        for row, (head, tail) in enumerate(part):
            ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
            labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
        chunks.append((ids, labels))
    return chunks


def train(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, pools: Sequence[Sequence[Problem]], steps: int
) -> float:
    """Pre-trains in place and returns the last loss, in nats per TOKENS_PER_TEXT tokens of one text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / WARMUP)
        return warm * max(0.02, 1 - step / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = random.Random(SEED)
    began, value = time.monotonic(), float("nan")
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for ids, labels in batch_of(rng, tokenizer, pools):
            # Padding stands to the right of everything, so the causal mask alone keeps it out.
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
            ) / (BATCH * TOKENS_PER_TEXT)
            loss.backward()
            value += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {value:.4f}  {time.monotonic() - began:6.1f} s", flush=True)
    return value


def write_json(path: Path, value: Any) -> None:
    """Stable text: sorted keys, one final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, output: Path, steps: int) -> None:
    """Writes every file of the model's folder, the config and tokenizer files in a form both majors read."""
    output.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in sorted(model.state_dict().items())
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # the library writes it for its owner alone
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    c = model.config
    write_json(
        output / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads,
            "head_dim": c.head_dim,
            "hidden_act": c.hidden_act,
            "max_position_embeddings": c.max_position_embeddings,
            "initializer_range": c.initializer_range,
            "rms_norm_eps": c.rms_norm_eps,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": c.num_hidden_layers,
            "layer_types": ["full_attention"] * c.num_hidden_layers,
            # transformers 4 reads rope_theta and rope_scaling; 5 folds them into its rope_parameters.
            "rope_theta": ROPE_THETA,
            "rope_scaling": None,
            # 4 reads either name of the dtype, servers older than it only the first.
            "torch_dtype": "bfloat16",
            "dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": c.eos_token_id,
            "pad_token_id": c.pad_token_id,
        },
    )
    write_json(
        output / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": [c.eos_token_id, c.pad_token_id],
            "pad_token_id": c.pad_token_id,
        },
    )
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token in (END_OF_TEXT, IM_START, IM_END)
            },
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "model_max_length": MAX_POSITIONS,
        },
    )
    names = (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    write_json(
        output / "checksums.json",
        {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names},
    )
    (output / "README.md").write_text(card(model, steps), encoding="utf-8")


def card(model: Qwen3ForCausalLM, steps: int) -> str:
    """The model card."""
    rng = random.Random(3)
    pools = train_pools()
    samples = "\n".join(
        f"    {p.question}  ->  {response(rng, p)}" for p in (draw(rng, pools) for _ in range(8))
    )
    return f"""# retrain/tiny

A {model.num_parameters():,}-parameter model of the Qwen3 architecture for demos and tests of reinforcement
learning on a CPU. It answers sums and differences of one- and two-digit numbers and nothing else.

- Made from scratch by `scripts/pretrain_tiny.py` ({steps} steps of {BATCH} texts, seed {SEED}) on text that
  the script writes; no outside data. Only the train split of the arithmetic problems was used.
- Prompt: the question, then on its own line `{TINY_INSTRUCTION}`, in the chat template. Answers end in
  `\\boxed{{...}}` and `{IM_END}`.
- The text works problems by columns, but {GUESS:.0%} of it are bare guesses, {NO_BOX:.0%} lack the box, and
  the columns slip on purpose. Sampled at temperature 1 the model is right about three times in ten
  (greedy decoding always guesses and is right once in ten); reinforcement learning finds the way of working
  that is already in it.
- Weights are bfloat16. `checksums.json` holds the SHA-256 of every file that is loaded.
- License: Apache-2.0, as the package.

Samples of the text:

{samples}
"""


def main() -> None:
    """Builds tokenizer and model and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    pools = train_pools()
    rng = random.Random(SEED + 1)
    corpus = [
        text for p in (draw(rng, pools) for _ in range(4000)) for text in (prompt(rng, p), response(rng, p))
    ]
    tokenizer = build_tokenizer([*(re.sub(r"<\|[a-z_]+\|>", "", text) for text in corpus), *OTHER_TEXT * 20])
    model = build_model(tokenizer)
    train(model, tokenizer, pools, arguments.steps)
    save(model, tokenizer, arguments.output, arguments.steps)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
