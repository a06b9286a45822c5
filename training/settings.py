"""A script's settings as a dataclass, from whose fields the parser and the help follow.

A group of flags is a class with one field per flag. A script's settings inherit the groups that the
script needs. A subclass that defines a field again changes what it gives and inherits the rest:
`epochs: int = 90` changes the default alone.
"""

import argparse
import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from utils import UserError

REQUIRED = MISSING
S = TypeVar("S", bound="Settings")


def flag(default: Any, help: str | None = None, *names: str, **how: Any) -> Any:
    """A field that the command line sets. Its annotation says what is parsed.

    Args:
        default: `REQUIRED` for none.
        names: how the flag is spelled; by default `--` and the field's name with hyphens.
        how: `choices`, `metavar` and `nargs` as in argparse; `low` and `high`, the least and the
            greatest number; `type`, a parser in place of the annotation's; `exclusive`, a name
            shared by flags of which only one may be given.
    """
    given = {"help": help, "names": names}
    return field(default=default, metadata=how | {k: v for k, v in given.items() if v})


def free(default: Any, help: str | None = None, *names: str, **how: Any) -> Any:
    """As `flag`, of which the value may differ when a run is resumed."""
    return flag(default, help, *names, free=True, **how)


def derived(default: Any = None, free: bool = True) -> Any:
    """A field that no flag sets: a script's constant, or what it computes from its flags."""
    return field(default=default, metadata={"free": free})


@dataclass(kw_only=True)
class Settings:
    """The base of all settings; a group's `check` holds its rules across fields.

    A script's own `check` comes first, and may fill in fields that those of its groups look at.
    """

    def __post_init__(self):
        for group in type(self).__mro__:
            if "check" in vars(group):
                group.check(self)

    @classmethod
    def parse(cls: type[S], arguments: list[str] | None = None) -> S:
        """The settings that the command line gives.

        Raises:
            UserError: flags do not go together. Other errors end the script: one line, status 2.
        """
        return cls(**vars(parser_of(cls).parse_args(arguments)))

    def must_agree(self) -> dict[str, Any]:
        """The values that must be the same when a run is resumed."""
        described = described_in(type(self))
        return {name: getattr(self, name) for name in described if "free" not in described[name]}

    def refuse(self, *names: str, why: str) -> None:
        """Raises a `UserError` that names the first of these fields that is not at its default."""
        for name in names:
            if getattr(self, name, None) != getattr(type(self), name, None):
                raise UserError(f"{described_in(type(self))[name]['names'][0]}: {why}")


def described_in(kind: type[Settings]) -> dict[str, dict[str, Any]]:
    """By field, what `kind` and its bases say of it; "group" is the class that introduces it."""
    described: dict[str, dict[str, Any]] = {one.name: {} for one in fields(kind)}
    for base in reversed(kind.__mro__):
        for name in inspect.get_annotations(base):
            said = vars(base)["__dataclass_fields__"][name].metadata
            described[name] = {"group": base} | described[name] | said
    for name, said in described.items():
        said.setdefault("names", (f"--{name.replace('_', '-')}",))
        if not said.get("free", True):
            del said["free"]
    return described


def parser_of(kind: type[Settings]) -> "Parser":
    """The command line's parser: the script's own flags first, then group by group."""
    parser, hints = Parser(kind.__doc__), typing.get_type_hints(kind)
    described = described_in(kind)
    defaults = {one.name: one.default for one in fields(kind)}
    needed = {described[name].get("exclusive") for name in defaults if defaults[name] is MISSING}
    exclusive: dict[str, argparse._ActionsContainer] = {}
    for group in kind.__mro__:
        own = [n for n, said in described.items() if said["group"] is group and "help" in said]
        if own:
            part = parser.add_argument_group("this script" if group is kind else group.__doc__)
        for name in own:
            shared, where = described[name].get("exclusive"), part
            if shared:
                if shared not in exclusive:
                    one_of = part.add_mutually_exclusive_group(required=shared in needed)
                    exclusive[shared] = one_of
                where = exclusive[shared]
            _add(where, name, hints[name], defaults[name], described[name])
    return parser


def _add(group, dest: str, hint: Any, default: Any, said: dict[str, Any]) -> None:
    """Adds a flag to a part of a parser."""
    kind = next((k for k in typing.get_args(hint) if isinstance(k, type)), hint)  # of `int | None`
    names, text, choices = said["names"], said["help"], said.get("choices")
    if choices and "metavar" in said:  # there are a hundred, which argparse would show twice
        text += f": {', '.join(choices)}"
    how: dict[str, Any] = {"help": text.replace("%", "%%")}
    if names[0].startswith("-"):
        how |= {"dest": dest, "required": default is MISSING and "exclusive" not in said}
    if kind is bool:
        group.add_argument(*names, action="store_true", **how)
        return
    how |= {key: said[key] for key in ("choices", "metavar", "nargs") if key in said}
    how["type"] = said.get("type", kind)
    if how["type"] in (int, float):
        how["type"] = number(kind, said.get("low", -math.inf), said.get("high", math.inf))
    if kind in (int, float) and not choices:
        how.setdefault("metavar", "N" if kind is int else "X")
    if said.get("nargs") == "?":
        how["const"] = ""
    group.add_argument(*names, default=None if default is MISSING else default, **how)


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A parser of a finite `kind` (int or float) in [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    parse.__name__ = kind.__name__  # argparse says it: "invalid int value: …"
    return parse


class _Formatter(argparse.HelpFormatter):
    """Shows a default unless it is False, or None, of which the help itself says what it means."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        return f"{action.help} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows defaults in `--help` and reports errors in one line."""

    def __init__(self, description: str):
        how = {"formatter_class": _Formatter, "allow_abbrev": False}
        super().__init__(description=description, **how)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")
