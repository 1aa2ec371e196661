"""What this version and this environment hold: backends, engines and plug-ins, read from sources and package metadata
without importing any of them."""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from retrain import plugins
from retrain.config import names
from retrain.errors import UsageError

PACKAGE = Path(plugins.__file__).resolve().parent

EXTRA = {"local": "local", "pytorch": "local", "reasoning_gym": "tasks", "semantic": "semantic"} | {
    name: name for name in ("wandb", "trackio", "tensorboard")
}
"""The extra that holds what a built-in name needs, where the core install is not enough."""

NEEDS_LOCAL = ("math", "gsm8k", "hf")
"""Built-in names of sources and rewards that read data sets or compare formulas: part of the extra ``local``."""

INTERNAL = {"reward": ("routed",), "sink": ("console",)}
"""Names of the table that no configuration can hold."""

FACTORY = "factory"
"""What a name that starts with ``make_`` and needs no arguments is, in place of a kind."""

KINDS = {
    "advantage": "one number per rollout from its group's rewards",
    "transform": "token-level credit from a rollout's advantage",
    "algorithm": "advantage and transform in one, in place of both",
    "uncertainty": "how uncertain each sampled token was",
    "detector": "which tokens are planning tokens",
    "reward": "scores of rollouts",
    "source": "tasks to train or evaluate on",
    "environment": "how a task becomes rollouts",
    "loss": "the policy loss",
    "backend": "the learner",
    "engine": "the sampler",
    "renderer": "tokenizer and chat template",
    "sink": "trackers, besides the run directory",
    "backpressure": "tasks of each step, while a run goes on",
    "trace": "lengths for retrain bench",
}
ALIASES = {"planning": "detector", "data": "source", "inference": "engine", "tracker": "sink"}
"""What ``init-plugin`` calls a kind, after the section that names it."""

DOCS = "docs/plugins.md; retrain man --topic plugins"


def backends() -> dict[str, Any]:
    """Every backend and engine that a configuration may name: whether it is built, what it can do, and its packages."""
    found: list[dict[str, Any]] = []
    for kind, setting in (("backend", "backend.backend"), ("engine", "inference.engine")):
        for name in names.BUILT[kind]:
            path, _ = _source_of(plugins.TABLE[kind][name])
            packages = _packages(EXTRA.get(name, ""))
            missing = [p for p, version in packages.items() if version is None]
            found.append(
                {
                    "kind": kind,
                    "name": name,
                    "setting": setting,
                    "built": True,
                    "what": _sentence(_docstring(path)),
                    "capabilities": _capabilities(path) if kind == "backend" else None,
                    "installed": not missing,
                    "packages": packages,
                    "install": f'pip install "retrain[{EXTRA[name]}]"' if missing else "",
                }
            )
        for entry in _added(kind):
            found.append(
                {
                    "kind": kind,
                    "name": entry["name"],
                    "setting": setting,
                    "built": True,
                    "what": (entry["what"] or f"from {entry['package']}") + (entry["unused"] and f" ({entry['unused']})"),
                    "capabilities": None,
                    "installed": True,
                    "packages": {},
                    "install": "",
                }
            )
        for name in names.LATER[kind]:
            found.append(
                {
                    "kind": kind,
                    "name": name,
                    "setting": setting,
                    "built": False,
                    "what": "not in this version",
                    "capabilities": None,
                    "installed": False,
                    "packages": {},
                    "install": "",
                }
            )
    return {"backends": found}


def backends_text(found: Mapping[str, Any]) -> str:
    """The record as text."""
    lines: list[str] = []
    titles = {"backend": "learners (backend.backend)", "engine": "samplers (inference.engine)"}
    for kind, title in titles.items():
        lines += ["", title] if lines else [title]
        rows = [row for row in found["backends"] if row["kind"] == kind]
        for row in (r for r in rows if r["built"]):
            lines.append(f"  {row['name']:<12} {row['what']}")
            can: Mapping[str, bool] | None = row["capabilities"]
            if can:
                lines.append(
                    f"  {'':<12} can: {', '.join(_WORDS.get(c, c) for c, yes in can.items() if yes)}"
                )
                lacking = [_WORDS.get(c, c) for c, yes in can.items() if not yes]
                lines += [f"  {'':<12} cannot: {', '.join(lacking)}"] if lacking else []
            held = [f"{p} {v or 'missing'}" for p, v in row["packages"].items()]
            lines += [f"  {'':<12} packages: {', '.join(held)}"] if held else []
            lines += [f"  {'':<12} install: {row['install']}"] if row["install"] else []
        later = [r["name"] for r in rows if not r["built"]]
        lines += [f"  not in this version: {', '.join(later)}"] if later else []
    lines += ["", "Your own backend or engine: docs/plugins.md"]
    return "\n".join(lines)


_WORDS = {
    "loop": "run the training loop",
    "token_advantages": "train with an advantage per token",
    "resume": "resume exactly",
    "reports_loss": "report the loss",
}


def listing(kind: str, config: str) -> dict[str, Any]:
    """Every kind (or ``kind``) with its built-in names, those of installed packages, and the user's own objects."""
    kind = ALIASES.get(kind, kind)
    if kind and kind not in plugins.TABLE:
        near = difflib.get_close_matches(kind, plugins.TABLE, n=1)
        raise UsageError(
            f"there is no kind of plug-in {kind!r}.",
            fix=(f"did you mean {near[0]}? " if near else "") + f"Kinds: {', '.join(_kinds())}.",
        )
    folders = _search_paths(config)
    own = [found for folder in folders if folder.is_dir() for found in _own(folder)]
    kinds = [_kind(k) for k in ([kind] if kind else _kinds())]
    return {
        "kinds": kinds,
        "search_paths": [{"path": str(f), "exists": f.is_dir()} for f in folders],
        "own": [o for o in own if not kind or {kind, FACTORY} & {f.partition(".")[0] for f in o["fits"]}],
        "docs": DOCS,
    }


def listing_text(found: Mapping[str, Any], *, alone: bool) -> str:
    """The record as text; ``alone``: one kind was asked for, and gets all its details."""
    lines: list[str] = []
    for kind in found["kinds"]:
        where = ", ".join(kind["settings"]) or "not a setting"
        lines += (
            ["", f"{kind['kind']}: {kind['what']} ({where})"]
            if lines
            else [f"{kind['kind']}: {kind['what']} ({where})"]
        )
        width = max([len(n["name"]) for n in (*kind["built_in"], *kind["installed"])] or [0])
        for name in kind["built_in"]:
            also = f" (also {', '.join(name['aliases'])})" if name["aliases"] else ""
            needs = f" (first: {name['install']})" if name["install"] else ""
            lines.append(f"  {name['name']:<{width}}  {name['what']}{also}{needs}")
        for name in kind["installed"]:
            unused = f"; {name['unused']}" if name["unused"] else ""
            lines.append(
                f"  {name['name']:<{width}}  {name['what'] or name['object']} (from {name['package']}{unused})"
            )
        if kind["later"]:
            lines.append(f"  not in this version: {', '.join(kind['later'])}")
        if alone and kind["open"]:
            lines.append(f"  your own: a dotted path to what takes ({', '.join(kind['called_with'])})")
        elif alone:
            lines.append("  your own: not possible for this kind")
    lines += [""]
    looked = [p for p in found["search_paths"] if p["exists"]]
    if found["own"]:
        lines.append("yours, by dotted path")
        width = max(len(o["path"]) for o in found["own"])
        for o in found["own"]:
            fits = " or ".join(o["fits"]) or "fits no kind"
            lines.append(f"  {o['path']:<{width}}  {fits}{': ' + o['what'] if o['what'] else ''}")
    else:
        where = ", ".join(p["path"] for p in looked or found["search_paths"])
        lines.append(f"yours: none in {where}{'' if looked else ' (no such folder)'}")
    lines.append(f"docs: {found['docs']}")
    return "\n".join(line.rstrip() for line in lines)


def _kinds() -> list[str]:
    return [*(k for k in KINDS if k in plugins.TABLE), *(k for k in plugins.TABLE if k not in KINDS)]


def _kind(kind: str) -> dict[str, Any]:
    aliases = names.ALIASES.get(kind, {})
    built: list[dict[str, Any]] = []
    for name, target in plugins.TABLE[kind].items():
        if name in INTERNAL.get(kind, ()):
            continue
        path, attribute = _source_of(target)
        extra = EXTRA.get(name, "local" if name in NEEDS_LOCAL else "")
        lacks = any(version is None for version in _packages(extra).values())
        built.append(
            {
                "name": name,
                "what": _built_in(path, attribute),
                "object": target,
                "aliases": [a for a, real in aliases.items() if real == name],
                "install": f'pip install "retrain[{extra}]"' if lacks else "",
            }
        )
    return {
        "kind": kind,
        "what": KINDS.get(kind, ""),
        "settings": _settings(kind),
        "open": kind in names.OPEN,
        "called_with": list(plugins.SIGNATURES.get(kind, ())),
        "built_in": built,
        "installed": _added(kind),
        "later": list(names.LATER.get(kind, ())),
    }


def _settings(kind: str) -> list[str]:
    from retrain.config.own import SETTINGS

    found = [key for k, key in SETTINGS if k == kind]
    return [*found, "logging.trackers"] if kind == "sink" else found


def _search_paths(config: str) -> tuple[Path, ...]:
    """Of the configuration that is named, else of ./retrain.toml where that loads, else the default."""
    from retrain.errors import ConfigError

    if config or os.path.exists("retrain.toml"):
        from retrain.config.load import load

        try:
            return load(Path(config or "retrain.toml")).search_paths
        except ConfigError:
            # Whoever mends a configuration wants to see what it can name.
            if config:
                raise
    return (Path.cwd() / "plugins",)


def _source_of(target: str) -> tuple[Path, str]:
    module, _, attribute = target.partition(":")
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py"), attribute


def _tree(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _docstring(path: Path, attribute: str = "") -> str:
    """The docstring of a module, or of a function or class at its top; "" where there is none."""
    tree = _tree(path)
    if tree is None or not attribute:
        return "" if tree is None else ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == attribute:
            return ast.get_docstring(node) or ""
    return ""


def _built_in(path: Path, attribute: str) -> str:
    # What ``build`` makes is what its module is about.
    return _sentence(_docstring(path, "" if attribute == "build" else attribute))


def _sentence(text: str) -> str:
    """A docstring's first sentence without markup."""
    line = " ".join(text.partition("\n\n")[0].split()).replace("``", "")
    for end in (". ", "; "):
        line = line.partition(end)[0]
    return line.rstrip(".")


def _capabilities(path: Path) -> dict[str, bool] | None:
    """What the module's ``Capabilities(...)`` states."""
    tree = _tree(path)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Capabilities":
            stated = {
                k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)
            }
            return {name: value for name, value in stated.items() if isinstance(value, bool)}
    return None


def _packages(extra: str) -> dict[str, str | None]:
    """Version of each package that an extra asks for, None where it is not installed."""
    found: dict[str, str | None] = {}
    for requirement in _requirements() if extra else ():
        wanted, _, marker = requirement.partition(";")
        if f"'{extra}'" in marker.replace('"', "'") and "retrain[" not in wanted:
            name = _distribution(wanted)
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
    return found


def _requirements() -> Sequence[str]:
    try:
        return metadata.requires("retrain") or ()
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ()


def _distribution(requirement: str) -> str:
    return (
        requirement.strip()
        .partition("[")[0]
        .partition("<")[0]
        .partition(">")[0]
        .partition("=")[0]
        .partition("!")[0]
        .strip()
    )


def _added(kind: str) -> list[dict[str, Any]]:
    """What installed packages add to a kind; ``unused`` says why a name does not mean the object, "" where it does."""
    found: list[dict[str, Any]] = []
    entries = metadata.entry_points(group=f"retrain.{kind}")
    for entry in entries:
        module, _, attribute = entry.value.partition(":")
        package, what = plugins.package_of(entry), ""
        others = [plugins.package_of(e) for e in entries if e.name == entry.name and e.value != entry.value]
        unused = f"ambiguous: {', '.join(others)} adds this name too" if others else ""
        if entry.name in plugins.TABLE[kind]:
            unused = "never used: the name is a built-in one's"
        if entry.dist is not None:
            base = Path(str(entry.dist.locate_file(module.replace(".", "/"))))
            path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
            what = _sentence(_docstring(path, attribute) or _docstring(path))
        found.append(
            {"name": entry.name, "what": what, "object": entry.value, "package": package, "unused": unused}
        )
    return found


def _own(folder: Path) -> Iterator[dict[str, Any]]:
    """Public functions and classes of a folder's modules, with the kinds whose arguments they take."""
    modules = [p for p in sorted(folder.glob("*.py")) if not p.stem.startswith(("_", "test_"))]
    modules += [p for p in sorted(folder.glob("*/__init__.py")) if not p.parent.name.startswith((".", "_"))]
    for path in modules:
        module = path.stem if path.name != "__init__.py" else path.parent.name
        tree = _tree(path)
        if tree is None:
            yield {
                "path": module,
                "line": 0,
                "file": str(path),
                "fits": [],
                "what": "cannot be read as Python",
            }
            continue
        for node in tree.body:
            is_object = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_object and not node.name.startswith("_"):
                yield {
                    "path": f"{module}.{node.name}",
                    "line": node.lineno,
                    "file": str(path),
                    "fits": _fits(node),
                    "what": _sentence(ast.get_docstring(node) or ""),
                }


def _fits(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[str]:
    """Kinds that a function or class could be of: those whose arguments it names, else those whose number it takes."""
    taken = _arguments(node)
    if taken is None:
        return []
    required, most, listed = taken
    if node.name.startswith("make_") and not required:
        return [FACTORY]  # what it returns is known when it is called
    open_kinds = {k: s for k, s in plugins.SIGNATURES.items() if k in names.OPEN}
    named = [k for k, s in open_kinds.items() if tuple(listed[: len(s)]) == s]
    if tuple(listed[:2]) == ("response", "reference"):
        return ["reward.custom_function"]
    return named or [k for k, s in open_kinds.items() if required <= len(s) <= most]


def _arguments(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
) -> tuple[int, int, Sequence[str]] | None:
    """Least and most positional arguments, and their names; None for a class without ``__init__`` of its own."""
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:
            return None
        found = _arguments(inits[0])
        return (found[0] - 1, found[1] - 1, found[2][1:]) if found else None
    listed = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    if any(default is None for default in node.args.kw_defaults):
        return None
    return len(listed) - len(node.args.defaults), 99 if node.args.vararg else len(listed), listed
