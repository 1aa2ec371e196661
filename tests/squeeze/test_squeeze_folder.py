"""What a squeeze writes: never over the adapter that it reads, never over what it did not write, and whole or not at all."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retrain import export_folder
from retrain.campaign import plan, rank
from retrain.config.load import dump_toml, load
from retrain.config.schema import Squeeze
from retrain.errors import ConfigError, ModelError, UsageError
from retrain.squeeze import child, folder
from retrain.squeeze.analysis import analyse
from retrain.squeeze.compress import compress
from retrain.subject import configure, find, with_its_run

_made = runpy.run_path(str(Path(__file__).with_name("made.py")))
FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter(place: Path, seed: int = 0) -> Path:
    made = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 10, generator=made), torch.randn(12, 4, generator=made)
    return _made["write"](place, {"model.layers.0.q_proj": (a, b)})


def held(place: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(place.iterdir())}


def test_an_adapter_is_not_squeezed_onto_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = adapter(tmp_path / "own")
    (tmp_path / "link").symlink_to(own)
    before = held(own)
    monkeypatch.chdir(tmp_path)
    for name in (Path("own"), tmp_path / "link", tmp_path / "x/../own"):
        with pytest.raises(ConfigError, match=r"that is squeezed[^\n]* Fix: "):
            compress(analyse(own, keep=True), 2, name)
    for name in ("own", "link", "own/deeper"):
        with pytest.raises(ConfigError, match="that is squeezed, or lies in it"):
            child.squeeze(own, Squeeze(output_path=name))
    assert held(own) == before


def test_a_compression_that_breaks_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out = analyse(adapter(tmp_path / "a")), tmp_path / "out"
    compress(found, 3, out)
    before = held(out)
    assert set(before) == set(FILES)
    # A link to the analysed file is replaced, not written through.
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / FILES[1]).symlink_to(tmp_path / "a" / FILES[1])
    whole = held(tmp_path / "a")
    compress(found, 2, tmp_path / "l")
    assert held(tmp_path / "a") == whole
    whole_file = bytearray((tmp_path / "a" / FILES[1]).read_bytes())
    whole_file[-4:] = torch.tensor(float("nan")).numpy().tobytes()  # of B, read after A was written
    (tmp_path / "a" / FILES[1]).write_bytes(whole_file)
    with pytest.raises(ModelError, match="not finite"):
        compress(found, 2, out)
    assert held(out) == before


def test_a_child_writes_only_where_nothing_or_its_own_is(tmp_path: Path) -> None:
    source, out = adapter(tmp_path / "a"), tmp_path / "out"
    precious = adapter(tmp_path / "precious", seed=1)
    before = held(precious)
    with pytest.raises(ConfigError, match=r"is not empty: it holds adapter_config\.json, which no squeeze of"):
        child.squeeze(source, Squeeze(output_path=str(precious)))
    assert held(precious) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no folder to write to"):
        child.squeeze(source, Squeeze(output_path=str(tmp_path / "file")))

    record = child.squeeze(source, Squeeze(output_path=str(out), compress_to=2))
    assert record["compressed"]["output"] == str(out)
    names = {*FILES, "squeeze.json", export_folder.MARKER}
    assert set(held(out)) == names
    assert set(json.loads((out / folder.MARKER).read_text())["files"]) == names - {folder.MARKER}
    # Of the same adapter again, as a campaign that is gone on with does; not of another one.
    child.squeeze(source, Squeeze(output_path=str(out), compress_to=3))
    assert load_file(out / FILES[1])["base_model.model.model.layers.0.q_proj.lora_A.weight"].shape[0] == 3
    with pytest.raises(ConfigError, match="no squeeze of"):
        child.squeeze(precious, Squeeze(output_path=str(out)))


def test_a_child_that_was_killed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = adapter(tmp_path / "a"), tmp_path / "out"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(child, "compress", killed)
        with pytest.raises(KeyboardInterrupt):
            child.squeeze(source, Squeeze(output_path=str(out)))
    (out / ".squeeze-left").mkdir()  # SIGKILL leaves it
    child.squeeze(source, Squeeze(output_path=str(out)))
    assert set(held(out)) == {*FILES, "squeeze.json", folder.MARKER}
    # A file that somebody put there is in the way, and stays.
    other = tmp_path / "other"
    with monkeypatch.context() as patched:
        patched.setattr(child, "compress", killed)
        with pytest.raises(KeyboardInterrupt):
            child.squeeze(source, Squeeze(output_path=str(other)))
    (other / FILES[1]).write_text("mine")
    with pytest.raises(ConfigError, match=r"holds adapter_model\.safetensors, which no squeeze wrote"):
        child.squeeze(source, Squeeze(output_path=str(other)))
    assert (other / FILES[1]).read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"bogus": 1}', r"squeeze\.bogus is not a setting"),
        ('{"target_ranks": [0]}', r"squeeze\.target_ranks"),
        ("[1]", "no JSON object"),
        ("{", "is no JSON"),
    ],
)
def test_a_childs_wrong_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, reason: str
) -> None:
    (tmp_path / "s.json").write_text(text)
    words = [str(adapter(tmp_path / "a")), str(tmp_path / "out.json"), str(tmp_path / "s.json")]
    assert child.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason.replace("\\", "") in line
    assert "Fix: " in line
    assert child.main(words[:1]) == 2
    assert not (tmp_path / "out.json").exists()


def test_a_campaign_is_not_begun_over_an_adapter(tmp_path: Path) -> None:
    precious = adapter(tmp_path / "precious")
    with pytest.raises(ConfigError, match=r"output_path = .* is not empty: it holds adapter_config\.json\. Fix: "):
        rank.check(Squeeze(output_path=str(precious)))
    rank.check(Squeeze(output_path=str(tmp_path / "new")))
    rank.check(Squeeze())
    rank.check(None)


def test_a_relative_output_is_that_of_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a campaign keeps of its settings names one folder, from wherever it goes on."""
    text = '[campaign]\nseeds = [1]\n[squeeze]\noutput_path = "small"\n'
    (tmp_path / "c.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    kept = plan.anchored(load("c.toml")).config
    (tmp_path / "kept.toml").write_text(dump_toml(kept))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = load(tmp_path / "kept.toml").config.squeeze
    assert again is not None
    assert rank.output_of(again) == tmp_path / "small"
    (tmp_path / "none.toml").write_text('[campaign]\nseeds = [1]\n')
    assert plan.anchored(load(tmp_path / "none.toml")).config.squeeze is None


def test_an_adapter_written_at_its_own_rank_says_that_nothing_is_compressed(tmp_path: Path) -> None:
    # Three equal directions of four: the table has 1, 2 and 4, and 3 would do.
    layer = _made["factors"]([1.0, 1.0, 1.0, 0.0], 12, 10)
    own = _made["write"](tmp_path / "own", {"model.layers.0.q_proj": layer})
    found = child.squeeze(own, Squeeze(output_path=str(tmp_path / "copy")))
    assert (found["recommended_rank"], found["least_rank"], found["rank"]) == (4, 3, 4)
    assert found["compressed"]["compresses"] is False
    assert (found["compressed"]["retained"], found["compressed"]["pooled"]) == (1.0, 1.0)
    said = folder.uncompressed(found, "--rank")
    assert said == "nothing is compressed: rank 4 is the adapter's own; --rank 3 is the least that keeps 95 % of the variance."
    less = child.squeeze(own, Squeeze(output_path=str(tmp_path / "less"), compress_to=3))
    assert less["compressed"]["compresses"] is True
    assert folder.uncompressed(less, "--rank") == ""
    assert folder.uncompressed({k: v for k, v in found.items() if k != "compressed"}, "--rank") == ""
    full = _made["write"](tmp_path / "full", {"model.layers.0.q_proj": _made["factors"]([1.0] * 4, 12, 10)})
    kept = child.squeeze(full, Squeeze(output_path=str(tmp_path / "all")))
    assert "no lower one keeps 95 %" in folder.uncompressed(kept, "--rank")


RUN = """
[model]
model = "retrain/tiny"
lora_rank = 4
[training]
max_steps = 6
max_tokens = 33
[data]
source = "arithmetic"
[reward]
type = "match"
[eval]
source = "arithmetic"
examples = 7
"""


def test_what_was_squeezed_of_a_run_is_evaluated_as_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    adapter(run / "adapter")
    (run / "config.toml").write_text(RUN)
    (run / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    child.squeeze(Path("run/adapter"), Squeeze(output_path="small", compress_to=2))
    child.squeeze(Path("small"), Squeeze(output_path="smaller", compress_to=1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for name, kept in (("small", 2), ("smaller", 1)):
        place = tmp_path / name
        settings = json.loads((place / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = "retrain/tiny"
        (place / "adapter_config.json").write_text(json.dumps(settings))
        target = with_its_run(find(str(place)))
        assert (target.kind, target.settings_of, target.adapter) == ("adapter", str(run), place)
        config = configure(target, [], ("eval.",), "eval").config
        assert (config.reward.type, config.eval.examples, config.training.max_tokens) == ("match", 7, 33)
        assert (config.model.lora_rank, config.lora.alpha) == (kept, settings["lora_alpha"])
    for text in ("[nonsense]\nx = 1\n", None):
        (run / "config.toml").write_text(text) if text else (run / "config.toml").unlink()
        assert with_its_run(find(str(tmp_path / "small"))) == find(str(tmp_path / "small"))
    for text in ("{", "[]", '{"squeezed_from": 3}', '{"squeezed_from": "run"}', json.dumps({"squeezed_from": str(place)})):
        (tmp_path / "smaller/squeeze.json").write_text(text)
        assert with_its_run(find(str(place))).settings_of == ""


def test_a_campaign_is_not_taken_for_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "c/runs/b_s1").mkdir(parents=True)
    (tmp_path / "c/manifest.json").write_text("{}")
    (tmp_path / "c/config.toml").write_text("")
    with pytest.raises(UsageError, match=r"is a campaign.* none is done"):
        find(str(tmp_path / "c"))
    for name in ("a_s1", "b_s1", "c_s1"):
        (tmp_path / "c/runs" / name).mkdir(exist_ok=True)
        (tmp_path / "c/runs" / name / "config.toml").write_text(RUN)
        (tmp_path / "c/runs" / name / "run.json").write_text("{}")
    adapter(tmp_path / "c/runs/b_s1/adapter")
    with pytest.raises(UsageError, match=rf"name one of its runs: {tmp_path}/c/runs/b_s1\."):
        find(f"{tmp_path}/c/")
