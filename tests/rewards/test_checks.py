"""Constraints: what each accepts, what it refuses at build, and that none can hang the run."""

from __future__ import annotations

import asyncio
import importlib
import time
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.config.tables import PartTable
from retrain.errors import ConfigError
from retrain.rewards.checks import CHECKS, cache_tokens, soft_punishment


@pytest.fixture
def make(make_config):
    made = []

    def build(kind: str, config=None, **keys):
        part = PartTable.model_validate({"type": kind, **keys})
        made.append(CHECKS[kind][0](part, config or make_config(), "reward.parts[0] (x)"))
        return made[-1]

    yield build
    for check in made:
        check.close()
        check.close()


@pytest.fixture
def values(make, score_all):
    def score(kind: str, *texts, config=None, **keys):
        scores = score_all(make(kind, config, **keys), "", *texts)
        assert all(s.passed is None and not s.error for s in scores)
        return [s.reward for s in scores]

    return score


def test_forbidden_texts_cost_one(values):
    got = values("penalize_text_containing", "nice", "As an AI", "as an ai", "a b", texts=["As an AI", "b"])
    assert got == [0.0, -1.0, 0.0, -1.0]


def test_lengths(values, make_rollout):
    text = "one two  three\n"
    assert values("length", text, unit="words", max=3) == [1.0]
    assert values("length", text, unit="words", max=2) == [0.0]
    assert values("length", text, unit="words", min=3) == [1.0]
    assert values("length", text, "", unit="words", min=4) == [0.0, 0.0]
    assert values("length", text, unit="characters", min=15, max=15) == [1.0]
    rollouts = [make_rollout("x", tokens=n) for n in (1, 2, 3, 4)]
    assert values("length", *rollouts, min=2, max=3) == [0.0, 1.0, 1.0, 0.0]


def test_patterns(values):
    assert values("regex", "a1", "a", "", pattern=r"\d") == [1.0, 0.0, 0.0]
    assert values("regex", "x\nANSWER: 5", pattern=r"(?im)^answer:\s*\d+$") == [1.0]


def test_a_catastrophic_pattern_is_an_error_and_the_loop_goes_on(make, make_config, score_all):
    check = make("regex", make_config(reward={"timeout_s": 0.3}), pattern=r"^(a|a)*$")
    started = time.monotonic()
    hang, fine = score_all(check, "", "a" * 80 + "b", "aaa")
    assert time.monotonic() - started < 2
    assert "0.3 seconds" in hang.error
    assert fine.reward == 1.0


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("x <think></think> y <answer>b</answer> z", True),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<think>a</think><think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b", False),
        ("a</think><answer>b</answer>", False),
        ("<think>a</think>", False),
        ("", False),
    ],
)
def test_tags_stand_once_closed_and_in_order(values, text, met):
    assert values("format", text, tags=["think", "answer"]) == [float(met)]


@given(st.lists(st.sampled_from(["<a>", "</a>", "<b>", "</b>", "x"]), max_size=7))
def test_format_equals_its_definition(parts):
    from retrain.rewards.checks import _in_order

    marks = [p for p in parts if p != "x"]
    assert _in_order("".join(parts), ["a", "b"]) == (marks == ["<a>", "</a>", "<b>", "</b>"])


def test_a_closed_box(values):
    assert values("format", r"\boxed{5}", r"\boxed{5", "5", boxed=True) == [1.0, 0.0, 0.0]
    texts = [r"<a>\boxed{5}</a>", "<a>5</a>", r"\boxed{5}"]
    assert values("format", *texts, tags=["a"], boxed=True) == [1.0, 0.0, 0.0]


def test_languages(values):
    english = "We first compute the sum of both numbers, and then we divide the result by two."
    german = "Zuerst berechnen wir die Summe der beiden Zahlen und teilen dann das Ergebnis durch zwei."
    chinese = "我们首先计算这两个数字的总和,然后将所得的结果除以二,最后得到问题的答案。"
    assert values("language", english, german, chinese, language="en") == [1.0, 0.0, 0.0]
    assert values("language", english, german, chinese, language="de") == [0.0, 1.0, 0.0]
    assert values("language", english, german, chinese, language="zh") == [0.0, 0.0, 1.0]
    # Formulas and code are no prose, and a few letters say nothing.
    code = "```python\nfor i in range(10): print(i)  # this is a long english comment\n```"
    assert values("language", german + code, r"$\frac{a}{b}$", "", "5", language="de") == [1.0] * 4


SCHEMA = {
    "type": "object",
    "required": ["answer"],
    "properties": {"answer": {"type": "integer"}, "why": {"type": "string", "pattern": "^(a|a)*$"}},
}


JSON_TEXTS = [
    ('{"answer": 5}', True),
    (' {"answer": 5, "why": "aa"}\n', True),
    ('{"answer": 5, "why": "b"}', False),
    ('{"answer": "5"}', False),
    ("{}", False),
    ("[]", False),
    ('so {"answer": 5}', False),
    ('so\n```json\n{"answer": 5}\n```\ndone', True),
    ('```json\n{"answer": 5}\n```\n```json\n{}\n```', False),
    ('```json\n{"answer": 5}', True),
    ('<think>```json\n{}```</think>{"answer": 5}', True),
    ('{"answer": NaN}', False),
    ('{"answer": 1' + "0" * 5000 + "}", False),
    ("[" * 100000, False),
    ("\ud800", False),
    ("", False),
    # Fences: any case of letters or none, and the last one that is JSON.
    ('so\n```JSON\n{"answer": 5}\n```', True),
    ('so\n```\n{"answer": 5}\n```', True),
    ('```json\n{"answer": 5}\n```\nand ```json5\n', True),
    ('```json\n{"answer": 5}\n```\n```python\nprint(5)\n```\nbye', True),
    ('```json\n{}\n```\n```\n{"answer": 5}\n```', True),
    ('```\n{"answer": 5}\n```\n```json\n{"answer": "5"}\n```', False),
    ('```json\n{"answer": 5} and more\n```', False),
    ('```json5\n{"answer": 5}\n```', False),
    ('```json {"answer": 5, "why": ""}```', True),
    ('see\n```json\n{"answer": 5, "other": "```"}\n```', True),
    ('{"answer": 5, "other": "```{}```"}', True),
    ("```", False),
]


def test_json_by_schema(values):
    texts = [text for text, _ in JSON_TEXTS]
    assert dict(zip(texts, values("json_schema", *texts, schema=SCHEMA), strict=True)) == dict(JSON_TEXTS)


PATIENT = [
    ({"patternProperties": {"^(a+)+$": {}}}, '{"' + "a" * 40 + '!": 1}'),
    ({"patternProperties": {"^(a|a)*$": {}}}, '{"' + "a" * 40 + '!": 1}'),
    ({"patternProperties": {"^(a|a)*$": {}}, "additionalProperties": False}, '{"' + "a" * 40 + '!": 1}'),
    ({"uniqueItems": True}, "[" + ",".join(f'{{"a": {i}}}' for i in range(5000)) + "]"),
]


@pytest.mark.parametrize(("schema", "text"), PATIENT)
def test_no_schema_freezes_the_loop(make, make_config, make_rollout, schema, text):
    check = make("json_schema", make_config(reward={"timeout_s": 1.0}), schema=schema)
    stalls = [0.0]

    async def tick():
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.02)
            stalls.append(time.monotonic() - before)

    async def score():
        ticking = asyncio.create_task(tick())
        scores = await check.score(None, [make_rollout(text), make_rollout("[]"), make_rollout("5")])
        ticking.cancel()
        return scores

    started = time.monotonic()
    hang, *fine = asyncio.run(score())
    assert time.monotonic() - started < 6
    assert max(stalls) < 0.5
    # Where the searching package is clever enough there is an answer instead; a freeze is neither.
    assert "1 seconds" in hang.error or hang.reward in (0.0, 1.0)
    assert [s.reward for s in fine] == [1.0, 1.0]


def test_a_call_that_never_ends_is_cut_and_its_place_is_kept(make, make_config, score_all):
    check = make("json_schema", make_config(reward={"timeout_s": 1.0}), schema=PATIENT[-1][0])
    (hang,) = score_all(check, "", PATIENT[-1][1])
    assert hang.error == "no result within reward.timeout_s = 1 seconds"
    assert "schema_child" in check.first_traceback


def test_a_catastrophic_pattern_in_a_schema_is_an_error(make, make_config, score_all):
    check = make("json_schema", make_config(reward={"timeout_s": 0.3}), schema=SCHEMA)
    (hang,) = score_all(check, "", '{"answer": 5, "why": "' + "a" * 80 + 'b"}')
    assert "0.3 seconds" in hang.error


def test_a_schema_is_never_fetched(make, score_all, monkeypatch):
    fetched = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: fetched.append(a))
    check = make("json_schema", schema={"$ref": "http://127.0.0.1:9/schema.json"})
    (failed,) = score_all(check, "", "{}")
    assert "127.0.0.1:9/schema.json" in failed.error
    assert fetched == []


def twin(length: int, longest: int, cache: int) -> float:
    """Equation 13 of 2503.14476, case by case."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@given(st.integers(1, 300), st.integers(1, 200), st.integers(1, 200))
def test_the_soft_punishment_is_the_papers(length, longest, cache):
    cache = min(cache, longest)
    assert soft_punishment(length, longest, cache) == pytest.approx(twin(length, longest, cache), abs=1e-12)


def test_overlong_counts_sampled_tokens(values, make_config, make_rollout):
    config = make_config(training={"max_tokens": 20})
    rollouts = [make_rollout("x", tokens=n) for n in (15, 16, 17, 18, 20, 25)]
    assert values("overlong", *rollouts, config=config) == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert values("overlong", *rollouts, config=config, tokens=10) == pytest.approx(
        [-0.5, -0.6, -0.7, -0.8, -1, -1]
    )
    assert cache_tokens(0, 3, "x") == 1


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("penalize_text_containing", {}, "needs texts"),
        ("penalize_text_containing", {"texts": ["a", ""]}, "needs texts"),
        ("length", {}, "limits nothing"),
        ("length", {"min": 5, "max": 4}, "min = 5 is above max = 4"),
        ("regex", {}, "needs a pattern"),
        ("regex", {"pattern": "(a"}, r"'\(a' is no pattern: missing \)"),
        ("format", {}, "asks for nothing"),
        ("format", {"tags": ["<think>"]}, "no name of a tag"),
        ("format", {"tags": ["a", "a"]}, "named twice"),
        ("language", {}, "needs a language"),
        ("language", {"language": "EN"}, 'did you mean "en"'),
        ("language", {"language": "klingon"}, "no known language"),
        ("json_schema", {}, "needs a schema"),
        ("json_schema", {"schema": {"const": date(2026, 1, 1)}}, "cannot be written as JSON"),
        ("json_schema", {"schema": {"type": "objekt"}}, "schema.type is no JSON Schema: 'objekt'"),
        ("json_schema", {"schema": {"items": {"pattern": "("}}}, "schema.items.pattern is no JSON Schema"),
        ("overlong", {"tokens": 33}, "tokens = 33 is more than training.max_tokens = 32"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(make, kind, keys, said):
    with pytest.raises(ConfigError, match=said) as caught:
        make(kind, **keys)
    text = str(caught.value)
    assert text.startswith("reward.parts[0] (x)")
    assert caught.value.fix
    assert "\n" not in text


@pytest.mark.parametrize(
    ("kind", "keys", "package"),
    [
        ("regex", {"pattern": "a"}, "regex"),
        ("language", {"language": "en"}, "py3langid"),
        ("json_schema", {"schema": {"type": "object"}}, "jsonschema"),
    ],
)
def test_a_missing_package_is_one_line(make, monkeypatch, kind, keys, package):
    load = importlib.import_module

    def missing(name, *rest):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return load(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=rf'package {package}.*pip install "retrain\[checks\]"') as caught:
        make(kind, **keys)
    assert "\n" not in str(caught.value)


def test_a_check_that_breaks_costs_its_rollout_only(make_rollout, score_all):
    from retrain.rewards.checks import Check

    def value(rollout):
        return 1 / len(rollout.text)

    broken, fine, gone = score_all(Check(value), "", "", "ab", make_rollout("x", error="it broke"))
    assert broken.error.startswith("ZeroDivisionError")
    assert fine.reward == 0.5
    assert gone.error == "it broke"
