"""``retrain completion``: a static script for bash, zsh or fish. Commands and their flags are read from the help texts,
settings and their values from the schema, so that a new one is completed without a line here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from retrain.cli import scaffold
from retrain.cli.commands import COMMANDS
from retrain.config import names, own, templates
from retrain.config.fields import Setting, settings
from retrain.config.flags import flags_of
from retrain.config.options import SWITCHES
from retrain.config.rules import NAMED, PYTORCH_LACKS, written

SHELLS = ("bash", "zsh", "fish")

FILES, FOLDERS, CONFIGS = "<files>", "<folders>", "<configs>"
"""What completes to paths: any, folders, and TOML files with the folders on the way to them."""

RUN = "run"
"""What a line without a command is called here."""

_PLACES = {
    **dict.fromkeys(("backend.adapter_path", "lora.init_from", "logging.log_dir", "resume.from"), FOLDERS),
    **dict.fromkeys(("plugins.search_paths", "model.model", "squeeze.adapter_path", "squeeze.output_path"), FOLDERS),
    **dict.fromkeys(("data.path", "eval.path"), FILES),
}
_ASKED = {
    "init": CONFIGS, "explain": CONFIGS, "trace": CONFIGS, "doctor": CONFIGS, "bench": CONFIGS, RUN: CONFIGS,
    "resume-check": FOLDERS, "status": FOLDERS, "top": FOLDERS, "report": FOLDERS, "why": FOLDERS, "replay": FOLDERS,
    "eval": FOLDERS, "sample": FOLDERS, "export": FOLDERS, "squeeze": FILES, "diff": FILES,
}  # fmt: skip


class Texts(NamedTuple):
    """What the manual knows: the help text of a command, and its own topics and formats."""

    usage_of: Callable[[str], str]
    topics: Sequence[str]
    formats: Sequence[str]


class Flag(NamedTuple):
    """One flag: ``values`` is what may follow it (None: nothing, "": anything), ``dotted`` and ``others``
    are other ways to write it."""

    name: str
    values: str | None
    meaning: str = ""
    dotted: str = ""
    others: tuple[str, ...] = ()


class Command(NamedTuple):
    """One command: flags of its own, whether settings of a run are flags too, and what its arguments are."""

    name: str
    meaning: str
    flags: tuple[Flag, ...]
    takes_settings: bool
    argument: str


def commands(texts: Texts) -> list[Command]:
    """Every command, the run first."""
    run = tuple(Flag(name, None, meaning) for name, meaning in SWITCHES.items())
    first = Command(RUN, "train", (*run, Flag("--help", None, "Help."), Flag("--version", None)), True, CONFIGS)
    return [first, *(_command(name, meaning, texts) for name, (_, meaning) in COMMANDS.items())]


def _command(name: str, meaning: str, texts: Texts) -> Command:
    usage = texts.usage_of(name)
    words = {"plugins": _words(names.OPEN), "completion": _words(SHELLS)}
    argument = words.get(name, _ASKED.get(name, ""))
    return Command(name, meaning, _own_flags(name, usage, texts), "[--flag value" in usage, argument)


def _own_flags(command: str, usage: str, texts: Texts) -> tuple[Flag, ...]:
    """Flags that a help text names, with what follows them there; the text after an option is its meaning."""
    known = {alias for key in settings() for alias in (*flags_of(key), f"--{key}")}
    found: dict[str, Flag] = {}
    for line in usage.splitlines():
        listed = re.match(r"  (--\S.*?)(?:\s{2,}(\S.*))?$", line)
        if not (listed or line.startswith("Usage:")):
            continue
        text, meaning = (listed[1], listed[2] or "") if listed else (line, "")
        for flag, value in re.findall(r"(--[a-z][a-z-]*)(?:[ =]([A-Z][A-Z|.]*|[a-z]+(?:\|[a-z]+)+)\b)?", text):
            if flag == "--flag" or (flag in known and flag not in found and not listed):
                continue
            values = _values_of(command, flag, value, texts) if value else None
            if flag not in found or (meaning and not found[flag].meaning):
                found[flag] = Flag(flag, values if value else found.get(flag, Flag(flag, None)).values, meaning)
    return (*found.values(), Flag("--help", None, "Help."))


def _values_of(command: str, flag: str, value: str, texts: Texts) -> str:
    special = {
        ("init", "--template"): _words(templates.TEMPLATES), ("explain", "--template"): _words(templates.TEMPLATES),
        ("init-plugin", "--kind"): _words(scaffold.KINDS), ("init-plugin", "--output-dir"): FOLDERS,
        ("man", "--topic"): _words(texts.topics), ("man", "--format"): _words(texts.formats),
        ("export", "--dtype"): "auto float32 bf16 float16",
    }  # fmt: skip
    if (command, flag) in special:
        return special[command, flag]
    # What `eval` calls --source is the evaluation's.
    key = f"eval.{flag.removeprefix('--')}" if command == "eval" else ""
    if key not in settings():
        key = known_flags().get(flag, "")
    if key:
        return value_words(settings()[key])
    if flag == "--checkpoint":
        return "newest best"
    if "|" in value and value.islower():
        return " ".join(value.split("|"))
    return {"DIR": FOLDERS, "FILE": FILES, "CONFIG": CONFIGS, "FILE.HTML": FILES}.get(value.upper(), "")


def known_flags() -> dict[str, str]:
    """Every flat flag of a setting, with its key."""
    return {flag: key for key in settings() for flag in flags_of(key)}


def setting_flags() -> list[Flag]:
    """The settings of what this version builds: the usual flag and the dotted one."""
    return [
        Flag(
            (flags_of(key) or [f"--{key}"])[0],
            value_words(setting),
            setting.description,
            f"--{key}",
            tuple(flags_of(key)[1:]),
        )
        for key, setting in settings().items()
    ]


def value_words(setting: Setting) -> str:
    """What may follow a setting's flag: words, a kind of path, or "" for anything."""
    key = setting.key
    if key in _PLACES:
        return _PLACES[key]
    if key == "model.trust_remote_code":
        return "false"
    if setting.type == "boolean":
        return "true false"
    if key == "backend.devices":
        return "cpu gpu:0"
    kind = "sink" if key == "logging.trackers" else NAMED.get(key)
    if kind is not None:
        return _words([*written(kind, key), *(own.installed(kind) if kind in names.OPEN else ())])
    refused, _ = PYTORCH_LACKS.get(key, ((), ""))
    return _words(choice for choice in setting.choices if choice and choice not in refused)


def _words(found: Iterable[str]) -> str:
    return " ".join(found)


def script(shell: str, texts: Texts) -> str:
    """The script for one of ``SHELLS``."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands(texts))


def _by_values(flags: Iterable[Flag], prefix: str = "") -> list[tuple[str, str]]:
    """(pattern of a case statement, values): flags that take the same values together."""
    groups: dict[str, list[str]] = {}
    for flag in flags:
        if flag.values is not None:
            groups.setdefault(flag.values, []).extend(
                f"{prefix}{f}" for f in (flag.name, flag.dotted, *flag.others) if f
            )
    return [("|".join(dict.fromkeys(patterns)), values) for values, patterns in groups.items()]


def _cases(every: Sequence[Command]) -> list[tuple[str, str]]:
    """What may follow a flag, first those of single commands (as ``command:--flag``), then settings."""
    own_cases = [case for c in every if c.name != RUN for case in _by_values(c.flags, f"{c.name}:")]
    return [*own_cases, *_by_values(setting_flags(), "*:")]


_BASH = """\
# Completion of retrain for bash. To use it: eval "$(retrain completion bash)"
_retrain() {
    local IFS=$' \\t\\n' current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=run values= flags=
    COMPREPLY=()
    if [[ $current == = ]]; then
        current=
    elif [[ $before == = ]]; then
        before=${COMP_WORDS[COMP_CWORD-2]}
    fi
    if (( COMP_CWORD > 1 )); then
        case ${COMP_WORDS[1]} in
            @COMMANDS@) command=${COMP_WORDS[1]} ;;
        esac
    fi
    if [[ $before == --* && $current != --* ]]; then
        case $command:$before in
@VALUES@
            *) values='<none>' ;;
        esac
        _retrain_offer "$values" "$current"
        [[ $values == '<none>' || $values == 'true false' ]] || return 0
    fi
    if [[ $current == -* ]]; then
        case $command in
@FLAGS@
        esac
        case $command in
            @SETTINGS@)
                if [[ $current == *.* ]]; then
                    flags="$flags @DOTTED@"
                else
                    flags="$flags @FLAT@"
                fi ;;
        esac
        _retrain_offer "$flags" "$current"
        return 0
    fi
    if (( COMP_CWORD == 1 )); then
        _retrain_offer '@NAMES@' "$current"
    fi
    case $command in
@ARGUMENTS@
    esac
}
_retrain_offer() {
    local IFS=$'\\n'
    case $1 in
        '' | '<none>') return 0 ;;
        '<files>') COMPREPLY+=($(compgen -f -- "$2")) ;;
        '<folders>') COMPREPLY+=($(compgen -d -- "$2")) ;;
        '<configs>') COMPREPLY+=($(compgen -f -X '!*.toml' -- "$2") $(compgen -d -- "$2")) ;;
        *) COMPREPLY+=($(IFS=' '; compgen -W "$1" -- "$2")); return 0 ;;
    esac
    compopt -o filenames 2>/dev/null
    return 0
}
complete -F _retrain retrain
"""


def _filled(template: str, every: Sequence[Command], indent: str) -> str:
    """The parts that bash and zsh share, both of which know case statements."""
    listed = [c.name for c in every if c.name != RUN]
    parts = {
        "COMMANDS": "|".join(listed),
        "VALUES": "\n".join(f"{indent}{pattern}) values='{values}' ;;" for pattern, values in _cases(every)),
        "FLAGS": "\n".join(f"{indent}{c.name}) flags='{_words(f.name for f in c.flags)}' ;;" for c in every),
        "SETTINGS": "|".join(c.name for c in every if c.takes_settings),
        "FLAT": _words(flag.name for flag in setting_flags()),
        "DOTTED": _words(flag.dotted for flag in setting_flags()),
        "NAMES": _words(listed),
        "ARGUMENTS": "\n".join(
            f"{indent}{c.name}) _retrain_offer '{c.argument}' \"$current\" ;;" for c in every if c.argument
        ),
    }
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    return template


def _bash(every: Sequence[Command]) -> str:
    return _filled(_BASH, every, " " * 12)


_ZSH = """\
#compdef retrain
# Completion of retrain for zsh. To use it, after compinit: eval "$(retrain completion zsh)"
_retrain() {
    emulate -L zsh
    local current=${words[CURRENT]} before=${words[CURRENT-1]} command=run values= flags=
    local -a listed
    if [[ $current == --*=* ]]; then
        before=${current%%=*}
        compset -P '*='
        current=${current#*=}
    fi
    if (( CURRENT > 2 )); then
        case ${words[2]} in
            @COMMANDS@) command=${words[2]} ;;
        esac
    fi
    if [[ $before == --* && $current != --* ]]; then
        case $command:$before in
@VALUES@
            *) values='<none>' ;;
        esac
        _retrain_offer "$values" "$current"
        [[ $values == '<none>' || $values == 'true false' ]] || return 0
    fi
    if [[ $current == -* ]]; then
        case $command in
@FLAGS@
        esac
        case $command in
            @SETTINGS@)
                if [[ $current == *.* ]]; then
                    flags="$flags @DOTTED@"
                else
                    flags="$flags @FLAT@"
                fi ;;
        esac
        _retrain_offer "$flags" "$current"
        return 0
    fi
    if (( CURRENT == 2 )); then
        listed=(
@DESCRIBED@
        )
        _describe -t commands command listed
    fi
    case $command in
@ARGUMENTS@
    esac
}
_retrain_offer() {
    case $1 in
        '' | '<none>') return 0 ;;
        '<files>') _files ;;
        '<folders>') _files -/ ;;
        '<configs>') _files -g '*.toml' ;;
        *) compadd -- ${(s: :)1} ;;
    esac
}
if [[ ${funcstack[1]} == _retrain ]]; then
    _retrain "$@"
else
    compdef _retrain retrain
fi
"""


def _zsh(every: Sequence[Command]) -> str:
    described = "\n".join(" " * 12 + shlex.quote(f"{c.name}:{c.meaning}") for c in every if c.name != RUN)
    return _filled(_ZSH, every, " " * 12).replace("@DESCRIBED@", described)


_FISH = """\
# Completion of retrain for fish. To keep it: retrain completion fish > ~/.config/fish/completions/retrain.fish
function __retrain_command
    set -l words (commandline -opc)
    if test (count $words) -gt 1; and contains -- $words[2] @COMMANDS@
        echo $words[2]
    else
        echo run
    end
end
function __retrain_in
    contains -- (__retrain_command) $argv
end
function __retrain_first
    test (count (commandline -opc)) -eq 1
end
function __retrain_configs
    __fish_complete_suffix .toml
end
complete -c retrain -f
"""


def _fish(every: Sequence[Command]) -> str:
    lines = [_FISH.replace("@COMMANDS@", _words(c.name for c in every if c.name != RUN)).rstrip()]
    for c in every:
        where = f"-n '__retrain_in {c.name}'"
        if c.name != RUN:
            lines.append(f"complete -c retrain -n __retrain_first -a {c.name} -d {_fish_text(c.meaning)}")
        if c.argument:
            lines.append(f"complete -c retrain {where} {_fish_values(c.argument)}")
        lines += [_fish_flag(flag, where) for flag in c.flags]
    where = f"-n '__retrain_in {_words(c.name for c in every if c.takes_settings)}'"
    for flag in setting_flags():
        lines += [_fish_flag(f, where) for f in (flag, flag._replace(name=flag.dotted))]
    return "\n".join(lines) + "\n"


def _fish_flag(flag: Flag, where: str) -> str:
    values = "" if flag.values is None else _fish_values(flag.values) if flag.values else "-x"
    meaning = f" -d {_fish_text(flag.meaning)}" if flag.meaning else ""
    return f"complete -c retrain {where} -l {flag.name.removeprefix('--')} {values}{meaning}".replace("  ", " ")


def _fish_values(values: str) -> str:
    if values == FILES:
        return "-r -F"
    if values == FOLDERS:
        return "-x -a '(__fish_complete_directories)'"
    return "-x -a '(__retrain_configs)'" if values == CONFIGS else f"-x -a '{values}'"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
