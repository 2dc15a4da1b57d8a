"""Commands: one dataclass of flags each, parsed strictly by fire, with a help text that leaves nothing out.

A command declares its flags as a dataclass whose fields are made by `flag`, composed of the shared groups of
`minionerec.common.settings`, and parses them before it imports what takes seconds to import:

    if __name__ == "__main__":
        FLAGS = parse_flags(SFTFlags)

    import torch
    ...
    if __name__ == "__main__":
        run_command(sft, FLAGS)

So `--help` and a wrong flag answer at once. An `InputError` ends a command with one line and exit status 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import signal
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from minionerec.common.console import log_only, record_console
from minionerec.common.disk_errors import explain_disk_error
from minionerec.common.files import InputError, read_yaml
from minionerec.common.processes import (
    count_processes,
    leave_group,
    leave_others,
    report_failure,
    say,
    wait_if_left_alone,
)

AnyFlags = TypeVar("AnyFlags")
HELP_WIDTH = 110
HELP_COLUMN = 34  # where the help of a flag begins
TYPE_NAMES = {str: "TEXT", int: "INT", float: "NUMBER", bool: "True|False"}
CHECK_ONLY = "MINIONEREC_CHECK_FLAGS"  # where this variable is set, a command ends once its flags are parsed
UNRECORDED = ("force", "dry_run", "streaming", "workers")  # flags that change what a run does, not what it makes


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Sequence[str] = (),
    default_text: str = "",
    aliases: Sequence[str] = (),
    no_effect: str = "",
) -> Any:
    """One flag of a command, as a dataclass field that can only be given by name.

    Args:
        default: its value when it is not given; without one the flag is required.
        help: what it does, in plain sentences.
        choices: the values it may have; of a list, the values each entry may have.
        default_text: what `--help` says of a default that is worked out later (None).
        aliases: other names it is accepted under, such as those of the published scripts.
        no_effect: why the flag does nothing here. It is accepted, and answered by this reason when it is given.
    """
    metadata = {
        "help": help or no_effect,
        "choices": tuple(choices),
        "default_text": default_text,
        "aliases": tuple(aliases),
        "no_effect": no_effect,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, kw_only=True, metadata=metadata)
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def same_flag(flags_class: type, name: str) -> Any:
    """The flag `name` of another command once more, for a command that shares single flags and no whole group."""
    field = flags_class.__dataclass_fields__[name]
    default = {"default": field.default, "default_factory": field.default_factory}
    given = {key: value for key, value in default.items() if value is not dataclasses.MISSING}
    return dataclasses.field(**given, kw_only=True, metadata=field.metadata)


def get_default(field: dataclasses.Field) -> Any:
    """The default of a flag, `dataclasses.MISSING` for a required one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def recorded_settings(flags: Any) -> dict[str, Any]:
    """{flag: value} of what decides what a run makes: all flags but UNRECORDED and those without an effect."""
    return {
        field.name: getattr(flags, field.name)
        for field in dataclasses.fields(flags)
        if field.name not in UNRECORDED and not field.metadata.get("no_effect")
    }


def check_choices(flags: Any) -> None:
    """Every flag with choices must have one of them as its value.

    Raises:
        InputError: the first that has not.
    """
    for field in dataclasses.fields(flags):
        choices, value = field.metadata.get("choices"), getattr(flags, field.name)
        for entry in value if isinstance(value, list) else [value]:
            if choices and entry is not None and entry not in choices:
                raise InputError(f"--{field.name} {entry}: expected one of {', '.join(map(str, choices))}")


@dataclasses.dataclass
class Flags:
    """Base of the groups of flags: their choices are checked however they are made."""

    def __post_init__(self) -> None:
        check_choices(self)


# -------------------------------------------------------------------------------------------------------------- parsing
def parse_flags(
    flags_class: type[AnyFlags],
    argv: Sequence[str] | None = None,
    positional: str | None = None,
    about: str | None = None,
) -> AnyFlags:
    """The flags of the command line, over those of --config files, over the defaults.

    Ends the process: with the help text and status 0 for --help, with one line on standard error and status 2 for a
    flag that is unknown, lacks its value or has a wrong one.

    Args:
        flags_class: a dataclass whose fields are made by `flag`.
        argv: the arguments; default those of this process.
        positional: the flag that a first argument without a name stands for, or all first ones, if it takes several.
        about: what the command does, for its help; default the docstring of the script that runs.
    """
    from_command_line = argv is None
    argv = sys.argv[1:] if argv is None else list(argv)
    about = about if about is not None else sys.modules["__main__"].__doc__
    if "--help" in argv or "-h" in argv:
        say(format_help(flags_class, about or ""))
        sys.exit(0)
    try:
        given = _split_arguments(flags_class, argv, positional)
        texts: dict[str, str] = {}
        for path in [part for part in given.pop("config", "").split(",") if part]:
            texts |= read_config(path, flags_class)
        texts |= given
        fields = {field.name: field for field in dataclasses.fields(flags_class)}
        missing = [
            name for name, field in fields.items() if get_default(field) is dataclasses.MISSING and name not in texts
        ]
        if missing:
            names = ", ".join(f"--{name}" for name in missing)
            raise InputError(f"missing flag{'s' if len(missing) > 1 else ''}: {names} (--help explains them)")
        for name in texts:
            if fields[name].metadata.get("no_effect"):
                say(f"--{name}: has no effect here: {fields[name].metadata['no_effect']}")
        flags = flags_class(**_parse_texts(flags_class, texts))
        check_choices(flags)
    except InputError as error:
        report_failure(str(error), everywhere=True)
        sys.exit(2)
    if os.environ.get(CHECK_ONLY):
        sys.exit(0)
    # Where it is ignored, as in a job in the background, it stays so.
    if from_command_line and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_at_once)
    return flags


def run_command(command: Callable[[AnyFlags], Any], flags: AnyFlags, *, shared: bool = False) -> None:
    """Run a command; wrong input ends it with one line on standard error and status 2.

    Of several processes, the one that fails leaves its reason to the launcher, which ends the others.

    Args:
        command: what to run.
        flags: its flags.
        shared: several processes share the work. Otherwise one of them does it and the others end at once.
    """
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not shared:
        leave_others()
    with record_console():
        try:
            command(flags)
            leave_group()
        except InputError as error:
            report_failure(str(error))
            sys.exit(2)
        except KeyboardInterrupt:
            report_failure("interrupted; the same command goes on from the last checkpoint")
            sys.exit(130)
        except Exception as error:
            reason = explain_disk_error(error, flags)
            if reason:
                report_failure(reason)
                sys.exit(1)
            wait_if_left_alone(error)
            if count_processes() > 1:
                traceback.print_exc()
                report_failure(f"{type(error).__name__}: {error}".splitlines()[0])
                sys.exit(1)
            log_only(traceback.format_exc())
            raise


def _leave_at_once(_number: int, _frame: Any) -> None:
    """Ctrl-C while libraries are imported, which answer an interrupt there with errors of their own."""
    report_failure("interrupted")
    os._exit(130)


def _names(flags_class: type) -> dict[str, str]:
    """{name that is accepted: field} of the flags and their aliases, --config included."""
    names = {"config": "config"}
    for field in dataclasses.fields(flags_class):
        names |= dict.fromkeys((field.name, *field.metadata.get("aliases", ())), field.name)
    return names


def _resolve_name(name: str, flags_class: type, where: str = "") -> str:
    """The field that `name` stands for.

    Raises:
        InputError: no flag has this name; the nearest ones are named.
    """
    names = _names(flags_class)
    name = name.replace("-", "_")
    if name in names:
        return names[name]
    spellings = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), spellings, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(f'--{spellings[other]}' for other in near)}?" if near else ""
    hint = hint or "; --help lists all flags"
    raise InputError(f"{where}unknown flag --{name}{hint}")


def _split_arguments(flags_class: type, argv: Sequence[str], positional: str | None) -> dict[str, str]:
    """{field: text of its value} of the arguments.

    Several values after one flag are joined by commas; of a flag that is given twice, the later one wins.
    """
    kinds = typing.get_type_hints(flags_class) | {"config": list[str]}
    argv = list(argv)
    unnamed = bool(positional and argv and not argv[0].startswith("-"))
    if unnamed:
        # A flag of several values takes all words before the first flag.
        count = 1
        if any(typing.get_origin(option) is list for option in _options(kinds[positional])):
            count = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
        argv = [f"--{positional}={','.join(argv[:count])}", *argv[count:]]
    texts: dict[str, str] = {}
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not argument.startswith("--"):
            raise InputError(f"unexpected argument {argument!r}: flags are written --name value")
        written, equals, value = argument[2:].partition("=")
        name = _resolve_name(written, flags_class)
        if not equals:
            values = []
            while position < len(argv) and not argv[position].startswith("--"):
                values.append(argv[position])
                position += 1
            options = _options(kinds[name])
            if not values and bool in options:
                values = ["True"]
            if not values:
                raise InputError(f"--{written}: a value is missing")
            if len(values) > 1 and not any(typing.get_origin(option) is list for option in options):
                raise InputError(f"--{written}: expected one value, got {len(values)}: {' '.join(values)}")
            value = ",".join(values)
        if unnamed and name == positional and position > 1:
            raise InputError(f"--{positional} is given twice; an argument without a name stands for it")
        texts[name] = value
    return texts


def read_config(path: str, flags_class: type) -> dict[str, str]:
    """{field: text of its value} of a YAML file of flags, such as config/recipes/*.yaml or OUT/NAME.settings.yaml.

    Raises:
        InputError: not a mapping of flags to single values or lists, or a flag that the command does not have.
    """
    content = read_yaml(path, "config")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected flags and their values, such as learning_rate: 1e-3")
    texts = {}
    for name, value in content.items():
        field = _resolve_name(str(name), flags_class, f"{path}: ")
        parts = value if isinstance(value, list) else [value]
        if field == "config" or any(isinstance(part, dict | list) for part in parts):
            raise InputError(f"{path}: {name}: expected a single value or a list of them")
        texts[field] = ",".join(map(str, parts))
    return texts


def _parse_texts(flags_class: type, texts: dict[str, str]) -> dict[str, Any]:
    """{field: value} of the texts, by fire, which calls the parser of every flag."""
    import fire  # only here, so that --help does not wait for it

    kinds = typing.get_type_hints(flags_class)
    parsers = {name: (lambda text, name=name: _parse_value(name, kinds[name], text)) for name in kinds}

    @fire.decorators.SetParseFns(**parsers)
    def collect(**values):
        return values

    arguments = [f"--{name}={text}" for name, text in texts.items()]
    return fire.Fire(collect, command=arguments, name="flags", serialize=lambda _: None)


def _options(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _parse_value(name: str, kind: Any, text: str) -> Any:
    """`text` as `kind`: str, int, float, bool, list[...] (written 256,256,256), or any union of these and None.

    Raises:
        InputError: it is none of them.
    """
    options = _options(kind)
    if type(None) in options and text in ("None", ""):
        return None
    options = tuple(option for option in options if option is not type(None))
    for option in options:
        if typing.get_origin(option) is list:
            (element,) = typing.get_args(option)
            parts = [part for part in text.strip("[]() ").replace(",", " ").split() if part]
            return [_parse_value(name, element, part) for part in parts]
        if option is bool and text in ("True", "False", "true", "false"):
            return text in ("True", "true")
        if option is not bool:
            try:
                return option(text)
            except ValueError:
                continue
    expected = " or ".join("True or False" if option is bool else option.__name__ for option in options)
    raise InputError(f"--{name}: expected {expected}, got {text!r}")


# ----------------------------------------------------------------------------------------------------------------- help
def format_help(flags_class: type, about: str) -> str:
    """The help text of a command: what it does, then every flag with its type, default and help, group by group."""
    groups: dict[type, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(flags_class):
        owner = next(
            base for base in reversed(flags_class.__mro__) if field.name in base.__dict__.get("__annotations__", ())
        )
        groups.setdefault(owner, []).append(field)
    kinds = typing.get_type_hints(flags_class)
    lines = [about.strip(), ""] if about.strip() else []
    # The command's own flags stand first, those that it shares with others after them.
    for owner in sorted(groups, key=flags_class.__mro__.index):
        lines.append(f"{(owner.__doc__ or owner.__name__).strip().splitlines()[0].rstrip('.')}:")
        for field in groups[owner]:
            lines += _format_flag(field, kinds[field.name])
        lines.append("")
    config = flag(None, "YAML files of flags, such as config/recipes/industrial_sft.yaml; flags given here win")
    config.name = "config"
    lines += ["Every command:", *_format_flag(config, list[str]), *_wrap_flag("  --help, -h", "show this text")]
    return "\n".join(lines)


def _format_flag(field: dataclasses.Field, kind: Any) -> list[str]:
    about, default = field.metadata, get_default(field)
    if default is dataclasses.MISSING:
        shown = "required"
    elif about.get("default_text"):
        shown = f"default: {about['default_text']}"
    elif isinstance(default, list):
        shown = f"default: {','.join(map(str, default))}"
    else:
        shown = "optional" if default is None else f"default: {default}"
    names = "".join(f"; also --{alias}" for alias in about.get("aliases", ()))
    effect = "no effect here: " if about.get("no_effect") else ""
    text = f"{effect}{about['help']} ({shown}{names})"
    return _wrap_flag(f"  --{field.name} {_name_type(kind, about.get('choices', ()))}", text)


def _wrap_flag(head: str, text: str) -> list[str]:
    indent = " " * HELP_COLUMN
    wrapped = textwrap.wrap(text, HELP_WIDTH - HELP_COLUMN, break_long_words=False, break_on_hyphens=False)
    if len(head) + 2 > HELP_COLUMN:
        return [head, *(indent + line for line in wrapped)]
    return [head.ljust(HELP_COLUMN) + wrapped[0], *(indent + line for line in wrapped[1:])]


def _name_type(kind: Any, choices: Sequence[str]) -> str:
    options = [option for option in _options(kind) if option is not type(None)]
    names = []
    for option in options:
        listed = typing.get_origin(option) is list
        element = typing.get_args(option)[0] if listed else option
        name = "|".join(map(str, choices)) if choices else TYPE_NAMES[element]
        names.append(f"{name},..." if listed else name)
    return "|".join(names)
