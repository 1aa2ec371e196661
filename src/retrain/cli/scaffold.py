"""``retrain init-plugin``: writes a plug-in that runs as it is, with a configuration that trains it, and never over a
file that exists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from retrain.cli.verb import own_flags
from retrain.config.templates import ASSETS
from retrain.errors import UsageError

USAGE = {
    "init-plugin": """\
Usage: retrain init-plugin --kind KIND --name NAME [--output-dir DIR] [--with-test]

Writes DIR/NAME.py, a plug-in that runs as it is, and NAME.toml, which trains a step with it on the embedded model.
It never overwrites a file.

  --kind KIND        advantage, transform, algorithm, uncertainty, planning, reward, data, environment, inference,
                     loss, backend, backpressure or sink; `retrain plugins` calls planning detector, data source and
                     inference engine, which are taken here too
  --name NAME        name of the module: a word that Python can import
  --output-dir DIR   folder of the module (plugins)
  --with-test        DIR/test_NAME.py as well, for pytest
""",
}

KINDS: dict[str, tuple[str, str, Mapping[str, Mapping[str, str]]]] = {
    "advantage": ("advantage", "algorithm.advantage_mode", {"algorithm": {"advantage_params": "{ scale = 2.0 }"}}),
    "transform": ("transform", "algorithm.transform_mode", {"algorithm": {"transform_params": "{ strength = 0.5 }"}}),
    "algorithm": ("algorithm", "algorithm.algorithm_mode", {"algorithm": {"params": "{ scale = 2.0 }"}}),
    "uncertainty": ("uncertainty", "algorithm.uncertainty_kind", {"algorithm": {"transform_mode": '"gtpo"'}}),
    "planning": ("make_detector", "planning.detector", {"algorithm": {"transform_mode": '"gtpo_hicra"'}}),
    "reward": ("make_reward", "reward.type", {}),
    "data": ("source", "data.source", {}),
    "environment": ("make_environment", "environment.provider", {}),
    "inference": ("make_engine", "inference.engine", {}),
    "loss": ("loss", "loss.kind", {"training": {"updates_per_batch": "2"}}),
    "backend": ("make_backend", "backend.backend", {}),
    "backpressure": ("make_sizer", "backpressure.controller", {"backpressure": {"enabled": "true"}}),
    "sink": ("Sink", "logging.trackers", {}),
}
"""Kind -> what its module holds, the setting that names it, and settings that go with it, as TOML."""

ALIASES = {"detector": "planning", "source": "data", "engine": "inference", "tracker": "sink"}

_TINY: Mapping[str, Mapping[str, str]] = {
    "model": {"model": '"retrain/tiny"', "lora_rank": "8"},
    "backend": {"devices": '"cpu"'},
    "data": {"source": '"arithmetic"'},
    "reward": {"type": '"match"'},
    "algorithm": {"advantage_mode": '"grpo"', "transform_mode": '"none"'},
    "training": {
        "seed": "1", "max_steps": "1", "batch_size": "8", "group_size": "8", "max_tokens": "80", "temperature": "1.0",
        "lr": "1e-3",
    },
}  # fmt: skip
"""A step that the embedded model makes in a second or two."""


def init_plugin(arguments: Sequence[str]) -> int:
    """The command ``init-plugin``."""
    own, rest = own_flags(
        "init-plugin", arguments, values=("--kind", "--name", "--output-dir"), switches=("--with-test",)
    )
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}.", fix="`retrain init-plugin --help` lists what there is.")
    kind, name = _kind(own.get("--kind", "")), _name(own.get("--name", ""))
    folder = _folder(own.get("--output-dir", "plugins"))
    added = settings_of(kind, name)
    if os.path.lexists(os.path.join(folder, name)):
        raise _exists(os.path.join(folder, name))  # Python would import that folder instead.
    files = {os.path.join(folder, f"{name}.py"): _asset(kind, "py", name)}
    test = os.path.join(folder, f"test_{name}.py")
    if "--with-test" in own:
        files[test] = _asset(kind, "test", name)
    config = f"{name}.toml"
    files[config] = _configuration(kind, name, folder, added)
    _write(files)
    print("\n".join(f"Wrote {path}" for path in files))
    print("\nIn a configuration of yours:\n")
    print(_toml(_with_search_path(added, folder)))
    if "--with-test" in own:
        print(f"Test it with:  {_first()}pytest {test}")
    print(f"Train a step:  retrain {config}")
    return 0


def _first() -> str:
    """What makes pytest there: retrain does not need it, so its install does not bring it."""
    from importlib.util import find_spec

    return "" if find_spec("pytest") else "pip install pytest && "


def settings_of(kind: str, name: str) -> dict[str, dict[str, str]]:
    """The lines that use the plug-in ``name``: section -> key -> value as TOML."""
    attribute, setting, more = KINDS[kind]
    section, _, key = setting.partition(".")
    value = f'"{name}.{attribute}"'
    found = {section: {key: f"[{value}]" if key == "trackers" else value}}
    for other, values in more.items():
        found.setdefault(other, {}).update(values)
    return found


def _kind(text: str) -> str:
    kind = ALIASES.get(text, text)
    if kind in KINDS:
        return kind
    known = ", ".join(KINDS)
    if not text:
        raise UsageError("init-plugin needs --kind.", fix=f"one of {known}.")
    import difflib

    near = difflib.get_close_matches(text, [*KINDS, *ALIASES], n=1)
    raise UsageError(f"there is no kind {text!r}.", fix=f"did you mean {near[0]}?" if near else f"one of {known}.")


def _name(name: str) -> str:
    """``name`` if a module may be called that; UsageError where Python could not import it, or would import another."""
    import keyword
    import re
    from importlib.util import find_spec

    if not name:
        raise UsageError("init-plugin needs --name.", fix="--name my_plugin, for example.")
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name) or name.startswith("__"):
        word = re.sub(r"\W+", "_", name.removesuffix(".py"), flags=re.ASCII).strip("_")
        word = word if word and not word[0].isdigit() else f"my_{word}".rstrip("_")
        word = f"{word}_plugin" if keyword.iskeyword(word) else word
        raise UsageError(f"{name!r} cannot be the name of a module.", fix=f"for example --name {word}.")
    try:
        found = name in ("conftest", "plugins") or find_spec(name) is not None
    except (ImportError, ValueError):
        found = True
    if found:
        raise UsageError(
            f"there is a module {name!r} already, which Python would import instead.", fix=f"for example --name my_{name}."
        )
    return name


def _folder(text: str) -> str:
    """The folder that ``text`` names, as the loader would read it in plugins.search_paths; UsageError where there is none."""
    folder = os.path.expanduser(text)
    if not folder.strip():
        raise UsageError("--output-dir is empty.", fix="--output-dir plugins, or leave it out.")
    if folder.startswith("~"):
        raise UsageError(f"--output-dir {text!r}: there is no such home directory.", fix="write the path in full.")
    return folder.rstrip("/") or "/"


def _asset(kind: str, part: str, name: str) -> str:
    text = _read(f"{kind}.{part}.txt")
    return text.replace("@GROUP@\n", _read("_group.txt")).replace("@NAME@", name)


def _read(file: str) -> str:
    with open(os.path.join(ASSETS, "plugins", file), encoding="utf-8") as opened:
        return opened.read()


def _configuration(kind: str, name: str, folder: str, added: Mapping[str, Mapping[str, str]]) -> str:
    sections = {section: dict(values) for section, values in _TINY.items()}
    for section, values in _with_search_path(added, folder).items():
        sections.setdefault(section, {}).update(values)
    if kind == "algorithm":
        del sections["algorithm"]["advantage_mode"], sections["algorithm"]["transform_mode"]
    sections.setdefault("logging", {})["log_dir"] = f'"logs/{name}"'
    return (
        f"# One step on the embedded model, with {name}.py. Start it with: retrain {name}.toml\n"
        f"# More steps: retrain {name}.toml --max-steps 20 --overwrite\n\n{_toml(sections)}"
    )


def _with_search_path(added: Mapping[str, Mapping[str, str]], folder: str) -> dict[str, dict[str, str]]:
    """The settings, with the folder of the module where it is not found by itself."""
    sections = {section: dict(values) for section, values in added.items()}
    if os.path.normpath(folder) != "plugins":
        import json

        sections["plugins"] = {"search_paths": f"[{json.dumps(folder, ensure_ascii=False)}]"}
    return sections


def _toml(sections: Mapping[str, Mapping[str, str]]) -> str:
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
        for section, values in sections.items()
    )


def _write(files: Mapping[str, str]) -> None:
    """Write every file, or none: UsageError names one that is there, or a folder that cannot be written."""
    for path in files:
        if os.path.lexists(path):
            raise _exists(path)
    written: list[str] = []
    path = ""
    try:
        for path, text in files.items():
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
    except OSError as error:
        for done in written:
            os.unlink(done)
        if isinstance(error, FileExistsError) and error.filename == path:
            raise _exists(path) from error
        raise UsageError(
            f"{path}: cannot be written: {error.strerror or error}.", fix="name another --output-dir."
        ) from error
    except ValueError as error:
        raise UsageError(f"{path!r} cannot be written: {error}.", fix="name another --output-dir.") from error


def _exists(path: str) -> UsageError:
    return UsageError(
        f"{path}: there already is one, which init-plugin never overwrites.", fix="give another --name or --output-dir."
    )
