"""The JSON Schema: real validators accept every template and example, and flag what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from retrain.cli.main import main
from retrain.config import templates
from retrain.config.fields import settings
from retrain.config.json_schema import DRAFT, json_schema, use
from retrain.config.load import load
from retrain.errors import ConfigError

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    **{name: templates.read(name) for name in templates.TEMPLATES},
    **{path.parent.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("examples/*/retrain.toml"))},
    "own": 'backend.backend = "mine.make_backend"\n[algorithm]\ntransform_mode = "a.b:c"\nuncertainty_kind = "entropy"\n'
    '[logging]\ntrackers = ["wandb", "my.Sink"]\n[environment]\nprovider = "m.make_environment"\nargs = "{}"\n',
    "tables": '[data]\nsource = "mixture"\n[[data.mixture]]\nsource = "gsm8k"\nweight = 2\n[[data.mixture]]\nsource = "a.b"\n'
    'reward = "math"\n[reward]\ntype = "composite"\n[[reward.parts]]\ntype = "length"\nmax = 9\n[[reward.parts]]\n'
    'type = "math"\ngate = true\n[[eval.suites]]\nsource = "arithmetic"\nlevels = [1]\ntemperature = 1\n',
    "an engine of one's own": '[inference]\nengine = "m.Engine"\nattention_kernel = "triton"\ndtype = "fp8"\n'
    'kv_cache_dtype = "int8"\n',
    "what pytorch has": '[inference]\nattention_kernel = "flash"\ndtype = "bf16"\nkv_cache_dtype = "fp8"\n',
    "a source of one's own": '[data]\nsource = "m.load"\nfields = { foo = "x" }\n',
    "an evaluation of one's own": '[data]\nfields = { foo = "x" }\n[eval]\nsource = "m.load"\n',
    "our fields": '[data]\nsource = "jsonl"\npath = "a.jsonl"\nfields = { question = "q", answer = "a.b", id = "n" }\n',
    "a suite's name": '[[eval.suites]]\nsource = "math"\nname = "hard ones, 2"\n[[eval.suites]]\nsource = "gsm8k"\nname = ""\n',
    "a device": '[backend]\ndevices = "gpu:12"\n',
    "one text": '[data]\nsubjects = "all"\n[training]\ntemperature = 1\nstop = []\n[loss]\ngrad_clip = 0\n',
}
BAD = {
    "unknown key": "[training]\nlearning_rate = 1e-4\n",
    "unknown section": "[trainng]\nlr = 1e-4\n",
    "key at the top": "lr = 1e-4\n",
    "wrong type": '[training]\nmax_steps = "5"\n',
    "out of range": "[training]\ntop_p = 1.5\n",
    "at its open end": "[training]\nlr = 0.0\n",
    "unknown name": '[loss]\nkind = "ppoo"\n',
    "closed name": '[training]\ntruncated = "a.b"\n',
    "choice": '[loss]\nagg = "sum"\n',
    "no array": '[logging]\ntrackers = "wandb"\n',
    "empty array": "[data]\nlevels = []\n",
    "inside an array": "[data]\nlevels = [1, 9]\n",
    "a part without a type": "[[reward.parts]]\nweight = 1.0\n",
    "unknown key of a part": '[[reward.parts]]\ntype = "math"\nwieght = 1.0\n',
    "unknown name of a source": '[[data.mixture]]\nsource = "gsm9k"\n',
    "unknown key of a suite": '[[eval.suites]]\nsource = "math"\nweight = 1\n',
    "device": '[backend]\ndevices = "cuda:0"\n',
    "device in blanks": '[backend]\ndevices = " gpu:0 "\n',
    "two devices": '[backend]\ndevices = "gpu:0,cpu"\n',
    "a name with a slash": '[[eval.suites]]\nsource = "math"\nname = "a/b"\n',
    "a blank name": '[data]\nsource = "mixture"\n[[data.mixture]]\nsource = "math"\nname = "  "\n',
    "a part's name with a slash": '[reward]\ntype = "composite"\n[[reward.parts]]\ntype = "math"\nname = "a/b"\n',
    "a field that is not ours": '[data]\nsource = "jsonl"\npath = "a.jsonl"\nfields = { foo = "x" }\n',
    "and without a source": '[data]\nfields = { foo = "x" }\n',
    "and beside a source of one's own": '[data]\nsource = "m.load"\nfields = { foo = "x" }\n'
    '[eval]\nsource = "jsonl"\npath = "a.jsonl"\n',
    "an evaluation on a mixture": '[eval]\nsource = "mixture"\n',
    "a kernel of other engines": '[inference]\nattention_kernel = "triton"\n',
    "a number format of other engines": '[inference]\nengine = "pytorch"\ndtype = "fp8"\n',
    "a cache of other engines": '[inference]\nkv_cache_dtype = "int8"\n',
    "not in this version": '[inference]\nengine = "vllm"\n',
    "a scalar section": "training = 3\n",
    "code of a model": "[model]\ntrust_remote_code = true\n",
}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("name", GOOD)
def test_what_loads_is_accepted(name: str, validator: Any, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(GOOD[name])
    load(tmp_path / "c.toml")
    assert [e.message for e in validator.iter_errors(tomllib.loads(GOOD[name]))] == []


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_load_is_flagged(name: str, validator: Any, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(BAD[name])
    with pytest.raises(ConfigError):
        load(tmp_path / "c.toml")
    assert list(validator.iter_errors(tomllib.loads(BAD[name])))


def test_every_setting_has_its_words_and_its_default() -> None:
    schema = json_schema()
    assert schema["$schema"] == DRAFT
    assert "$ref" not in json.dumps(schema)
    for setting in settings().values():
        spec = schema["properties"][setting.section]
        for part in setting.name.split("."):
            assert spec["additionalProperties"] is False
            spec = spec["properties"][part]
        assert spec["description"] == setting.description
        default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
        if default is not None and "default" in spec:
            assert spec["default"] == default, setting.key
        assert "default" in spec or default is None or setting.type == "table", setting.key


LINTERS = {
    "taplo": ["check"],
    "tombi": ["lint", "--offline"],
}


@pytest.mark.parametrize("tool", LINTERS)
def test_an_editor_s_language_server_agrees(tool: str, tmp_path: Path) -> None:
    # Beside the interpreter, when its environment is not the shell's.
    program = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{tool} is not installed")
    assert main(["schema", "--output", str(tmp_path / "retrain.schema.json")]) == 0

    def passes(text: str) -> bool:
        path = tmp_path / "c.toml"
        path.write_text(f"{use('retrain.schema.json')}\n{text}")
        done = subprocess.run([program, *LINTERS[tool], str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.returncode == 0

    assert {name: passes(text) for name, text in GOOD.items()} == dict.fromkeys(GOOD, True)
    assert {name: passes(text) for name, text in BAD.items()} == dict.fromkeys(BAD, False)


def test_the_command_writes_prints_and_never_over_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["schema", "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == json_schema()
    assert out.err == ""
    assert main(["schema"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == json_schema()
    assert "#:schema ./retrain.schema.json" in out.err
    for _ in range(2):
        assert main(["schema", "--output", "s.json"]) == 0
        assert "#:schema ./s.json" in capsys.readouterr().out
    (tmp_path / "s.json").write_text("{}")
    assert main(["schema", "--output=s.json"]) == 2
    assert "no schema of ours" in capsys.readouterr().err
    assert main(["schema", "--output", "no/where.json"]) == 2
    assert main(["schema", "--output", "s.json", "--json"]) == 2
    assert main(["schema", "toml"]) == 2
