"""A campaign with [squeeze]: the first run that is done is analysed, once, and what was found stands in the manifest."""

from __future__ import annotations

import json

import pytest

from retrain.campaign import manifest, run
from retrain.config.load import load
from retrain.errors import ConfigError

CONFIG = """
[model]
model = "retrain/tiny"
lora_rank = 8
[backend]
devices = "cpu"
[training]
batch_size = 2
group_size = 4
max_tokens = 8
[data]
source = "arithmetic"
[reward]
type = "match"
[eval]
source = "arithmetic"
examples = 4
[logging]
log_dir = "logs"
[squeeze]
min_variance_retention = 0.9
[campaign]
seeds = [1]
max_steps = 1
threads = 1
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
advantage_mode = "maxrl"
transform_mode = "none"
"""


@pytest.mark.slow
def test_the_first_run_that_is_done_is_analysed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(CONFIG)
    result = run.execute(load("c.toml"), plain=True)
    assert result.status == "done"
    found = manifest.read(result.directory).squeeze
    assert found is not None
    assert found["run"] == "grpo+none_s1"
    assert found["recommended_rank"] in (1, 2, 4, 8)
    assert len(found["table"]) == 4
    path = result.directory / "squeeze" / "analysis.json"
    assert json.loads(path.read_text())["recommended_rank"] == found["recommended_rank"]

    # Going on with a campaign that has its analysis makes no second one.
    path.unlink()
    stored = load(result.directory / "config.toml", {"resume.from": str(result.directory)})
    assert run.execute(stored, plain=True).status == "done"
    assert not path.exists()
    assert manifest.read(result.directory).squeeze == found


def test_a_campaign_is_refused_where_its_squeeze_would_overwrite_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "adapter_model.safetensors").write_text("mine")
    (tmp_path / "c.toml").write_text(CONFIG.replace("[squeeze]", '[squeeze]\noutput_path = "precious"'))
    with pytest.raises(ConfigError, match=r"output_path = .*precious' is not empty"):
        run.execute(load("c.toml"), plain=True)
    assert not list((tmp_path / "logs").iterdir())
