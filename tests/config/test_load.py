"""Loading: places, fixes, all problems at once, origins, secrets, and what files can do wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retrain import load_config
from retrain.config.load import Override, load
from retrain.config.problems import unknown_and_secret
from retrain.errors import ConfigError, NotInThisVersion

TINY = '[data]\nsource = "arithmetic"\n'


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "my.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def problems(source: object, overrides: object = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def test_attributes_are_the_keys_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + '[training]\nlr = 1\nstop = ["a"]\n[resume]\nfrom = "logs/x"\n')
    config = load_config(path)
    assert config.training.lr == 1.0
    assert config.training.stop == ("a",)
    assert config.resume.from_ == "logs/x"
    assert config.data.levels == (2,)
    assert config.campaign is None


def test_a_config_is_frozen() -> None:
    config = load_config({"data": {"source": "arithmetic"}})
    with pytest.raises(ValueError, match="frozen"):
        config.training.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[training]\n\nlr_rate = 1\n",
            "3: training.lr_rate is not a setting. Fix: did you mean training.lr?",
        ),
        ("[trainig]\nlr = 1\n", "1: trainig is not a section. Fix: did you mean [training]?"),
        ("lr = 1\n", "1: lr is not a setting. Fix: did you mean training.lr?"),
        ("[lora]\nrank = 8\n", "2: lora.rank is not a setting. Fix: did you mean model.lora_rank?"),
        (
            "[training]\nbeta1 = 0.5\n",
            "2: training.beta1 is not a setting. Fix: did you mean optimizer.beta1?",
        ),
        (
            '[resume]\nresume_from = "x"\n',
            "2: resume.resume_from is not a setting. Fix: it was renamed; write resume.from.",
        ),
        (
            '[training]\nlr = "1e-4"\n',
            '2: training.lr must be a number above 0 and at most 1, not "1e-4". '
            "Fix: write it without quotes: lr = 1e-4.",
        ),
        (
            "[model]\nrevision = 5\n",
            '2: model.revision must be a string, not 5. Fix: put it in quotes: revision = "5".',
        ),
        (
            "[training]\nbatch_size = 1.0\n",
            "2: training.batch_size must be an integer from 1 to 65536, not 1.0. "
            "Fix: for example batch_size = 8.",
        ),
        (
            "[training]\ngroup_size = 1\n",
            "2: training.group_size must be an integer from 2 to 65536, not 1. "
            "Fix: for example group_size = 16.",
        ),
        (
            "[training]\nlr = nan\n",
            "2: training.lr must be a number above 0 and at most 1, not nan. Fix: for example lr = 4e-05.",
        ),
        (
            "[training]\ndeterministic = 1\n",
            "2: training.deterministic must be true or false, not 1. Fix: for example deterministic = false.",
        ),
        (
            '[loss]\nagg = "tokenmean"\n',
            '2: loss.agg must be one of "token_mean", "sequence_mean", "fixed", not "tokenmean". '
            'Fix: did you mean "token_mean"?',
        ),
        (
            "[data]\nlevels = [\n  1,\n  7,\n]\n",
            "4: data.levels must be an array of integers from 1 to 4 with at least one item; levels[1] is 7. "
            "Fix: for example levels = [2].",
        ),
        (
            "[data]\nlevels = []\n",
            "2: data.levels must be an array of integers from 1 to 4 with at least one item, not an array. "
            "Fix: for example levels = [2].",
        ),
        (
            '[data]\nfields.question = "q"\nfields.anwser = "a"\n',
            "3: data.fields.anwser is not one of our fields. Fix: use question, answer and id.",
        ),
        (
            "training = 3\n",
            "1: training is a section, not 3. Fix: write its settings below a line [training].",
        ),
        (
            "[training]\nseed = 99999999999999999999\n",
            "2: training.seed must be an integer of at least -1 and at most 9223372036854775807, "
            "not 99999999999999999999. Fix: for example seed = -1.",
        ),
        (
            "[environment]\nargs = '{\"a\": '\n",
            "2: environment.args must be a table or a JSON object; this text is not valid JSON. "
            "Fix: write it as a TOML table.",
        ),
        (
            "[data]\nx.y.z = 1\n",
            "2: data.x is not a setting. Fix: remove it; [data] has source, path, subset, split, shuffle, "
            "subjects, instruction, system, template_args, levels, fields, generators, size, seed, mixture.",
        ),
    ],
)
def test_each_mistake_is_one_line_with_place_and_fix(tmp_path: Path, text: str, line: str) -> None:
    path = write(tmp_path, text)
    assert f"{path}:{line}" in problems(path)


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[training]\nlr = 0\nfoo_bar = 1\n[reward]\ntype = "judge"\n[sepa]\nsteps = -1\n')
    lines = problems(path, [Override.of("training.batch_size", 0, "--batch-size")])
    places = [line.split(": ")[0].removeprefix(f"{path}") for line in lines]
    assert places == [":2", ":3", ":5", ":7", "--batch-size"]


def test_what_follows_from_a_misspelled_key_is_not_reported(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + '[eval]\nsorce = "arithmetic"\nevery = 5\n')
    assert problems(path) == [f"{path}:4: eval.sorce is not a setting. Fix: did you mean eval.source?"]


def test_flags_name_themselves() -> None:
    lines = problems({"data": {"source": "arithmetic"}}, [Override.of("training.lr", "fast", "--lr")])
    assert lines == [
        '--lr: training.lr must be a number above 0 and at most 1, not "fast". Fix: for example lr = 4e-05.'
    ]


def test_only_what_is_not_built_raises_not_in_this_version(tmp_path: Path) -> None:
    with pytest.raises(NotInThisVersion, match=r'reward\.type = "judge" is not in this version'):
        load(write(tmp_path, TINY + '[reward]\ntype = "judge"\n'))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[training\n", r"my.toml:1:10: not valid TOML: "),
        (b"[training]\nlr = \n", r"my.toml:2:6: not valid TOML: Invalid value. Fix: "),
        (b"[training]\nlr = 1\nlr = 2\n", r"my.toml:3:7: not valid TOML: Cannot overwrite a value. Fix: "),
        (b"a = " + b"[" * 5000, r"my.toml: not valid TOML: too deeply nested. Fix: "),
        (b'[data]\nsource = "\xff"\n', r"my.toml:2: not UTF-8 text. Fix: save the file as UTF-8."),
    ],
)
def test_broken_files(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, data))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no.toml: there is no such file\. Fix: correct the path, or write"
    ):
        load(tmp_path / "no.toml")
    write(tmp_path, TINY)
    with pytest.raises(ConfigError, match=r"there is no such file\. Fix: in that folder there is my\.toml\."):
        load(str(tmp_path / "no.toml"))
    with pytest.raises(ConfigError, match=r"this is a folder\. Fix: name the TOML file itself\."):
        load(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load("a\0b")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"my\.toml: cannot be read: Permission denied\. Fix: check"):
        load(tmp_path / "my.toml")


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    text = "\ufeff" + (TINY + "[training]\nlr_rate = 1\n").replace("\n", "\r\n")
    path = write(tmp_path, text)
    assert problems(path) == [f"{path}:4: training.lr_rate is not a setting. Fix: did you mean training.lr?"]


SECRETS = [
    '[model]\nhf_token = "abc"\n',
    '[model]\napi_key = "abc"\n',
    '[judge]\nOPENAI_API_KEY = "abc"\n',
    '[environment]\nargs = { openai_api_key = "abc" }\n',
    '[environment]\nargs = \'{"nested": {"password": "abc"}}\'\n',
    '[model]\nrevision = "sk-abcdefghijklmnop0123"\n',
    '[data]\ninstruction = "use hf_abcdefghijklmnopqrst please"\n',
    '[training]\nstop = ["ghp_abcdefghijklmnopqrstuvwxyz"]\n',
    '[model]\nbase_url = "https://me:abc@example.org"\n',
    '[wrong]\nx = "sk-abcdefghijklmnop0123"\n',
    '[training]\nlr = "sk-abcdefghijklmnop0123"\n',
    '[training]\nseed = "sk-abcdefghijklmnop0123"\nlr = ["sk-abcdefghijklmnop0123"]\n',
]


PLACES = (
    ("backend", "options"), ("environment", "args"), ("data", "template_args"), ("data", "fields"),
    ("algorithm", "transform_params"), ("algorithm", "advantage_params"), ("algorithm", "params"),
)  # fmt: skip


def refused(raw: dict) -> bool:
    return bool(unknown_and_secret(raw))


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_secrets_are_refused_in_every_free_table(place) -> None:
    section, key = place
    for depth in (lambda x: x, lambda x: {"deep": x}, lambda x: {"deep": [{"er": x}]}, json.dumps):
        found = unknown_and_secret({section: {key: depth({"authorization": "q9"})}})
        assert [p.message.split(" holds ")[0].startswith(f"{section}.{key}") for p in found] == [True]
        assert "q9" not in found[0].line("")


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_ordinary_settings_are_no_secrets(place) -> None:
    section, key = place
    for name, value in ORDINARY:
        assert not refused({section: {key: {name: value}}}), (name, value)
        assert not refused({section: {key: {"deep": [{name: value}]}}}), (name, value)


SECRET_KEYS = [
    "authorization", "Authorization", "Proxy-Authorization", "authorization_header", "bearer", "x-api-key", "X-Api-Key",
    "apiKey", "api_key_2", "openai_api_key", "API_KEY", "apikey", "token", "access_token", "hf_token", "X-Auth-Token",
    "authToken", "secret", "client_secret", "clientSecret", "aws_secret_access_key", "password", "db_password", "passphrase",
    "credentials", "aws-credentials", "private_key", "secrets",
]  # fmt: skip
SECRET_VALUES = [
    "Bearer abc123def456", "bearer abc123def456", "Bearer abcdefgh", "Authorization: Bearer abcdefgh", "x-api-key: abcdefgh",
    "curl -H 'Authorization: Basic dXNlcjpwYXNz' http://x", "sk-proj-abcdefghijklmnop0123", "hf_abcdefghijklmnopqrst",
    "ghp_abcdefghijklmnopqrstuvwxyz", "github_pat_abcdefghijklmnopqrstuvwxyz", "glpat-abcdefghijklmnopqrst",
    "gsk_abcdefghijklmnopqrstuvwx",
    "AKIAABCDEFGHIJKLMNOP", "https://me:abc@example.org", "https://example.org/v1?api_key=abcdefgh12",
    "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeK", "-----BEGIN RSA PRIVATE KEY-----",
]  # fmt: skip
SHA = "0123456789abcdef0123456789abcdef01234567"
ORDINARY: list = [
    ("max_tokens", 5), ("max_tokens", "5"), ("stop_tokens", ["</s>", "Answer:"]), ("stop_token", "END"), ("eos_token", "<s>"),
    ("pad_token", "pad"), ("think_token", "think"), ("token", "<think>"), ("token", ["a", "b"]), ("tokenizer", "gpt2"),
    ("tokens", "words"), ("token_budget", "high"), ("special_tokens", {"user": "u"}), ("key", "the key insight"),
    ("key", "answer"), ("keys", ["a", "b"]), ("sort_key", "length"), ("keyword", "bearer of news"), ("secretary", "x"),
    ("secret_word_length", 5), ("secret", 42), ("authors", "x"), ("authority", "x"), ("password_length", 8),
    ("no_password", True), ("api_key_env", "OPENAI_API_KEY"), ("revision", SHA),
    ("commit", SHA), ("cache_key", SHA), ("monkey", SHA),
    ("text", "The bearer of this ring, Bearer Street 12345"), ("text", "authorization: required"), ("text", "Authorization"),
    ("text", "the secret password is a token"), ("text", "a task-oriented-dialogue-benchmark"), ("url", "https://example.org:8000/v1"),
    ("text", "Bearer {token}"), ("turkey", "x"), ("passed", "x"), ("compass", "x"),
]  # fmt: skip


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_keys_that_name_a_secret(key) -> None:
    assert refused({"backend": {"options": {key: "abc"}}})
    assert refused({"backend": {"options": {"headers": {key: "abc"}}}})
    assert not refused({"backend": {"options": {key: ""}}})
    assert not refused({"backend": {"options": {key: True}}})


@pytest.mark.parametrize("value", SECRET_VALUES)
def test_values_that_look_like_a_secret(value) -> None:
    for inner in (value, [value], {"x": value}):
        assert refused({"backend": {"options": {"plain": inner}}})
    assert refused({"data": {"instruction": value}})


def test_what_is_secret_only_with_its_key() -> None:
    for options in (
        {"wandb_login": SHA}, {"wandb": {"key": SHA}}, {"key": SHA}, {"password": 12345678}, {"credentials": {"user": "a"}},
        {"api_keys": ["a"]}, {"api_tokens": ["a"]}, {"secrets": [{"x": "a"}]},
    ):  # fmt: skip
        assert refused({"backend": {"options": options}}), options


def test_a_secret_on_the_command_line_is_refused_and_not_printed(tmp_path: Path, capsys) -> None:
    from retrain.cli.main import main

    path = write(tmp_path, TINY)
    assert main(["explain", str(path), "--backend-opt", "authorization=Bearer abcq9def456"]) == 2
    said = capsys.readouterr()
    assert "backend.options.authorization holds what looks like a secret" in said.err
    assert "q9" not in said.out + said.err


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_refused_and_never_printed(tmp_path: Path, text: str) -> None:
    lines = problems(
        write(tmp_path, TINY.replace("data", "plugins", 0) + text if "[data]" not in text else text)
    )
    assert any(
        "looks like a secret" in line or "a section" in line or "wrong is not" in line for line in lines
    )
    printed = "\n".join(lines)
    assert "abc" not in printed.replace(str(tmp_path), "")


def test_ordinary_tokens_are_no_secrets() -> None:
    args = {"bos_token": "<s>", "max_token": 3}
    config = load_config({"data": {"source": "arithmetic", "template_args": args}})
    assert config.data.template_args == args


def test_origins_say_where_a_value_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + "[training]\nlr = 1e-4\nseed = 1\n")
    loaded = load(path, [Override.of("training.seed", 2, "--seed")])
    assert loaded.origins["training.lr"].where == f"{path}:4"
    assert loaded.origins["training.lr"].kind == "file"
    assert loaded.origins["training.seed"].where == "--seed"
    assert loaded.origins["training.seed"].kind == "flag"
    assert loaded.origins["training.max_steps"].kind == "default"
    assert loaded.config.training.seed == 2


def test_a_label_stands_for_the_path(tmp_path: Path) -> None:
    path = write(tmp_path, TINY + "[training]\nlr = 1e-4\n")
    loaded = load(path, label="template x")
    assert loaded.origins["training.lr"].where == "template x:4"
    assert loaded.path is None


def test_search_paths_start_at_the_file_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    loaded = load(write(tmp_path, TINY))
    assert loaded.search_paths == (tmp_path / "plugins", tmp_path / "here" / "plugins")


def test_mappings_overrides_and_configs_are_sources_too(tmp_path: Path) -> None:
    config = load_config(
        {"data": {"source": "jsonl", "path": tmp_path / "x.jsonl"}, "eval": {"temperature": None}},
        {"training.lr": 1e-3, "data.fields.question": "prompt"},
    )
    assert config.data.path == str(tmp_path / "x.jsonl")
    assert config.training.lr == 1e-3
    assert config.data.fields == {"question": "prompt"}
    assert load_config(config) == config
    assert load_config(config, {"training.lr": 1.0}).training.lr == 1.0


def test_a_later_change_of_the_callers_mapping_does_not_reach_the_config() -> None:
    source = {"data": {"source": "arithmetic", "template_args": {"a": [1]}}}
    config = load_config(source)
    source["data"]["template_args"]["a"].append(2)  # type: ignore[index]
    assert config.data.template_args == {"a": [1]}


def test_values_that_toml_cannot_hold_are_refused() -> None:
    lines = problems({"data": {"source": "arithmetic", "template_args": {"a": None, "b": object()}}})
    assert lines == [
        "data.template_args.a is null, which TOML cannot hold. Fix: leave it out, or write it as text.",
        "data.template_args.b is a object, which TOML cannot hold. Fix: leave it out, or write it as text.",
    ]


def test_environment_args_may_be_json_in_a_string() -> None:
    from retrain.config.schema import Environment

    assert Environment.model_validate({"args": '{"a": {"b": [1]}}'}).args == {"a": {"b": [1]}}
    assert Environment.model_validate({"args": ""}).args == {}


def test_aliases_of_uncertainty_are_resolved() -> None:
    for alias, name in (
        ("nll", "surprisal"),
        ("entropy", "shannon_entropy"),
        ("pred_var", "predictive_variance"),
    ):
        source = {"data": {"source": "arithmetic"}, "algorithm": {"uncertainty_kind": alias}}
        assert load_config(source).algorithm.uncertainty_kind == name
