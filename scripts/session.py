"""Records a terminal session with the tool as text: init, explain, a run with its live view, status, diff, report.

    python scripts/session.py            writes docs/session.md
    python scripts/session.py --check    plays it all, checks what must be seen, writes nothing

Every line is what a real terminal of 110 columns showed (tmux). Only the temporary folder's path is replaced.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "session.md"
WIDTH, HEIGHT = 110, 40


@dataclass(frozen=True)
class Scene:
    """One command: what to say about it, what must be seen, and whether to look while it runs."""

    title: str
    words: str
    command: str
    seen: tuple[str, ...]
    live: tuple[str, ...] = ()
    """What must be on the screen at the moment that is recorded in the middle of the command."""


SCENES = (
    Scene(
        "A configuration", "A template that needs no download and no GPU.", "retrain init --template tiny",
        ("Wrote retrain.toml",),
    ),
    Scene(
        "Before it runs", "What the run will do, need and cost.", "retrain explain",
        ("rollouts", "trainable", "memory"),
    ),
    Scene(
        "The run", "In the middle of it: the live view stays below the lines of the finished steps.",
        "retrain --max-steps 12 --log-dir logs/first", ("Step 11", "Adapter:"), ("Step 5", "Step 6"),
    ),
    Scene(
        "A second one", "Only the learning rate differs. Piped output is plain lines.",
        "retrain --max-steps 12 --log-dir logs/second --lr 3e-4 | tail -n 4", ("Step 11",),
    ),
    Scene("How they did", "", "retrain status logs", ("first", "second", "done")),
    Scene("What differs", "", "retrain diff logs/first logs/second", ("training.lr",)),
    Scene("To look at and to send", "", "retrain report logs/first", ("report.html",)),
)  # fmt: skip


class Terminal:
    """A tmux session of its own, on a socket of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._codes = folder, folder / ".codes"
        self._socket = f"retrain-session-{os.getpid()}"
        bin_folder = Path(sys.executable).parent
        keep = ("LANG", "LC_ALL", "OMP_NUM_THREADS", "TMPDIR")
        environment = {key: os.environ[key] for key in keep if key in os.environ} | {
            "HOME": str(folder), "TERM": "xterm-256color", "PATH": f"{bin_folder}:/usr/local/bin:/usr/bin:/bin", "PS1": "$ ",
            "PROMPT_COMMAND": f'echo $? >> "{self._codes}"', "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        (folder / ".tmux.conf").write_text("set -g history-limit 5000\nset -g status off\n")
        work = folder / "experiment"
        work.mkdir()
        self._tmux(
            "-f", str(folder / ".tmux.conf"), "new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), "-c", str(work),
            "env", "-i", *(f"{k}={v}" for k, v in environment.items()), "bash", "--norc", "--noprofile", "-i",
        )  # fmt: skip
        self._wait(lambda: len(self._finished()) == 1, 20)

    def close(self) -> None:
        """End the session and everything in it."""
        self._tmux("kill-server")

    def play(self, scene: Scene) -> tuple[str, str, int]:
        """What the screen held in the middle ("" unless asked) and all of it at the end; the exit status."""
        before = len(self._finished())
        self._tmux("send-keys", "clear", "Enter")
        self._wait(lambda: len(self._finished()) == before + 1, 20)
        self._tmux("clear-history")
        self._tmux("send-keys", "-l", scene.command)
        self._tmux("send-keys", "Enter")
        middle = ""
        if scene.live:
            self._wait(lambda: all(text in self._screen() for text in scene.live) or self._ended(before), 240)
            middle = self._screen()
        self._wait(lambda: self._ended(before), 400)
        # The prompt's line comes after what PROMPT_COMMAND writes.
        time.sleep(0.3)
        return middle, self._screen(whole=True), int(self._finished()[-1])

    def _ended(self, before: int) -> bool:
        return len(self._finished()) == before + 2

    def _screen(self, *, whole: bool = False) -> str:
        text = self._tmux("capture-pane", "-p", *(["-S", "-"] if whole else []))
        lines = [line.rstrip() for line in text.replace(str(self._folder), "~").splitlines()]
        return "\n".join(lines).strip("\n").removesuffix("\n$")

    def _finished(self) -> list[str]:
        return self._codes.read_text().split() if self._codes.exists() else []

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-L", self._socket, *words], capture_output=True, text=True, check=True)
        return done.stdout

    def _wait(self, ready, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise SystemExit(f"nothing more happens; the screen shows:\n{self._screen()}")
            time.sleep(0.1)


def record() -> list[tuple[Scene, str, str]]:
    """Play every scene; SystemExit where a command fails or does not show what it must."""
    folder = Path(tempfile.mkdtemp(prefix="retrain-session-"))
    terminal = Terminal(folder)
    played: list[tuple[Scene, str, str]] = []
    try:
        for scene in SCENES:
            middle, end, code = terminal.play(scene)
            missing = [text for text in scene.seen if text.lower() not in end.lower()]
            missing += [text for text in scene.live if text not in middle]
            if code or missing:
                raise SystemExit(f"$ {scene.command}: exit status {code}, not seen: {missing}\n{middle}\n---\n{end}")
            played.append((scene, middle, end))
            print(f"$ {scene.command}")
    finally:
        terminal.close()
        shutil.rmtree(folder, ignore_errors=True)
    return played


def page(played: list[tuple[Scene, str, str]]) -> str:
    """The session as Markdown."""
    parts = [
        "# A session\n\nWhat a terminal shows, recorded by `python scripts/session.py` on two CPU cores with the embedded "
        "model. CI plays the same session."
    ]
    for scene, middle, end in played:
        words = f"\n\n{scene.words}" if scene.words else ""
        shown = f"$ {scene.command}\n...\n{middle}" if middle else end
        parts.append(f"## {scene.title}{words}\n\n```text\n{shown}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if shutil.which("tmux") is None:
        raise SystemExit("tmux is not installed.")
    text = page(record())
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
        return
    commands = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\$ retrain", line)]
    if commands != [f"$ {scene.command}" for scene in SCENES]:
        raise SystemExit(f"docs/session.md shows other commands: {commands}\nFix: python scripts/session.py")


if __name__ == "__main__":
    main()
