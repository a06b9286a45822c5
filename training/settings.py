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

S = TypeVar("S", bound="Settings")


def flag(*names: str, default: Any = MISSING, **how: Any) -> Any:
    """A field that the command line sets. Its annotation says what is parsed.

    Args:
        names: how the flag is spelled; by default `--` and the field's name with hyphens.
        default: a flag without one is required.
        how: `help`, `choices`, `metavar` and `nargs` as in argparse; `low` and `high`, the least
            and the greatest number; `type`, a parser in place of the annotation's;
            `exclusive`, a name shared by flags of which only one may be given;
            `may_change`, whether the value may differ when a run is resumed.
    """
    return field(default=default, metadata=how | ({"names": names} if names else {}))


def derived(default: Any = None, may_change: bool = True) -> Any:
    """A field that no flag sets: a script's constant, or what it computes from its flags."""
    return field(default=default, metadata={"may_change": may_change})


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
    def parse(cls: type[S]) -> S:
        """The settings that the command line gives.

        Raises:
            UserError: flags do not go together. Other errors end the script: one line, status 2.
        """
        return cls(**vars(parser_of(cls).parse_args()))

    def must_agree(self) -> dict[str, Any]:
        """The values that must be the same when a run is resumed."""
        kind = type(self)
        names = [one.name for one in fields(kind)]
        kept = [name for name in names if not metadata_of(kind, name).get("may_change")]
        return {name: getattr(self, name) for name in kept}

    def refuse(self, *names: str, why: str) -> None:
        """Raises a `UserError` that names the first of these fields that is not at its default."""
        for name in names:
            if getattr(self, name, None) != getattr(type(self), name, None):
                raise UserError(f"{names_of(type(self), name)[0]}: {why}")


def parser_of(kind: type[Settings]) -> "Parser":
    """The command line's parser: the script's own flags first, then group by group."""
    parser, hints = Parser(title_of(kind)), typing.get_type_hints(kind)
    said = {one.name: metadata_of(kind, one.name) for one in fields(kind)}
    defaults = {one.name: one.default for one in fields(kind)}
    needed = {said[name].get("exclusive") for name in said if defaults[name] is MISSING}
    groups: dict[str, argparse._ActionsContainer] = {}
    for owner in kind.__mro__:
        introduced = [name for name in said if _introduces(owner, name) and "help" in said[name]]
        if introduced:
            part = parser.add_argument_group("this script" if owner is kind else title_of(owner))
        for name in introduced:
            shared, group = said[name].get("exclusive"), part
            if shared:
                if shared not in groups:
                    one = part.add_mutually_exclusive_group(required=shared in needed)
                    groups[shared] = one
                group = groups[shared]
            _add(group, names_of(kind, name), name, hints[name], defaults[name], said[name])
    return parser


def _introduces(owner: type, name: str) -> bool:
    """Whether a field is in `owner` and in none of its bases."""
    own, *bases = (name in inspect.get_annotations(base) for base in owner.__mro__)
    return own and not any(bases)


def _add(group, names: tuple[str, ...], dest: str, hint: Any, default: Any, how: dict) -> None:
    """Adds a flag to a part of a parser."""
    kind = next((k for k in typing.get_args(hint) if isinstance(k, type)), hint)  # of `int | None`
    choices, text = how.get("choices"), how["help"]
    if choices and "metavar" in how:  # there are a hundred, which argparse would show twice
        text += f": {', '.join(choices)}"
    arguments: dict[str, Any] = {"help": text.replace("%", "%%")}
    if names[0].startswith("-"):
        arguments["dest"] = dest
        arguments["required"] = default is MISSING and "exclusive" not in how
    if kind is bool:
        group.add_argument(*names, action="store_true", **arguments)
        return
    arguments |= {key: how[key] for key in ("choices", "metavar", "nargs") if key in how}
    if kind in (int, float):
        arguments["type"] = number(kind, how.get("low", -math.inf), how.get("high", math.inf))
        if not choices:
            arguments.setdefault("metavar", "N" if kind is int else "X")
    else:
        arguments["type"] = kind
    if "type" in how:
        arguments["type"] = how["type"]
    if arguments.get("nargs") == "?":
        arguments["const"] = ""
    group.add_argument(*names, default=None if default is MISSING else default, **arguments)


def metadata_of(kind: type[Settings], name: str) -> dict[str, Any]:
    """What `kind` and its bases say of a field, the most derived last."""
    merged: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if name in inspect.get_annotations(base):
            merged |= vars(base)["__dataclass_fields__"][name].metadata
    return merged


def names_of(kind: type[Settings], name: str) -> tuple[str, ...]:
    """How the flag of a field is spelled, its long name first."""
    return metadata_of(kind, name).get("names") or (f"--{name.replace('_', '-')}",)


def title_of(kind: type) -> str:
    return inspect.getdoc(kind).partition("\n")[0].rstrip(".")


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
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")
