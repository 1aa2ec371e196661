"""Properties that hold for every setting of the schema, and for mutated configurations."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retrain.config import fields, idle, templates
from retrain.config.load import dump_toml, load, load_config
from retrain.config.schema import Config
from retrain.errors import ConfigError

ALL = fields.settings()
BASE: dict[str, Any] = {"data": {"source": "arithmetic"}}


def nested(key: str, value: Any) -> dict[str, Any]:
    source: dict[str, Any] = {k: dict(v) for k, v in BASE.items()}
    table, parts = source, key.split(".")
    for part in parts[:-1]:
        table = table.setdefault(part, {})
    table[parts[-1]] = value
    return source


def refused(source: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source)
    return str(caught.value).splitlines()


def accepted(source: Any, overrides: Any = (), *, place: str = "") -> Config | None:
    """The configuration; None when it was refused with lines that all name the place and a fix."""
    try:
        return load_config(source, overrides)
    except ConfigError as error:
        lines = str(error).split("\n")
    assert all(line.startswith(place) and " Fix: " in line for line in lines), lines
    return None


@pytest.mark.parametrize("key", ALL)
def test_is_described_in_one_sentence(key: str) -> None:
    text = ALL[key].description
    assert text.endswith(".")
    assert text[0] == text[0].upper() or text.startswith("match")
    assert len(text) < 110


@pytest.mark.parametrize("key", ALL)
def test_refuses_values_of_another_type(key: str) -> None:
    setting = ALL[key]
    wrong: list[Any] = [{"a": 1}] if setting.type != "table" else [3]
    wrong += [True] if setting.type != "boolean" else ["true", 1]
    wrong += [1] if setting.type == "string" else ["text\x00"]
    for value in wrong:
        lines = refused(nested(key, value))
        assert any(key in line and " Fix: " in line for line in lines), (value, lines)


@pytest.mark.parametrize("key", [k for k, s in ALL.items() if s.type in ("integer", "float")])
def test_has_a_range(key: str) -> None:
    for value in (
        (-(10**30), 10**30) if ALL[key].type == "integer" else (-1e300, 1e300, float("inf"), float("nan"))
    ):
        assert any(f"{key} must be " in line for line in refused(nested(key, value)))


@pytest.mark.parametrize("key", ALL)
def test_a_misspelling_is_refused(key: str) -> None:
    wrong = key + "x"
    lines = refused(nested(wrong, 1))
    assert any(f"{wrong} is not a setting." in line for line in lines)


def test_every_setting_is_reachable_by_its_key() -> None:
    for key, setting in ALL.items():
        if setting.section not in ("campaign", "squeeze"):
            assert idle.get(Config(), key) == setting.default


def test_a_file_that_states_every_default_loads() -> None:
    lines: list[str] = []
    for section in fields.sections():
        if section not in ("campaign", "squeeze"):
            lines.append(f"[{section}]")
            given = [s for s in ALL.values() if s.section == section and s.default is not None]
            lines += [f"{s.name} = {fields.literal(s.default)}" for s in given]
    text = "\n".join(lines).replace('"math"', '"gsm8k"')
    loaded = load(tomllib.loads(text))
    assert loaded.config == load_config({"data": {"source": "gsm8k"}})
    assert all(" nothing with " in line for line in loaded.announcements)


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_templates_load_and_their_dump_loads_back_equal(name: str) -> None:
    loaded = load(templates.path_of(name))
    assert loaded.announcements == ()
    assert load_config(tomllib.loads(dump_toml(loaded.config))) == loaded.config


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FREE_TEXT = ("data.instruction", "data.system", "logging.strategic_grams", "logging.log_dir", "model.model")
NUMBERS = (
    "training.lr",
    "training.temperature",
    "loss.grad_clip",
    "optimizer.eps",
    "gtpo.beta",
    "sepa.threshold",
)
COUNTS = (
    "training.batch_size",
    "training.max_tokens",
    "training.max_steps",
    "sepa.steps",
    "logging.generations",
)
SCALARS = TEXTS | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()
FREE = st.dictionaries(
    TEXTS, st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x))
)


@st.composite
def sources(draw: st.DrawFn) -> dict[str, Any]:
    source = nested("data.template_args", draw(FREE))
    values = {k: draw(TEXTS) for k in FREE_TEXT}
    values |= {k: draw(st.floats(1e-9, 1)) for k in NUMBERS} | {
        k: draw(st.integers(1, 60_000)) for k in COUNTS
    }
    values |= {
        "training.stop": draw(st.lists(TEXTS.filter(bool))),
        "data.levels": draw(st.lists(st.integers(1, 4), min_size=1)),
    }
    values |= {"data.shuffle": draw(st.booleans()), "plugins.search_paths": draw(st.lists(TEXTS))}
    values["reward.correct_at"] = draw(st.none() | st.floats(-1e9, 1e9))
    for key in draw(st.sets(st.sampled_from(sorted(values)))):
        section, _, name = key.partition(".")
        source.setdefault(section, {})[name] = values[key]
    return source


@given(sources())
@settings(max_examples=60, deadline=None)
@example({"data": {"source": "arithmetic", "system": 'a "b" \\ \x7f \x00 \n\t é \U0001f600'}})
def test_an_accepted_configuration_dumps_and_loads_back_equal(source: dict[str, Any]) -> None:
    config = accepted(source)
    if config is None:
        return
    text = dump_toml(config)
    assert load_config(tomllib.loads(text)) == config
    assert dump_toml(load_config(tomllib.loads(text))) == text


PIECES = st.sampled_from(
    [
        "\n",
        "=",
        "[",
        "]",
        '"',
        "'",
        "{",
        "}",
        ".",
        "#",
        "\x00",
        "é",
        "true",
        "-1",
        "1e400",
        "0x1",
        "inf",
        "1979-05-27",
        "\r",
        '"""',
        "source",
        "lr",
        ",",
        "[[data]]\n",
        "\n[data.levels]\n",
        "\n[training]\nlr = 1\n",
        "= 'x'\n",
        "[eval]\n",
    ]
)


@given(
    name=st.sampled_from(sorted(templates.TEMPLATES)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), PIECES | TEXTS), min_size=1, max_size=5),
)
@settings(max_examples=250, deadline=None)
def test_a_mutated_file_loads_or_says_where_and_how_to_fix_it(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[float, int, str]]
) -> None:
    text = templates.read(name)
    for place, removed, piece in edits:
        at = int(place * len(text))
        text = text[:at] + piece + text[at + removed :]
    path = tmp_path_factory.getbasetemp() / "mutated.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    config = accepted(path, place=str(path))
    if config is not None:
        assert load_config(tomllib.loads(dump_toml(config))) == config


KEYS = st.sampled_from(sorted(ALL)) | TEXTS
VALUES = SCALARS | st.none() | st.lists(SCALARS, max_size=3) | FREE


@given(st.dictionaries(KEYS, VALUES, max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_overrides_load_or_name_the_key(overrides: dict[str, Any]) -> None:
    accepted(BASE, overrides)
