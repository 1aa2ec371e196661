"""A real tokenizer, a real vocabulary and real tasks: a random Qwen3 of 151,936 rows on GSM8K."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from retrain.algorithms.planning import RegexDetector
from retrain.config.load import load
from retrain.renderer import load_renderer
from retrain.runner import execute

pytestmark = pytest.mark.shared_data
torch.set_num_threads(1)

FORMAT = '''
def score(response, reference):
    """The share of a response's tokens-as-characters that are ASCII letters: any sampler can move it."""
    return sum(c.isascii() and c.isalpha() for c in response) / max(1, len(response))
'''


@pytest.fixture(scope="module")
def model(random_model, shared):
    return random_model(tokenizer=shared / "tokenizers/qwen3", vocab=151_936, sharpness=12.0)


def config(model, shared, run, **changes):
    made = {
        "backend": {"devices": "cpu"},
        "model": {"model": str(model), "lora_rank": 8},
        "algorithm": {"advantage_mode": "grpo", "transform_mode": "gtpo_hicra"},
        "training": {"seed": 3, "max_steps": 2, "batch_size": 2, "group_size": 4, "max_tokens": 12, "temperature": 1.0,
            "lr": 1e-2},
        "data": {"source": "gsm8k", "path": str(shared / "data/gsm8k")},
        "reward": {"type": "match"},
        "logging": {"log_dir": str(run)},
    }  # fmt: skip
    for section, values in changes.items():
        made[section] = {**made.get(section, {}), **values}
    return load(made)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_match_finds_no_signal_and_the_run_says_so(model, shared, tmp_path, capsys):
    result = execute(config(model, shared, tmp_path / "run"))
    said = capsys.readouterr().out
    assert result.status == "done"
    assert "Loaded 7473 examples" in said
    assert "skipped (all wrong)" in said
    assert "No step carried a signal" in said
    assert [r["num_datums"] for r in rows(tmp_path / "run")] == [0, 0]


def test_a_custom_format_reward_trains_it(model, shared, tmp_path):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "letters.py").write_text(FORMAT)
    loaded = config(
        model, shared, tmp_path / "run", reward={"type": "custom", "custom_module": "letters", "custom_function": "score"},
        plugins={"search_paths": [str(plugins)]}, training={"max_steps": 10, "group_size": 16},
    )  # fmt: skip
    execute(loaded)
    got = rows(tmp_path / "run")
    assert all(r["num_datums"] > 0 for r in got)
    assert max(abs(r["ratio_max"] - 1) for r in got) < 1e-4
    assert max(abs(r["ratio_min"] - 1) for r in got) < 1e-4
    rewards = [r["mean_reward"] for r in got]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3])


def test_planning_spans_are_exact_on_tokens_of_the_real_tokenizer(model):
    renderer = load_renderer(str(model))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    detect = RegexDetector()
    for text, phrases in (
        (
            "So 12 apples. Wait, let me count again: that's not right at all.",
            ["Wait, let me", "that's not right"],
        ),
        ("that\u2019s not right, WAIT let  me", ["that\u2019s not right", "WAIT let  me"]),
        ("await let me; nothing here\nwait\nlet me", []),
    ):
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
        # Cut words where the tokenizer would not: single bytes, as a sampler may produce them.
        split = [i for token in ids for i in _bytes(tokenizer, int(token))]
        for sequence in (ids, np.array(split, dtype=np.int32)):
            rebuilt, offsets = renderer.offsets(sequence)
            assert rebuilt == text
            wanted = np.zeros(len(text), dtype=bool)
            for phrase in phrases:
                at = text.index(phrase)
                wanted[at : at + len(phrase)] = True
            expected = [bool(wanted[a:b].any()) for a, b in offsets]
            assert detect(rebuilt, offsets).tolist() == expected


def _bytes(tokenizer, token):
    piece = tokenizer.convert_ids_to_tokens(token)
    ids = [tokenizer.convert_tokens_to_ids(c) for c in piece]
    return ids if all(i is not None for i in ids) else [token]
