"""Runs without torch, for tests of what starts runs: the real loop, files and processes around the package's fakes.

As a plug-in it brings learner, sampler and reward; importing it puts the fake renderer in the real one's place.
``backend.options``: ``step_s`` seconds of each step; ``signs`` is a folder in which a file named as a run holds what
befalls it: "kill 2", "raise 2", "refuse 0" or "die 0" (at that step; "die" while it loads). One named ``<run>~<lr>``
befalls the runs with that learning rate alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from retrain import plugins
from retrain.errors import ConfigError
from retrain.fakes import FakeBackend, FakeEngine, FakeRenderer, FakeReward

plugins.TABLE["renderer"]["chat"] = f"{__name__}:renderer"


class Renderer(FakeRenderer):
    fingerprint = "fake"
    context_length = 1 << 20
    def __init__(self):
        self.ignored_generation_settings = {}


def renderer(model, **_):
    return Renderer()


class Backend(FakeBackend):
    def __init__(self, config):
        super().__init__(positions=1, seed=config.training.seed)
        options, self.step = config.backend.options, 0
        self.step_s = float(options.get("step_s", 0))
        a = config.algorithm
        self.sign = Path(options["signs"]) / f"{a.advantage_mode}+{a.transform_mode}_s{config.training.seed}"
        own = Path(f"{self.sign}~{config.training.lr:g}")
        self.sign = own if own.exists() else self.sign
        if self._befalls(0) == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._befalls(0) == "refuse":
            raise ConfigError("light: this run is refused.", fix="none.")

    def _befalls(self, step):
        try:
            what, at = self.sign.read_text().split()
        except OSError:
            return ""
        return what if int(at) == step else ""

    def publish(self):
        what = self._befalls(self.version)
        if what == "raise":
            raise ValueError("this run always breaks here")
        if what == "kill":
            print("about to be killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.step_s)
        return super().publish()


def backend(config, renderer):
    return Backend(config)


def engine(config, renderer):
    return FakeEngine()


def reward(config, renderer):
    return FakeReward()


if __name__ == "__main__":
    # The campaign's own process reads the held-out tasks with the same renderer.
    import light  # noqa: F401

    from retrain.cli.main import main

    sys.exit(main(sys.argv[1:]))
