"""The rank analysis of a campaign with [squeeze]: of the first run that is done, in a process of its own, while others go on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrain.campaign.launchers import limits
from retrain.config.schema import Squeeze
from retrain.squeeze import folder as output_folder
from retrain.tracking import layout
from retrain.tracking.run_log import write_atomically

log = logging.getLogger("retrain")

FOLDER = "squeeze"
"""Inside a campaign's directory: settings, analysis and output of the process."""


def output_of(settings: Squeeze) -> Path | None:
    """Where the compressed adapter goes; None without one."""
    return Path(settings.output_path).expanduser().absolute() if settings.output_path else None


def check(settings: Squeeze | None) -> None:
    """ConfigError where a new campaign's squeeze would write into a folder that holds something; before its first run."""
    output = output_of(settings) if settings is not None else None
    if output is not None:
        output_folder.check(output)


@dataclass(slots=True)
class Analysis:
    """``settings`` is [squeeze]; ``found`` is None until the analysis of ``run`` is there. A failure is told and leaves the
    campaign as it is: rerunning the campaign tries again."""

    directory: Path
    settings: Squeeze
    threads: int
    run: str = ""
    found: dict[str, Any] | None = None
    _process: subprocess.Popen[bytes] | None = None

    def begin(self, run: Path) -> None:
        """Analyse the adapter of a run that is done; does nothing where an analysis has begun."""
        if self._process is not None or self.found is not None or not (run / layout.ADAPTER).is_dir():
            return
        self.run = run.name
        folder = self.directory / FOLDER
        folder.mkdir(exist_ok=True)
        given = self.settings.model_dump(exclude_unset=True)
        given.pop("adapter_path", None)
        if output := output_of(self.settings):
            given["output_path"] = str(output)
        write_atomically(folder / "settings.json", json.dumps(given) + "\n", durable=False)
        words = [str(run / layout.ADAPTER), str(folder / "analysis.json"), str(folder / "settings.json")]
        with self._output().open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "retrain.squeeze.child", *words],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **limits(self.threads)},
                start_new_session=True,
            )  # fmt: skip

    def poll(self, *, wait: bool = False) -> bool:
        """True once, when the analysis has come."""
        if self._process is None or (not wait and self._process.poll() is None):
            return False
        code, self._process = self._process.wait(), None
        path = self.directory / FOLDER / "analysis.json"
        if code != 0 or not path.is_file():
            log.warning("The rank analysis of %s failed (its output: %s).", self.run, self._output())
            return False
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.found = {"run": self.run, **{k: record[k] for k in ("recommended_rank", "table", "compressed") if k in record}}
        log.info("Rank analysis of %s: %s keeps the variance asked for.", self.run, record["recommended_rank"])
        return True

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _output(self) -> Path:
        return self.directory / FOLDER / "output.txt"
