"""The rank analysis of a campaign with [squeeze]: of the first run that is done, in a process of its own, while others go on.

``python -m retrain.campaign.rank ADAPTER OUT.json SETTINGS.json`` is that process; its standard input is its lifeline.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from retrain.campaign import launchers
from retrain.config.schema import Squeeze
from retrain.squeeze import folder as output_folder
from retrain.tracking import layout
from retrain.tracking.run_log import write_atomically

log = logging.getLogger("retrain")

FOLDER = "squeeze"
"""Inside a campaign's directory: settings, analysis and output of the process."""
COMMAND = [sys.executable, "-P", "-m", "retrain.campaign.rank"]
_RUN = "run.txt"
"""Names the run whose adapter is analysed."""
_KEPT = ("recommended_rank", "least_rank", "table", "compressed")
_POLL_S = 0.1
_INTERRUPTED = 130


def output_of(settings: Squeeze) -> Path | None:
    """Where the compressed adapter goes; None without one."""
    return Path(settings.output_path).expanduser().absolute() if settings.output_path else None


def anchored(settings: Squeeze) -> Squeeze:
    """With the output's folder made absolute from the working directory, as ``logging.log_dir`` is."""
    output = output_of(settings)
    return settings if output is None else settings.model_copy(update={"output_path": str(output)})


def check(settings: Squeeze | None) -> None:
    """ConfigError where a new campaign's squeeze would write into a folder that holds something; before its first run."""
    output = output_of(settings) if settings is not None else None
    if output is not None:
        output_folder.check(output)


@dataclass(slots=True)
class Analysis:
    """``settings`` is [squeeze]; ``found`` is None until the analysis of ``run`` is there, and then given to
    ``keep``. A failure is told and leaves the campaign as it is: rerunning the campaign tries again. Which run is analysed
    is written down as the analysis begins, so that a campaign that goes on analyses the same. The process ends with the
    campaign's, however that ends."""

    directory: Path
    settings: Squeeze
    threads: int
    keep: Callable[[Mapping[str, Any]], None]
    run: str = ""
    found: dict[str, Any] | None = None
    _process: subprocess.Popen[bytes] | None = None

    def begin(self, run: Path) -> None:
        """Analyse the adapter of a run that is done; does nothing where an analysis has begun."""
        if self._process is not None or self.found is not None or self.run or not (run / layout.ADAPTER).is_dir():
            return
        self.run = run.name
        folder = self.directory / FOLDER
        folder.mkdir(exist_ok=True)
        # What an earlier start left is not what this one finds.
        (folder / "analysis.json").unlink(missing_ok=True)
        write_atomically(folder / _RUN, run.name + "\n")
        given = self.settings.model_dump(exclude_unset=True)
        given.pop("adapter_path", None)
        if output := output_of(self.settings):
            given["output_path"] = str(output)
        write_atomically(folder / "settings.json", json.dumps(given) + "\n", durable=False)
        words = [str(run / layout.ADAPTER), str(folder / "analysis.json"), str(folder / "settings.json")]
        with self._output().open("ab") as output:
            self._process = subprocess.Popen(
                [*COMMAND, *words],
                stdin=subprocess.PIPE, stdout=output, stderr=output,
                env={**os.environ, **launchers.limits(self.threads)}, start_new_session=True,
            )  # fmt: skip
        launchers.besides.append(self._process)

    def begun_with(self) -> str:
        """Name of the run that an earlier start of the campaign began to analyse, "" where there is none."""
        try:
            return (self.directory / FOLDER / _RUN).read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def poll(self) -> bool:
        """True once, when the analysis has come."""
        if self._process is None or self._process.poll() is None:
            return False
        code = self._process.wait()
        self._left()
        path = self.directory / FOLDER / "analysis.json"
        if code != 0 or not path.is_file():
            why = launchers.last_line(self._output()) or f"exit status {code}"
            log.warning(
                "The rank analysis of %s failed: %s (its output: %s). Going on with the campaign makes it again.",
                self.run, why, self._output(),
            )  # fmt: skip
            return False
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.found = {"run": self.run, **{k: record[k] for k in _KEPT if k in record}}
        self.keep(self.found)
        log.info("Rank analysis of %s: %s keeps the variance asked for.", self.run, record["recommended_rank"])
        if same := output_folder.uncompressed(record, "squeeze.compress_to ="):
            log.warning("%s: %s", record["compressed"]["output"], same)
        return True

    def wait(self, stop: threading.Event) -> bool:
        """``poll`` until the process has ended or ``stop`` is set."""
        while self._process is not None and self._process.poll() is None and not stop.wait(_POLL_S):
            pass
        return self.poll()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._left()

    def _left(self) -> None:
        assert self._process is not None
        launchers.let_go(self._process)
        launchers.besides.remove(self._process)
        self._process = None

    def _output(self) -> Path:
        return self.directory / FOLDER / "output.txt"


def main(arguments: Sequence[str]) -> int:
    """The process of an analysis, which ends when its standard input does; exit codes as of ``retrain``."""
    threading.Thread(target=_end_with_campaign, daemon=True).start()
    # By name: the package loads no model, and only this process of it does.
    return import_module("retrain.squeeze.child").main(arguments)


def _end_with_campaign() -> None:
    while os.read(0, 4096):
        pass
    # There is nothing to save: what the analysis writes, it writes last and whole.
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
