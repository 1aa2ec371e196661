"""One table from (kind, name) to the object that implements it, as "module:attribute" strings.

Nothing is imported before it is asked for. A name with a dot or a colon is a user's own dotted path,
looked up on the plug-in search paths; installed packages add names through the entry-point group
``retrain.<kind>``. What is not ours is checked when it is loaded, and named when it breaks.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from retrain.errors import PluginError, RetrainError

TABLE: dict[str, dict[str, str]] = {
    "backend": {"local": "retrain.backends.local:build"},
    "engine": {"pytorch": "retrain.engines.torch_engine:build"},
    "renderer": {"chat": "retrain.renderer:load_renderer"},
    "environment": {"single_turn": "retrain.environments.single_turn:build"},
    "source": {
        "math": "retrain.environments.hub_sources:math",
        "gsm8k": "retrain.environments.hub_sources:gsm8k",
        "arithmetic": "retrain.environments.sources:arithmetic",
        "jsonl": "retrain.environments.sources:jsonl",
        "hf": "retrain.environments.hub_sources:hf",
        "reasoning_gym": "retrain.environments.procedural:reasoning_gym",
        "mixture": "retrain.environments.mixture:tasks",
    },
    "reward": {
        "match": "retrain.rewards.match:build",
        "math": "retrain.rewards.math:build",
        "custom": "retrain.rewards.custom:build",
        "composite": "retrain.rewards.composite:build",
        "reasoning_gym": "retrain.rewards.generated:build",
        "routed": "retrain.rewards.routed:build",
    },
    "advantage": {
        "grpo": "retrain.algorithms.advantages:grpo",
        "maxrl": "retrain.algorithms.advantages:maxrl",
        "grpo_std": "retrain.algorithms.advantages:grpo_std",
        "rloo": "retrain.algorithms.advantages:rloo",
        "reinforce_pp": "retrain.algorithms.advantages:reinforce_pp",
    },
    "transform": {
        "none": "retrain.algorithms.transforms:none",
        "gtpo": "retrain.algorithms.transforms:gtpo",
        "gtpo_hicra": "retrain.algorithms.transforms:gtpo_hicra",
        "gtpo_sepa": "retrain.algorithms.transforms:gtpo_sepa",
        "gtpo_sepa_amp": "retrain.algorithms.transforms:gtpo_sepa_amp",
        "gtpo_sepa_amp_c": "retrain.algorithms.transforms:gtpo_sepa_amp_c",
        "entropy_mask": "retrain.algorithms.transforms:entropy_mask",
    },
    "algorithm": {},
    "trace": {},
    "uncertainty": {
        "surprisal": "retrain.algorithms.transforms:surprisal",
        "predictive_variance": "retrain.algorithms.transforms:predictive_variance",
        "shannon_entropy": "retrain.algorithms.transforms:shannon_entropy",
    },
    "detector": {
        "regex": "retrain.algorithms.planning:build",
        "semantic": "retrain.algorithms.semantic:build",
    },
    "loss": {
        "importance_sampling": "retrain.backends.loss:importance_sampling",
        "ppo": "retrain.backends.loss:ppo",
        "gspo": "retrain.backends.loss:gspo",
        "cispo": "retrain.backends.loss:cispo",
    },
    "sink": {
        "console": "retrain.sinks:ConsoleSink",
        "wandb": "retrain.trackers:WandbSink",
        "trackio": "retrain.trackers:TrackioSink",
        "tensorboard": "retrain.trackers:TensorboardSink",
    },
    "backpressure": {"usl": "retrain.training.backpressure:build"},
}


SIGNATURES: dict[str, tuple[str, ...]] = {
    "advantage": ("rewards_G",),
    "transform": ("group", "advantages_G_T", "context"),
    "algorithm": ("group", "context"),
    "uncertainty": ("rollout",),
    "detector": ("config",),
    "reward": ("config", "renderer"),
    "source": ("data", "split"),
    "environment": ("config", "renderer"),
    "engine": ("config", "renderer"),
    "loss": ("tokens", "settings"),
    "backend": ("config", "renderer"),
    "sink": ("config", "run_dir"),
    "backpressure": ("config",),
}
"""What a plug-in of each open kind is called with, by position. An advantage may take keyword arguments as well."""

METHODS: dict[str, tuple[str, ...]] = {
    "reward": ("score",),
    "sink": ("log", "close"),
    "detector": ("__call__",),
    "environment": ("attempt",),
    "engine": ("load", "generate", "close"),
    "backend": ("capabilities", "facts", "publish", "train_step", "save", "restore", "close"),
    "backpressure": ("next", "observe", "out_of_memory", "state_dict", "load_state_dict"),
}
"""What an object must have that a plug-in of a kind makes: methods, and what ``_PROPERTIES`` names."""

_PROPERTIES = ("capabilities",)

_EXTRAS = {"torch": "local", "transformers": "local", "peft": "local", "sentence_transformers": "semantic"}

_search_paths: list[Path] = []


def is_dotted(name: str) -> bool:
    """True when ``name`` is a user's own path rather than a built-in or entry-point name."""
    return "." in name or ":" in name


def add_search_paths(paths: Iterable[Path]) -> None:
    """Make modules in existing ``paths`` importable, after everything that is installed."""
    for path in paths:
        text = str(path)
        if path not in _search_paths:
            _search_paths.append(path)
        if path.is_dir() and text not in sys.path:
            sys.path.append(text)
    importlib.invalidate_caches()


def names(kind: str) -> list[str]:
    """Names of a kind: built-in ones, then those that installed packages add."""
    return list(dict.fromkeys([*TABLE[kind], *(e.name for e in metadata.entry_points(group=f"retrain.{kind}"))]))


def load(kind: str, name: str) -> Any:
    """Import and return the object called ``name``; PluginError with the nearest name or the import's cause.

    What a dotted path or an entry point names must take the arguments of its kind. A name that starts with
    ``make_`` and needs no arguments is called, and what it returns is used.
    """
    target = _target(kind, name)
    module_name, _, attribute = target.partition(":")
    found: Any = _import(kind, name, module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [k for k in dir(found) if not k.startswith("_")]
            near = difflib.get_close_matches(part, public, n=1)
            raise PluginError(
                f"{kind} {name!r}: {module_name} has no {part!r}.",
                fix=f"did you mean {near[0]!r}?" if near else "correct the dotted path.",
            )
        found = getattr(found, part)
    own = target != TABLE[kind].get(name)
    made_by = attribute.rpartition(".")[2]
    if own and made_by.startswith("make_") and callable(found) and _takes(found, ()) == "":
        found = _call(kind, name, found)
    if not callable(found):
        raise PluginError(
            f"{kind} {name!r} is a {type(found).__name__}, not something to call.",
            fix="name a function or class.",
        )
    if own and kind in SIGNATURES:
        _check_signature(kind, name, found, made_by)
    return found


def make(kind: str, name: str, *arguments: Any, **keywords: Any) -> Any:
    """Load the factory ``name``, call it, and check that what it made has the methods of its kind.

    PluginError names a plug-in that raises, with file and line, or makes something else; what a built-in
    raises passes.
    """
    factory = load(kind, name)
    made = (
        _call(kind, name, factory, *arguments, **keywords)
        if is_own(kind, name)
        else factory(*arguments, **keywords)
    )
    missing = [m for m in METHODS.get(kind, ()) if not _has(made, m)]
    if missing:
        sort = "property" if missing[0] in _PROPERTIES else "method"
        what = "not something to call" if missing == ["__call__"] else f"which has no {sort} {missing[0]}"
        raise PluginError(
            f"{kind} {name!r} made a {type(made).__name__}, {what}.",
            fix=f"name a class or function that takes ({', '.join(SIGNATURES[kind])}) and returns a {kind}.",
        )
    return made


def _has(made: Any, name: str) -> bool:
    # Looked up in the class, so that asking for a property does not compute it.
    return hasattr(cast("object", type(made)), name) if name in _PROPERTIES else callable(getattr(made, name, None))


def is_own(kind: str, name: str) -> bool:
    """True when ``name`` is not one of the built-in names of its kind."""
    return name not in TABLE[kind]


def raised(kind: str, name: str, error: BaseException) -> str:
    """One line for an exception that a plug-in's code raised, with the file and line it came from."""
    return f"{kind} {name!r} raised {summary(error)}."


def digests(named: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Digest of the source code behind each plug-in among the (kind, name) pairs, by name; built-ins are left out.

    It covers the plug-in's module file and what that imports from the folder it was found in. "" where there
    is no source file. Nothing is run but the ``__init__`` files of packages above the module.
    """
    found: dict[str, str] = {}
    for kind, name in named:
        if name and is_own(kind, name):
            files = _sources(_target(kind, name).partition(":")[0])
            digest = hashlib.sha256()
            for file in sorted(files):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
            found[name] = digest.hexdigest()[:16] if files else ""
    return dict(sorted(found.items()))


def _target(kind: str, name: str) -> str:
    target = TABLE[kind].get(name)
    if target is None:
        target = _installed(kind, name)
    if target is None and is_dotted(name):
        target = name if ":" in name else ":".join(name.rsplit(".", 1))
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", target):
            raise PluginError(
                f"{kind} {name!r} is not the path of an object in a module.",
                fix='write "my_module.my_object", without folders and without ".py".',
            )
    if target is None:
        near = difflib.get_close_matches(name, names(kind), n=1)
        raise PluginError(
            f"unknown {kind} {name!r}.",
            fix=(f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(names(kind))}.",
        )
    return target


def _installed(kind: str, name: str) -> str | None:
    """What an installed package means by ``name``; PluginError where two packages mean different objects."""
    found = {e.value: package_of(e) for e in metadata.entry_points(group=f"retrain.{kind}") if e.name == name}
    if len(found) > 1:
        raise PluginError(
            f"{kind} {name!r} is ambiguous: {' and '.join(found.values())} both add it.",
            fix=f"write which object you mean: {' or '.join(repr(value) for value in found)}.",
        )
    return next(iter(found), None)


def package_of(entry: metadata.EntryPoint) -> str:
    """Name and version of the package that adds an entry point, "" where that is not known."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""


def _import(kind: str, name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            fix = _fix_for_module(missing)
            where = ""
        else:
            extra = _EXTRAS.get(missing.split(".")[0])
            fix = f'pip install "retrain[{extra}]".' if extra else "install it, or drop the import."
            where = f", imported in {at}" if is_own(kind, name) and (at := place(error)) else ""
        raise PluginError(
            f"{kind} {name!r} needs the module {missing!r}{where}, which is not installed.", fix=fix
        ) from error
    except (Exception, SystemExit) as error:
        if not is_own(kind, name):
            raise
        raise PluginError(
            f"{kind} {name!r}: {module_name} fails on import: {summary(error)}.", fix="correct the module."
        ) from error


def _fix_for_module(missing: str) -> str:
    """Names the nearest module in the search paths, or says where to put one."""
    folders = [path for path in _search_paths if path.is_dir()]
    modules: dict[str, Path] = {}
    for folder in folders:
        for entry in sorted(folder.iterdir()):
            if entry.suffix == ".py" or (entry / "__init__.py").is_file():
                modules.setdefault(entry.stem, entry)
    top = missing.split(".")[0]
    near = difflib.get_close_matches(top, modules, n=1)
    if near and near[0] != top:
        return f"did you mean {near[0]!r} ({modules[near[0]]})?"
    if not folders:
        looked = ", ".join(map(str, _search_paths)) or "none"
        return f"put {top}.py into a folder of plugins.search_paths (none exists: {looked}), or install it."
    return f"put {top}.py into {' or '.join(map(str, folders))}, or add its folder to [plugins] search_paths."


def _takes(function: Any, positional: tuple[str, ...], *, partly: bool = False) -> str:
    """Why ``function`` cannot be called with these arguments; "" when it can, or when that cannot be known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        (signature.bind_partial if partly else signature.bind)(*positional)
    except TypeError as error:
        return str(error)
    return ""


def _check_signature(kind: str, name: str, found: Any, shown: str) -> None:
    positional = SIGNATURES[kind]
    # An advantage's own parameters come from the configuration and are checked together with it.
    problem = _takes(found, positional, partly=kind == "advantage")
    if problem:
        listed = ", ".join(positional)
        raise PluginError(
            f"{kind} {name!r} cannot be called with ({listed}): {problem}.",
            fix=f"define it as {shown}({listed}).",
        )


def _call(kind: str, name: str, function: Any, *arguments: Any, **keywords: Any) -> Any:
    try:
        return function(*arguments, **keywords)
    except RetrainError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(raised(kind, name, error), fix="correct the plug-in.") from error


def place(error: BaseException) -> str:
    """File and line of the innermost frame of the user's code, "" without one: not where a value of ours or a
    library refused what that code handed to it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    known = [f for f in frames if not f.filename.startswith(("<", _OURS))]
    # Packages may lie below the standard library's folder.
    known = [f for f in known if _PACKAGES.match(f.filename) or not f.filename.startswith(_LIBRARY)]
    theirs = [f for f in known if not _PACKAGES.match(f.filename)]
    if known and not theirs:
        # The plug-in is installed: what we called is its own, what that called may be another package's.
        top = _PACKAGES.match(known[0].filename)
        theirs = [f for f in known if top and f.filename.startswith(top[0])]
    return f"{Path(theirs[-1].filename).name}:{theirs[-1].lineno}" if theirs else ""


_OURS = str(Path(__file__).parent) + os.sep
_LIBRARY = str(Path(traceback.__file__).parent) + os.sep
_PACKAGES = re.compile(r".*[\\/](?:site|dist)-packages[\\/][^\\/]+")


def summary(error: BaseException) -> str:
    """An exception's type and first line, and where it was raised."""
    text = error.msg if isinstance(error, SyntaxError) else str(error).strip().partition("\n")[0]
    at = place(error)
    return f"{type(error).__name__}{': ' + text[:300] if text else ''}{f' ({at})' if at else ''}"


def _sources(module_name: str) -> set[Path]:
    """The module's source file, the packages above it, and what these import from the same folder."""
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return set()
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return set()
    origin = Path(spec.origin)
    root = origin.parents[module_name.count(".") + (origin.name == "__init__.py")]
    top = module_name.split(".")[0]
    # Of an installed package its own files only: what it imports has a version of its own.
    whole_folder = any(root.resolve() == path.resolve() for path in _search_paths)
    found: set[Path] = set()
    waiting = [module_name]
    while waiting:
        name = waiting.pop()
        if name.split(".")[0] != top and not whole_folder:
            continue
        for above in _with_parents(name):
            file = root.joinpath(*above.split("."))
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            if file.is_file() and file not in found:
                found.add(file)
                package = above if file.name == "__init__.py" else above.rpartition(".")[0]
                waiting += _imports(file, package)
    return found


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _imports(file: Path, package: str) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: max(0, package.count(".") + 2 - node.level)] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}".strip(".") for alias in node.names)
