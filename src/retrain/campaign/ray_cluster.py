"""The Ray cluster of a campaign: a running one, or one of its own on this machine that ends with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Generator
from logging import getLogger
from pathlib import Path
from typing import Any

from retrain import cards, machine
from retrain.errors import ConfigError
from retrain.tracking.read import is_locked

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None

log = getLogger("retrain")

_SESSION, _HELD = "retrain-ray-", ".held"
"""Prefix of the folder of a cluster of our own, and the file in it that its campaign locks."""
_STORE_BYTES = 80 << 20
"""Shared memory of a local cluster; a task returns a few numbers."""
_ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_USAGE_STATS_PROMPT": "1"}
_LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_kill_child_processes_on_worker_exit": "false"}
"""Of a cluster of our own: Ray's switch, on every system, for nodes that no other machine reaches; and runs that a worker
leaves behind are not killed, because they save and end by themselves."""


def is_own(address: str) -> bool:
    """Does a campaign with this ``campaign.ray_address`` start a cluster of this machine alone?"""
    return not _given(address)


def gpus(devices: str, address: str) -> int:
    """GPUs that a run asks for. On this machine alone one without a GPU uses the CPU, whatever ``backend.devices`` says."""
    return 0 if devices == "cpu" or (is_own(address) and not cards.visible()) else 1


def check(address: str) -> None:
    """ConfigError where Ray is missing, or no cluster answers at ``address``."""
    if not is_own(address):
        with cluster(address, 1, 0):
            return
    with _variables(""):
        _package()


def _given(address: str) -> str:
    """Where a running cluster is to be found; "" where none is."""
    given = address or os.environ.get("RAY_ADDRESS", "")
    return "" if given == "local" else given


@contextlib.contextmanager
def cluster(address: str, threads: int, gpus: int) -> Generator[tuple[Any, bool]]:
    """Ray, connected, and whether the cluster is this campaign's own."""
    given = _given(address)
    # Ray puts handlers of its own in the place of those of the campaign, which save the runs.
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    with _variables(given), contextlib.ExitStack() as stack:
        session = "" if given else stack.enter_context(_session())
        ray, is_theirs = _package(), True
        try:
            is_theirs = ray.is_initialized()
            if not is_theirs:
                _connect(ray, given, session, threads, gpus)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            yield ray, not given
        finally:
            if not is_theirs:
                with contextlib.suppress(Exception):
                    ray.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _variables(given: str) -> Generator[None]:
    """The environment that Ray is loaded and started in."""
    variables = _ALONE | ({} if given else _LOCAL)
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _package() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            'campaign.launcher = "ray" needs the package ray, which is not installed.', fix='pip install "retrain[ray]".'
        ) from error
    return ray


@contextlib.contextmanager
def _session() -> Generator[str]:
    """A folder for the files of a cluster of our own; those of campaigns that were killed go."""
    root = Path(_short_folder())
    for old in root.glob(f"{_SESSION}*"):
        # Another user's, or one that is not a folder, is left alone.
        with contextlib.suppress(OSError):
            is_ours = not old.is_symlink() and old.stat().st_uid == os.getuid()
            if is_ours and (old / _HELD).exists() and is_locked(old / _HELD) is False:
                shutil.rmtree(old, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=_SESSION, dir=root))
    try:
        with (path / f"{_HELD}.new").open("w") as held:
            if fcntl is not None:
                fcntl.flock(held, fcntl.LOCK_EX)
            # Nobody sees it before it is locked.
            (path / f"{_HELD}.new").rename(path / _HELD)
            yield str(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _connect(ray: Any, given: str, session: str, threads: int, gpus: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if given:
            try:
                _knock(given)
                ray.init(address=given, **quiet)
            except Exception as error:
                raise ConfigError(
                    f"no Ray cluster answers at {given}: {line(error)}.",
                    fix="correct campaign.ray_address or RAY_ADDRESS, or leave both empty for a cluster on this machine.",
                ) from error
            return
        log.info("Starting a Ray cluster on this machine ...")
        try:
            ray.init(
                address="local",
                num_cpus=max(threads, int(machine.usable_processors())),
                num_gpus=len(cards.visible()) if gpus else 0,
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _temp_dir=session,
                **quiet,
            )
        except Exception as error:
            raise ConfigError(
                f"Ray could not start on this machine: {line(error)}.", fix='use campaign.launcher = "processes".'
            ) from error


def _knock(address: str) -> None:
    """OSError where nothing listens at HOST:PORT: Ray itself would end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _short_folder() -> str:
    """Where sockets can lie: their paths may hold 107 bytes."""
    folder = tempfile.gettempdir()
    return folder if len(folder) < 30 else "/tmp"


def line(error: BaseException) -> str:
    """An error as one line without its end mark."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said[:200].rstrip(". ")
