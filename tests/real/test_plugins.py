"""Plug-ins of every kind through the real command line: from a clean folder, a process of its own, no PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BASE = """
[model]
model = "retrain/tiny"
lora_rank = 4
[backend]
devices = "cpu"
[algorithm]
{algorithm}
[training]
seed = 3
max_steps = 2
batch_size = 2
group_size = 4
max_tokens = 16
temperature = 1.0
{rest}
[logging]
log_dir = "{log_dir}"
{logging}
"""

PLUGINS = {
    "my_advantage.py": """
def ranked(rewards_G, *, scale):
    order = rewards_G.argsort().argsort().astype(float)
    return scale * (order - order.mean())
""",
    "my_transform.py": """
import numpy as np
from my_shared import STRENGTH

def early(group, advantages_G_T, context):
    "More credit for earlier tokens."
    return [(a * np.linspace(STRENGTH, context.params["last"], len(a))).astype(np.float32) for a in advantages_G_T]

def make_transform_spec():
    return early
""",
    "my_shared.py": "STRENGTH = 2.0\n",
    "my_uncertainty.py": """
import numpy as np

class Position:
    def __call__(self, rollout):
        return np.where(rollout.sampled_T, np.arange(len(rollout.sampled_T)), np.nan)

position = Position()
""",
    "my_detector.py": """
import numpy as np

class Digits:
    def __init__(self, config):
        self.least = config.training.group_size
    def __call__(self, text, offsets):
        return np.array([text[a:b].isdigit() for a, b in offsets], dtype=bool)
""",
    "my_reward.py": """
from retrain.types import Score

class LastDigit:
    bounds = (0.0, 1.0)
    async def score(self, task, rollouts_G):
        return [Score(float(len(r.text) % 7) / 7, passed=len(r.text) % 2 == 0) for r in rollouts_G]

def build(config, renderer):
    assert renderer.stop_ids
    return LastDigit()
""",
    "my_source.py": """
from retrain.types import Message, Task

def sums(data, split):
    return [
        Task(f"sums/{split}/{i}", (Message("user", f"{i} + {i} = ?"),), str(2 * i), "sums", 0) for i in range(20, 30)
    ]
""",
    "my_loss.py": """
import torch

def reinforce(tokens, settings):
    never = torch.zeros_like(tokens.new_N, dtype=torch.bool)
    return -tokens.new_N * tokens.advantages_N, never
""",
    "my_sink.py": """
import json

class Lines:
    def __init__(self, config, run_dir):
        self.file = (run_dir / "mine.jsonl").open("w")
    def log(self, step, metrics):
        self.file.write(json.dumps({"step": step, "reward": metrics.get("mean_reward")}) + "\\n")
    def close(self):
        self.file.close()
""",
    "my_algorithm.py": """
import numpy as np

def surprising(group, context):
    out = []
    for rollout, score, u_T in zip(group.rollouts_G, group.scores_G, context.uncertainty_G_T):
        a_T = np.where(rollout.sampled_T, (score.reward - 0.5) * context.params["scale"] * (1 + u_T), 0.0)
        out.append(a_T.astype(np.float32))
    return out

surprising.uses_sepa = True
""",
}

EVERYTHING = {
    "algorithm": """
advantage_mode = "my_advantage.ranked"
advantage_params = { scale = 0.5 }
transform_mode = "my_transform:make_transform_spec"
transform_params = { last = 0.5 }
uncertainty_kind = "my_uncertainty.position"
""",
    "rest": """
[planning]
detector = "my_detector:Digits"
[data]
source = "my_source.sums"
[reward]
type = "my_reward.build"
[loss]
kind = "my_loss:reinforce"
""",
    "logging": 'trackers = ["my_sink.Lines"]',
}

PLAIN = {
    "algorithm": 'advantage_mode = "grpo"\ntransform_mode = "none"',
    "rest": '[data]\nsource = "arithmetic"\n[reward]\ntype = "my_reward.build"',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project" / "plugins").mkdir(parents=True)
    for name, text in PLUGINS.items():
        (tmp_path / "project" / "plugins" / name).write_text(text)
    return tmp_path


def retrain(folder: Path, *arguments: str, **parts: str) -> subprocess.CompletedProcess[str]:
    """Write the TOML and run it from another folder, without anything of this process's search paths."""
    log_dir = (folder / "run").as_posix()
    text = BASE.format(**{"algorithm": "", "rest": "", "logging": "", "log_dir": log_dir, **parts})
    (folder / "project" / "retrain.toml").write_text(text)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "-m", "retrain", "project/retrain.toml", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_of_plug_ins_of_every_kind_and_its_resume(folder: Path) -> None:
    done = retrain(folder, **EVERYTHING)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "run"
    metrics = records(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1]
    # The loss is REINFORCE's at the first update: -sum A log pi / N, not the ratio's.
    assert all(m["loss"] is not None and m["ratio_mean"] == pytest.approx(1.0, abs=1e-4) for m in metrics)
    assert records(run / "mine.jsonl") == [{"step": m["step"], "reward": m["mean_reward"]} for m in metrics]
    tasks = [t["task"] for row in records(run / "emergence/steps.jsonl") for t in row["tasks"]]
    assert len(tasks) == 4
    assert all(t.startswith("sums/train/") for t in tasks)
    generations = records(run / "emergence/generations.jsonl")
    assert generations
    for row in generations:
        assert row["reward"] == pytest.approx(len(row["completion"]) % 7 / 7)
        if row["skipped"]:
            assert row["advantage_mean"] == 0
    assert any(g["advantage_mean"] != 0 for g in generations)
    facts = json.loads((run / "run.json").read_text())["facts"]
    assert len(facts["plugins"].split(", ")) == 8
    # A file that a plug-in imports is part of its code; the run goes on and says so.
    (folder / "project/plugins/my_shared.py").write_text("STRENGTH = 3.0\n")
    more = retrain(folder, "--resume", "run", "--max-steps", "3", **EVERYTHING)
    assert more.returncode == 0, more.stdout + more.stderr
    said = next(line for line in more.stdout.splitlines() if "byte-exact" in line)
    assert "a plug-in's code was my_advantage.ranked " in said
    assert [m["step"] for m in records(run / "metrics.jsonl")] == [0, 1, 2]


def test_an_algorithm_of_ones_own_replaces_the_pipeline(folder: Path) -> None:
    algorithm = 'algorithm_mode = "my_algorithm:surprising"\nparams = { scale = 4.0 }'
    rest = '[sepa]\ncorrect_rate_gate = 0.0\ndelay_steps = 0\nsteps = 1\n[data]\nsource = "arithmetic"\n'
    done = retrain(folder, algorithm=algorithm, rest=rest + '[reward]\ntype = "my_reward.build"')
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = records(folder / "run" / "metrics.jsonl")
    assert [m["sepa_lambda"] for m in metrics] == [0.0, 1.0]
    assert [m["condition"] for m in metrics] == ["my_algorithm:surprising"] * 2
    again = retrain(
        folder,
        "--resume",
        "run",
        "--max-steps",
        "3",
        algorithm=algorithm,
        rest=rest + '[reward]\ntype = "my_reward.build"',
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "byte-exact: " in again.stdout
    assert "plug-in" not in again.stdout


BROKEN = {
    "my_typo.py": "def score(response, reference):\n    return 1.0\n",
    "my_raise.py": "\n\nraise ValueError('no such luck')\n",
    "my_syntax.py": "def f(:\n    pass\n",
    "my_import.py": "\nimport nobody_has_this\n",
    "my_nonsense.py": """
import numpy as np
THING = 3

def advantage(rewards_G):
    return "nonsense"

def raises(rewards_G):
    raise KeyError("gone")

def transform(group, advantages_G_T, context):
    return [a[:-1] for a in advantages_G_T]

def everywhere(group, advantages_G_T, context):
    return [np.ones(len(a)) for a in advantages_G_T]

def algorithm(group, context):
    return None

def uncertainty(rollout):
    return np.zeros(3)

def detector(config):
    return lambda text, offsets: np.zeros(len(offsets))

def no_detector(config):
    return 3

def reward(config, renderer):
    return object()

class Numbers:
    async def score(self, task, rollouts_G):
        return [1.0 for _ in rollouts_G]

class Raises:
    async def score(self, task, rollouts_G):
        raise ArithmeticError("no luck")

def numbers(config, renderer):
    return Numbers()

def raising(config, renderer):
    return Raises()

def refuses(config, renderer):
    return 1 / 0

def source(data, split):
    return ["a task"]

def loss(tokens, settings):
    return 0.0

def sink(config, run_dir):
    return object()

class Ends:
    def __init__(self, how):
        self.how = how
    async def fails(self):
        raise LookupError("lost it")
    async def attempt(self, task, n, engine, sampling):
        if self.how == "raises":
            raise LookupError("lost it")
        rollouts = await self.real.attempt(task, n, engine, sampling)
        if self.how == "group":
            import asyncio
            async with asyncio.TaskGroup() as group:
                group.create_task(self.fails())
        from dataclasses import replace
        changed = {
            "textless": {"text": None}, "stopped": {"stop": "eos"}, "sure": {"logprobs_T": rollouts[0].logprobs_T + 99},
            "first": {
                "sampled_T": rollouts[0].sampled_T | True, "entropies_T": None,
                "logprobs_T": np.full_like(rollouts[0].logprobs_T, -1.0),
            },
        }.get(self.how)
        if changed:
            return [replace(rollouts[0], **changed), *rollouts[1:]]
        if self.how == "nan":
            replace(rollouts[0], logprobs_T=rollouts[0].logprobs_T * np.nan)
        return {"none": None, "short": rollouts[1:], "turned": rollouts[::-1]}[self.how]

def environments(how):
    def make(config, renderer):
        from retrain.environments.single_turn import SingleTurn
        made = Ends(how)
        made.real = SingleTurn(renderer)
        return made
    return make

env_raises, env_none, env_short, env_turned = map(environments, ("raises", "none", "short", "turned"))
env_textless, env_stopped, env_sure, env_first, env_nan, env_group = map(
    environments, ("textless", "stopped", "sure", "first", "nan", "group")
)

def env_not_async(config, renderer):
    class Plain:
        def attempt(self, task, n, engine, sampling):
            return []
    return Plain()

def engine_of(change):
    def make(config, renderer):
        from retrain.engines import torch_engine
        made = torch_engine.build(config, renderer)
        generate = made.generate
        async def other(prompt_ids, n, sampling):
            return change(await generate(prompt_ids, n, sampling))
        made.generate = other
        return made
    return make

engine_none = engine_of(lambda completions: None)
engine_long = engine_of(lambda completions: [longer(c) for c in completions])
engine_raises = engine_of(lambda completions: completions[99])

def engine_with(**change):
    from dataclasses import replace
    def first(c):
        return replace(c, **{k: f(c) for k, f in change.items()})
    return engine_of(lambda completions: [first(completions[0]), *completions[1:]])

engine_beyond = engine_with(token_ids_T=lambda c: c.token_ids_T + 10**6)
engine_negative = engine_with(token_ids_T=lambda c: c.token_ids_T - 10**6)
engine_floats = engine_with(token_ids_T=lambda c: c.token_ids_T + 0.5)
engine_sure = engine_with(logprobs_T=lambda c: np.full_like(c.logprobs_T, 0.5))
engine_rounded = engine_with(logprobs_T=lambda c: np.minimum(c.logprobs_T + 5e-4, 5e-4))
engine_eos = engine_with(stop=lambda c: "eos")
engine_stale = engine_with(weights_version=lambda c: c.weights_version - 1)
engine_nan = engine_with(logprobs_T=lambda c: c.logprobs_T * np.nan)

def engine_not_async(config, renderer):
    from retrain.engines import torch_engine
    made = torch_engine.build(config, renderer)
    class Plain:
        load, close = made.load, made.close
        def generate(self, prompt_ids, n, sampling):
            return [c for c in made.generate(prompt_ids, n, sampling)]
    return Plain()

def longer(c):
    from dataclasses import replace
    ids = np.tile(c.token_ids_T, 99)
    return replace(c, token_ids_T=ids, logprobs_T=np.zeros(len(ids), np.float32), entropies_T=None)

def engine_half(config, renderer):
    class Half:
        def load(self, weights): ...
        def close(self): ...
    return Half()

def backend_of(**changes):
    def make(config, renderer):
        from retrain.backends import local
        made = local.build(config, renderer)
        for name, change in changes.items():
            setattr(made, name, change)
        return made
    return make

def refuse(*arguments):
    raise MemoryError("too small")

backend_raises = backend_of(train_step=refuse)
backend_none = backend_of(train_step=lambda batch, optim: None)
backend_unpublished = backend_of(publish=lambda: 3)

def backend_reporting(**change):
    def make(config, renderer):
        from dataclasses import replace
        from retrain.backends import local
        made = local.build(config, renderer)
        step = made.train_step
        made.train_step = lambda batch, optim: replace(step(batch, optim), **change)
        return made
    return make

backend_nan = backend_reporting(loss=float("nan"))
backend_text = backend_reporting(loss="x")
backend_listed = backend_reporting(grad_norm=[1.0])
backend_true = backend_reporting(approx_kl=True)
backend_half = backend_reporting(num_microbatches=1.5)
backend_numpy = backend_reporting(loss=np.float32(0.5), grad_clipped=np.bool_(True), num_microbatches=np.int64(2))
backend_silent = backend_reporting(loss=None, update_skipped="the loss was nan")

backend_unsaved = backend_of(snapshot=None, save=lambda directory: None)
backend_torn = backend_of(snapshot=lambda: lambda directory: None)
backend_three = backend_of(snapshot=lambda: 3)
backend_stuck = backend_of(close=refuse)

class Stuck:
    bounds = (0.0, 1.0)
    def __init__(self, config, where):
        pass
    async def score(self, task, rollouts_G):
        from retrain.types import Score
        return [Score(i % 2) for i in range(len(rollouts_G))]
    def log(self, step, metrics):
        pass
    def close(self):
        refuse()

def backend_coarse(config, renderer):
    from retrain.backends.local import LocalBackend
    from retrain.backends import local
    from retrain.types import Capabilities
    class Coarse(LocalBackend):
        capabilities = Capabilities(loop=False, token_advantages=True, resume=True, reports_loss=True)
    made = local.build(config, renderer)
    made.__class__ = Coarse
    return made
""",
}


@pytest.fixture
def broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with broken plug-ins; runs happen in this process, which is much quicker to start."""
    for name, text in BROKEN.items():
        (folder / "project" / "plugins" / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    from retrain import plugins

    monkeypatch.setattr(plugins, "_search_paths", [])
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def refused(
    broken: Path, capsys: pytest.CaptureFixture[str], key: str, name: str, *more: str
) -> tuple[int, str]:
    from retrain.cli.main import main

    text = BASE.format(**PLAIN, logging="", log_dir=(broken / "run").as_posix())
    (broken / "project" / "retrain.toml").write_text(text)
    value = f'["{name}"]' if key == "logging.trackers" else name
    code = main(["project/retrain.toml", f"--{key}", value, *more])
    return code, capsys.readouterr().err


KINDS = {
    "advantage": "algorithm.advantage_mode",
    "transform": "algorithm.transform_mode",
    "algorithm": "algorithm.algorithm_mode",
    "uncertainty": "algorithm.uncertainty_kind",
    "detector": "planning.detector",
    "reward": "reward.type",
    "source": "data.source",
    "environment": "environment.provider",
    "engine": "inference.engine",
    "backend": "backend.backend",
    "loss": "loss.kind",
    "sink": "logging.trackers",
}


MISSING = ("zzz.score", "needs the module 'zzz', which is not installed. Fix: put zzz.py into ")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [(kind, *MISSING) for kind in KINDS]
    + [
        ("transform", *pair)
        for pair in (
            (
                "my_typos.score",
                "needs the module 'my_typos', which is not installed. Fix: did you mean 'my_typo' (",
            ),
            ("my_typo.scor", "my_typo has no 'scor'. Fix: did you mean 'score'?"),
            ("my_typo:score.zzz", "my_typo has no 'zzz'."),
            ("my_raise.f", "my_raise fails on import: ValueError: no such luck (my_raise.py:3)."),
            ("my_syntax.f", "my_syntax fails on import: SyntaxError: "),
            (
                "my_import.f",
                "needs the module 'nobody_has_this', imported in my_import.py:2, which is not installed.",
            ),
            ("my_nonsense.THING", "is a int, not something to call."),
            ("plugins/my_typo.py", "is not the path of an object in a module."),
            ("my_typo.", "is not the path of an object in a module."),
        )
    ],
)
def test_what_cannot_be_loaded_is_one_line_before_a_model_loads(
    broken: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, message: str
) -> None:
    code, err = refused(broken, capsys, KINDS[kind], name)
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len([line for line in lines if "Error" in line or "error" in line or name in line]) >= 1, err
    assert any(f"{kind} {name!r}" in line and message in line for line in lines), err
    assert "Traceback" not in err
    assert "Loading" not in err


@pytest.mark.parametrize(
    ("kind", "name", "positional"),
    [
        ("transform", "my_nonsense.advantage", "(group, advantages_G_T, context)"),
        ("algorithm", "my_nonsense.advantage", "(group, context)"),
        ("uncertainty", "my_nonsense.transform", "(rollout)"),
        ("detector", "my_nonsense.transform", "(config)"),
        ("reward", "my_nonsense.transform", "(config, renderer)"),
        ("source", "my_nonsense.transform", "(data, split)"),
        ("environment", "my_nonsense.transform", "(config, renderer)"),
        ("engine", "my_nonsense.transform", "(config, renderer)"),
        ("backend", "my_nonsense.transform", "(config, renderer)"),
        ("loss", "my_nonsense.transform", "(tokens, settings)"),
        ("sink", "my_nonsense.transform", "(config, run_dir)"),
        ("advantage", "my_nonsense.Numbers", "(rewards_G)"),
    ],
)
def test_a_wrong_signature_is_one_line_before_a_model_loads(
    broken: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, positional: str
) -> None:
    code, err = refused(broken, capsys, KINDS[kind], name)
    assert code == 2
    assert f"{kind} {name!r} cannot be called with {positional}: " in err
    assert f"Fix: define it as {name.rpartition('.')[2]}{positional}." in err
    assert "Loading" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("kind", "name", "code", "message"),
    [
        ("advantage", "advantage", 2, "advantage 'my_nonsense.advantage' returned shape (), expected (4,)"),
        (
            "advantage",
            "raises",
            1,
            "advantage 'my_nonsense.raises' raised KeyError: 'gone' (my_nonsense.py:9)",
        ),
        ("transform", "transform", 2, "transform 'my_nonsense.transform' returned shape"),
        ("transform", "everywhere", 2, "gave credit to a token that was not sampled"),
        ("algorithm", "algorithm", 2, "algorithm 'my_nonsense.algorithm' returned a NoneType, not a list"),
        ("uncertainty", "uncertainty", 2, "uncertainty 'my_nonsense.uncertainty' returned shape (3,)"),
        ("detector", "detector", 2, "detector 'my_nonsense.detector' returned float64 values, not bool"),
        (
            "detector",
            "no_detector",
            2,
            "detector 'my_nonsense.no_detector' made a int, not something to call.",
        ),
        ("reward", "reward", 2, "reward 'my_nonsense.reward' made a object, which has no method score."),
        ("reward", "refuses", 2, "raised ZeroDivisionError: division by zero (my_nonsense.py:47)."),
        (
            "reward",
            "numbers",
            1,
            "reward 'my_nonsense.numbers' returned 4 values for 4 rollouts, not one Score",
        ),
        ("reward", "raising", 1, "ArithmeticError: no luck"),
        ("source", "source", 2, "source 'my_nonsense.source' did not return a list of Task."),
        ("loss", "loss", 2, "loss 'my_nonsense.loss' returned float, not two tensors."),
        ("sink", "sink", 2, "sink 'my_nonsense.sink' made a object, which has no method log."),
        ("environment", "sink", 2, "environment 'my_nonsense.sink' made a object, which has no method attempt."),
        ("environment", "env_raises", 1, "environment 'my_nonsense.env_raises' raised LookupError: lost it (my_nonsense"),
        ("environment", "env_none", 1, "environment 'my_nonsense.env_none' returned a NoneType, not 4 of type Rollout."),
        ("environment", "env_short", 1, "environment 'my_nonsense.env_short' returned 3 values, not 4 of type Rollout."),
        ("environment", "env_turned", 1, "returned member 3 of 'arithmetic/train/"),
        ("engine", "engine_half", 2, "engine 'my_nonsense.engine_half' made a Half, which has no method generate."),
        ("engine", "engine_none", 1, "engine 'my_nonsense.engine_none' returned a NoneType, not 4 of type Completion."),
        ("engine", "engine_long", 1, "tokens where at most 16 were asked for."),
        ("engine", "engine_raises", 1, "engine 'my_nonsense.engine_raises' raised IndexError: list index out of range"),
        ("engine", "engine_beyond", 1, "outside the vocabulary of 384 tokens."),
        ("engine", "engine_negative", 1, "engine 'my_nonsense.engine_negative' returned token id -"),
        ("engine", "engine_floats", 1, "returned token ids as an array of float64 with 1 axes."),
        ("engine", "engine_sure", 1, "engine 'my_nonsense.engine_sure' returned a logprob of 0.5, above 0."),
        ("engine", "engine_eos", 1, "engine 'my_nonsense.engine_eos' returned stop = 'eos', not 'stop' or 'length'."),
        ("engine", "engine_stale", 1, "returned weights_version = -1 where version 0 was loaded."),
        ("engine", "engine_not_async", 2, "engine 'my_nonsense.engine_not_async': its generate is not async."),
        ("environment", "env_not_async", 2, "environment 'my_nonsense.env_not_async': its attempt is not async."),
        ("environment", "env_textless", 1, "with text = None, not a text. Fix: return what retrain.types.Rollout"),
        ("environment", "env_stopped", 1, "environment 'my_nonsense.env_stopped' returned a rollout of 'arithmetic/"),
        ("environment", "env_sure", 1, "above 0."),
        ("environment", "env_group", 1, "environment 'my_nonsense.env_group' raised LookupError: lost it (my_nonsense"),
        ("environment", "env_first", 1, "with a sampled first token, which no prompt comes before."),
        ("backend", "sink", 2, "backend 'my_nonsense.sink' made a object, which has no property capabilities."),
        ("backend", "backend_raises", 1, "backend 'my_nonsense.backend_raises' raised MemoryError: too small (my_nonsense"),
        ("backend", "backend_none", 1, "backend 'my_nonsense.backend_none': its train_step returned a NoneType."),
        ("backend", "backend_unpublished", 1, "its publish returned a int."),
        ("backend", "backend_nan", 1, "backend 'my_nonsense.backend_nan': its train_step reported loss = nan. Fix: report None,"),
        ("backend", "backend_text", 1, "its train_step reported loss = 'x', not a value of type float | None."),
        ("backend", "backend_listed", 1, "its train_step reported grad_norm = [1.0], not a value of type float | None."),
        ("backend", "backend_true", 1, "its train_step reported approx_kl = True, not a value of type float | None."),
        ("backend", "backend_half", 1, "its train_step reported num_microbatches = 1.5, not a value of type int."),
        ("backend", "backend_torn", 1, "backend 'my_nonsense.backend_torn': its save wrote no adapter/ into the checkpoint."),
        ("backend", "backend_three", 1, "backend 'my_nonsense.backend_three': its snapshot returned a int."),
        ("backend", "backend_coarse", 2, "says that it does not take part in this training loop."),
    ],
)
def test_nonsense_is_named(
    broken: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, code: int, message: str
) -> None:
    got, err = refused(broken, capsys, KINDS[kind], f"my_nonsense.{name}")
    assert message in err
    assert got == code
    assert "retrain's own bug" not in err
    assert name == "raising" or "Traceback" not in err


def test_several_wrong_plug_ins_are_reported_at_once(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from retrain.cli.main import main

    text = BASE.format(**PLAIN, logging="", log_dir=(broken / "run").as_posix())
    (broken / "project" / "retrain.toml").write_text(text)
    code = main(["project/retrain.toml", "--reward.type", "my_raise.f", "--loss.kind", "my_syntax.f"])
    err = capsys.readouterr().err
    assert code == 2
    assert "reward 'my_raise.f'" in err
    assert "loss 'my_syntax.f'" in err


@pytest.mark.parametrize("every", ["0", "1"])
def test_a_backend_that_saves_no_adapter_is_named_at_the_first_checkpoint(
    broken: Path, capsys: pytest.CaptureFixture[str], every: str
) -> None:
    code, err = refused(broken, capsys, "backend.backend", "my_nonsense.backend_unsaved", "--save-every", every)
    assert code == 1
    assert "backend 'my_nonsense.backend_unsaved': its save wrote no adapter/ into the checkpoint." in err
    assert "Traceback" not in err
    assert len(records(broken / "run" / "metrics.jsonl")) == (1 if every == "1" else 2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("engine", "engine_rounded"), ("backend", "backend_numpy"), ("backend", "backend_silent")],
)
def test_what_is_unusual_and_right_is_trained(
    broken: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    code, err = refused(broken, capsys, KINDS[kind], f"my_nonsense.{name}")
    assert code == 0, err
    last = records(broken / "run" / "metrics.jsonl")[-1]
    if name == "backend_numpy":
        assert (last["loss"], last["grad_clipped"], last["num_microbatches"]) == (0.5, True, 2)


@pytest.mark.parametrize(
    ("kind", "name", "warning"),
    [
        ("backend", "backend_stuck", "backend 'my_nonsense.backend_stuck' raised MemoryError: too small (my_nonsense.py:"),
        ("reward", "Stuck", "reward 'my_nonsense.Stuck' raised MemoryError: too small (my_nonsense.py:"),
        ("sink", "Stuck", "Stuck failed to close: too small"),
    ],
)
def test_an_error_while_a_part_is_closed_is_a_warning(
    broken: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, warning: str
) -> None:
    code, err = refused(broken, capsys, KINDS[kind], f"my_nonsense.{name}")
    assert code == 0, err
    events = (broken / "run" / "events.log").read_text()
    assert events.count(f"WARNING {warning}") == 1
    assert (broken / "run" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("kind", "name", "line"),
    [("engine", "engine_nan", "return replace(c, **"), ("environment", "env_nan", "replace(rollouts[0], logprobs_T=")],
)
def test_an_error_out_of_a_value_of_ours_names_the_users_line(
    broken: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, line: str
) -> None:
    code, err = refused(broken, capsys, KINDS[kind], f"my_nonsense.{name}")
    assert code == 1
    number = BROKEN["my_nonsense.py"].partition(line)[0].count("\n") + 1
    assert f"{kind} 'my_nonsense.{name}' raised ValueError: " in err
    assert f"(my_nonsense.py:{number})." in err
