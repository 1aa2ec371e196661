"""What is said about data, plug-ins and settings before a device is spent, and what a resume may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrain import preflight
from retrain.config.load import load
from retrain.errors import ConfigError, ResumeError
from retrain.training.build import check_bounds
from retrain.types import Message, Task


def task(question: str, reference: str = "3", source: str = "arithmetic", system: str = "") -> Task:
    messages = (Message("user", question),)
    if system:
        messages = (Message("system", system), *messages)
    return Task(f"{source}/{question}/{system}", messages, reference, source, 0)


def said(config, tasks=(), held_out=()):
    return preflight.advice(config, tasks, held_out, {})


def leaks(config, tasks, held_out):
    (line,) = [line for line in said(config, tasks, held_out) if "held out" in line] or [""]
    return int(line.split()[0]) if line else 0


@pytest.mark.parametrize(
    ("held_out", "leaked"),
    [
        (task("1 + 2 = ?\nPut the answer in \\boxed{}."), 1),
        (task("1 + 2 = ?\n\nSay it."), 1),
        (task("1 + 2 = ?\n\nShout."), 1),
        (task("1 + 2 = ?\nPut the answer in \\boxed{}.", system="Be brief."), 1),
        (task("1 + 2 = ?\nPut the answer in \\boxed{}.", source="other"), 1),
        (task("1 + 3 = ?\nPut the answer in \\boxed{}."), 0),
        (task("1 + 2 = ?\n\nSay it.", reference="three"), 0),
        (task("1 + 2 = ?\nPut the answer in \\boxed{}.", reference="three"), 1),
        (task("1 + 2 = ? and more\n\nSay it."), 0),
    ],
)
def test_a_leak_is_found_under_another_instruction_or_system_message(make_config, held_out, leaked):
    suites = [{"source": "arithmetic", "name": "s", "instruction": "Say it."}]
    config = make_config(data={"instruction": "Shout."}, eval={"suites": suites})
    assert leaks(config, [task("1 + 2 = ?\nPut the answer in \\boxed{}.")], [held_out]) == leaked


def test_a_task_that_is_nothing_but_the_instruction_is_itself(make_config):
    config = make_config(data={"instruction": "Say it."})
    assert leaks(config, [task("Shout.")], [task("Say it.")]) == 0
    assert leaks(config, [task("Say it.")], [task("Say it.")]) == 1


def test_match_is_advised_against_for_the_tasks_that_it_scores(make_config):
    tasks = [task("a", "1/2", source="gsm8k"), task("b", "2", source="sums")]

    def advice(default, **of_gsm8k):
        mixture = [{"source": "gsm8k", **of_gsm8k}, {"source": "arithmetic", "name": "sums"}]
        config = make_config(data={"source": "mixture", "mixture": mixture}, reward={"type": default})
        return [line for line in said(config, tasks) if "plain integers" in line]

    assert advice("match", reward="math") == []
    assert advice("math") == []
    (line,) = advice("match")
    assert line.startswith("50% of the references")
    (line,) = advice("math", reward="match")
    assert line.startswith("100% of the references")
    assert 'reward = "math"' in line


OWN = """\
def plain(group, advantages, context):
    return advantages
def pooled(group, advantages, context):
    return advantages
pooled.uses_sepa = True
def whole(group, context):
    return []
"""


def test_sepa_beside_credit_that_does_not_ask_for_it_is_announced(make_config, tmp_path, monkeypatch):
    (tmp_path / "own_credit.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sepa = {"steps": 10, "delay_steps": 1}
    (line,) = said(make_config(algorithm={"transform_mode": "own_credit.plain"}, sepa=sepa))
    assert line.startswith("sepa.steps, sepa.delay_steps do nothing: transform 'own_credit.plain' has no attribute")
    (line,) = said(make_config(algorithm={"algorithm_mode": "own_credit.whole"}, sepa={"steps": 10}))
    assert line.startswith("sepa.steps does nothing: algorithm 'own_credit.whole' has no attribute uses_sepa = True")
    assert said(make_config(algorithm={"transform_mode": "own_credit.pooled"}, sepa=sepa)) == []
    assert said(make_config(algorithm={"transform_mode": "own_credit.plain"})) == []


def test_a_revision_of_a_local_folder_is_announced(make_config, tmp_path):
    (line,) = said(make_config(model={"model": str(tmp_path), "revision": "main"}))
    assert line.startswith("model.revision does nothing: ")
    assert said(make_config(model={"model": "some/model", "revision": "main"})) == []
    assert said(make_config(model={"model": str(tmp_path)})) == []


@pytest.mark.parametrize(
    ("algorithm", "bounds", "refused"),
    [
        ({"advantage_mode": "maxrl"}, (-1.0, 1.0), True),
        ({"advantage_mode": "maxrl"}, (0.0, 1.5), True),
        ({"advantage_mode": "maxrl"}, (0.0, 1.0), False),
        ({"advantage_mode": "maxrl"}, None, False),
        ({"advantage_mode": "grpo"}, (-1.0, 1.0), False),
        ({"advantage_mode": "maxrl", "algorithm_mode": "mine.x"}, (-1.0, 1.0), False),
    ],
)
def test_maxrl_refuses_rewards_known_to_leave_its_range(make_config, algorithm, bounds, refused):
    config = make_config(algorithm=algorithm)
    if not refused:
        check_bounds(config, bounds)
        return
    with pytest.raises(ConfigError, match=r"derived for rewards in \[0, 1\]") as caught:
        check_bounds(config, bounds)
    assert "reward.parts" not in str(caught.value)


def test_a_run_resumes_when_the_adapter_it_began_with_is_gone(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    toml = tmp_path / "configs" / "run.toml"
    toml.write_text('[data]\nsource = "arithmetic"\n[lora]\ninit_from = "first"\n')
    monkeypatch.chdir(tmp_path)
    given = load(toml).config
    for place in (tmp_path / "configs", tmp_path):  # beside the TOML, and in the working directory
        (place / "first").mkdir()
        before = preflight.anchored(given, toml)
        assert before.lora.init_from == str(place / "first")
        (place / "first").rmdir()
        now = preflight.anchored(given, toml)
        assert Path(now.lora.init_from).is_absolute()
        preflight.check_resume(before, now)
    elsewhere = now.model_copy(update={"lora": now.lora.model_copy(update={"init_from": "/second"})})
    with pytest.raises(ResumeError, match=r"lora\.init_from was"):
        preflight.check_resume(before, elsewhere)


def test_another_adapter_to_begin_with_is_refused_while_the_first_is_there(tmp_path):
    def starting_at(path):
        return load({"data": {"source": "arithmetic"}, "lora": {"init_from": str(path)}}).config

    (tmp_path / "a" / "first").mkdir(parents=True)
    with pytest.raises(ResumeError, match=r"lora\.init_from was"):
        preflight.check_resume(starting_at(tmp_path / "a" / "first"), starting_at(tmp_path / "b" / "first"))


def test_no_adapter_stays_no_adapter():
    config = load({"data": {"source": "arithmetic"}}).config
    assert preflight.anchored(config, None).lora.init_from == ""


def test_an_eight_bit_cache_is_announced(make_config):
    assert not said(make_config())
    (line,) = said(make_config(inference={"kv_cache_dtype": "fp8"}))
    assert "kv_cache_dtype" in line
    assert "ratio" in line
