"""Settings: flags, help, rules and what must agree on resuming all follow from the fields."""

from dataclasses import dataclass

import pytest

from training.settings import REQUIRED, Settings, derived, flag, free, parser_of
from utils import UserError


@dataclass(kw_only=True)
class Rates(Settings):
    """rates"""

    lr: float = flag(0.1, "learning rate", "--lr", "--learning-rate", low=0, high=1)
    decays: tuple[float, ...] = flag((0.0, 0.5), "weight decays", nargs="+")
    device: str | None = free(None, "torch device (default: cpu)")

    def check(self):
        if self.lr > self.limit:
            raise UserError(f"--lr {self.lr:g} is more than {self.limit:g}")


@dataclass(kw_only=True)
class Script(Rates):
    """a script"""

    lr: float = 0.2
    device: str | None = free(None, None, "--on")
    steps: int | None = flag(None, "number of steps (default: all)", low=1)
    base: str | None = flag(REQUIRED, "file to start from", exclusive="start")
    pretrained: bool = flag(False, "start from pretrained weights", exclusive="start")
    name: str = flag("x", "name, 100 %", choices=("x", "y"))
    limit: float | None = derived()

    def check(self):
        self.limit = 0.5


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        Script.parse([*arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_values_are_those_of_the_command_line_or_the_defaults():
    args = Script.parse(
        ["--base", "b.pt", "--learning-rate", "0.3", "--decays", "1", "2", "--on", "cpu"]
    )
    assert vars(args) == {
        **{"lr": 0.3, "decays": [1.0, 2.0], "device": "cpu", "steps": None, "base": "b.pt"},
        **{"pretrained": False, "name": "x", "limit": 0.5},
    }
    assert Script.parse(["--pretrained"]).lr == 0.2
    assert Script.parse(["--pretrained"]).decays == (0.0, 0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--base b --lr 2", "--lr/--learning-rate: 2 is not between 0 and 1"),
        ("--base b --lr nan", "nan is not between"),
        ("--base b --steps 0", "0 is not at least 1"),
        ("--base b --steps x", "invalid int value: 'x'"),
        ("--base b --name z", "invalid choice: 'z'"),
        ("--base b --pretrained", "not allowed with argument"),
        ("--base b --device cpu", "unrecognized arguments: --device"),
        ("", "one of the arguments --base --pretrained is required"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(capsys, arguments, words):
    assert words in refused(capsys, *arguments.split())


def test_a_scripts_rules_come_before_those_of_its_groups():
    with pytest.raises(UserError, match=r"--lr 0.6 is more than 0.5"):
        Script.parse(["--base", "b", "--lr", "0.6"])


def test_a_flag_at_its_default_is_never_refused():
    args = Script.parse(["--base", "b"])
    args.refuse("lr", "device", "unknown", why="not here")
    args.device = "cpu"
    with pytest.raises(UserError, match=r"^--on: not here$"):
        args.refuse("lr", "device", why="not here")


def test_free_and_derived_values_need_not_agree():
    agree = Script.parse(["--pretrained"]).must_agree()
    assert agree.keys() == {"lr", "decays", "steps", "base", "pretrained", "name"}


def test_the_help_has_groups_and_defaults_as_one_types_them():
    text = " ".join(parser_of(Script).format_help().split())
    assert text.index("this script:") < text.index("rates:")
    for shown in ("learning rate (default: 0.2)", "weight decays (default: 0.0 0.5)", "100 % (def"):
        assert shown in text
    assert "--steps N number of steps (default: all)" in text
    assert "None" not in text and "False" not in text
