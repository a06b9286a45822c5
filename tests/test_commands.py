"""Every command of the documents is executed as it is written, but shorter and on Digits.

Bash runs a document's commands with stand-ins for `python`, `torchrun` and the like, which write
down what they were called with. The scripts that they would have started are then run within this
process, in a folder that stands for the repository, with the flags of `SHORTER` after their own.
Of benchmarks and studies, which take hours, and of commands that the reader has to complete (…),
only the flags are parsed.
"""

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from test_documents import TRACKED
from test_imagenet import sound  # noqa: F401
from test_scripts import ROOT, call

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("bash", "python", "torchrun", "pip", "cd", "ruff", r"[A-Z_]+=\S+ bash")
# A block of commands, an indented one, a command in a line of text.
COMMANDS = re.compile(
    r"^```bash\n(?P<block>(?:.*\n)*?)```|"
    rf"^(?P<indented>(?:    (?:{'|'.join(WORDS)}) .*\n(?:        .*\n)*)+)|"
    rf"`(?P<inline>(?:{'|'.join(WORDS)}) [^`]*)`",
    re.MULTILINE,
)
FAKES = ("python", "python3", "torchrun", "pip", "ruff")
FAKE = r"""#!/usr/bin/env bash
case "${1-} ${2-}" in
    "- "*) ;; # asked whether it satisfies requirements.txt: it does
    "-m venv") mkdir -p "$3/bin" && ln -s "$0" "$3/bin/pip" && ln -s "$0" "$3/bin/python" ;;
    *) printf '%s\0' "$PWD" "${0##*/}" "$@" $'\n' >> "$RECORD" ;;
esac
"""
# Of SLURM; and studies copy what was measured, of which there is nothing.
OTHERS = {"srun": 'exec "$@"', "scontrol": "echo localhost", "cp": ":"}

TEXT = f"--data-dir {ROOT / 'README.md'}"
TWA = "--epochs 1 --params_start 0 --params_end 3 --batch-size 256"
SHORTER = {  # flags that come after a command's own, and win
    "train_sgd_cifar.py": "--datasets Digits --arch PreResNet20 --epochs 2 --batch-size 256 "
    "--saves-per-epoch 1 --warmup-epochs 0",
    "train_sgd_imagenet.py": "--epochs 2 --batch-size 32 --image-size 32 --saves-per-epoch 1",
    "train_twa.py": f"--datasets Digits --arch PreResNet20 {TWA}",
    "swa/train.py": "--dataset Digits --model PreResNet20 --epochs 3 --swa_start 1 "
    "--batch_size 256",
    "soup/finetune.py": "--datasets Digits --arch PreResNet20 --models 2 --epochs 1",
    "soup/soup.py": "--datasets Digits --arch PreResNet20 --epochs 1",
    "lm/train.py": f"--steps 4 --save-every 2 --test-every 4 --batch-size 2 --warmup 0 {TEXT}",
    "lm/show.py": "",
    "docs/flags.py": "",
    "benchmarks/needs.py": "",
}
IMAGENET = f"{TWA} --batch-size 32 --image-size 32"
LANGUAGE = f"--steps 2 --params_start 0 --params_end 3 --batch-size 2 {TEXT}"


def commands(document: str) -> list[str]:
    """What a document gives to bash, in its order, the same only once."""
    found = COMMANDS.finditer((ROOT / document).read_text())
    return list(dict.fromkeys(match[match.lastgroup] for match in found))


def folder_of(document: str, command: str) -> Path:
    """Where the reader would stand: beside the document if the script is there, else the root."""
    words = [word for word in shlex.split(command, comments=True) if word.endswith((".sh", ".py"))]
    here = (ROOT / document).parent
    return here if words and (here / words[0]).exists() else ROOT


def recorded(document: str, imagenet: Path, folder: Path) -> list[tuple[Path, list[str]]]:
    """What the document's commands start; see `started_by`."""
    script = ""
    for command in commands(document):
        completed = command.replace("/path/to/imagenet", str(imagenet))
        script += f"cd '{folder_of(document, command)}'\n{completed}\n"
    return started_by(script, folder, document)


def started_by(script: str, folder: Path, name: str) -> list[tuple[Path, list[str]]]:
    """What a script of bash starts: the current folder, the program and its arguments."""
    programs, record = folder / "programs", folder / "record"
    programs.mkdir(parents=True)
    record.touch()
    for program in (*FAKES, *OTHERS):
        file = programs / program
        file.write_text(f"#!/bin/bash\n{OTHERS[program]}\n" if program in OTHERS else FAKE)
        file.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RECORD": str(record),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "1",
        "HOST": "localhost",
    }
    run = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", f"set -euo pipefail\n{script}"], **run)
    assert done.returncode == 0, f"{name}: {done.stderr}"
    calls = [call.split("\0") for call in record.read_text().split("\0\n\0") if call]
    return [(Path(cwd), [program, *arguments]) for cwd, program, *arguments in calls]


def script_of(cwd: Path, words: list[str]) -> tuple[str, list[str]] | None:
    """The script of the repository that is started, and its arguments; None for other programs."""
    if words[0] in ("pip", "ruff") or words[1:3] == ["-m", "pytest"] or words[1] == "-c":
        return None
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    path = (cwd / words[place]).resolve()
    assert path.is_file(), path
    return path.relative_to(ROOT).as_posix(), words[place + 1 :]


def shorter(script: str, arguments: list[str]) -> list[str]:
    """The arguments of a run of seconds."""
    flags = SHORTER[script]
    if script == "train_twa.py" and "ImageNet" in arguments:
        flags = IMAGENET
    elif script == "train_twa.py" and "Text" in arguments:
        flags = LANGUAGE
    elif "--initial" in arguments:
        flags += " --decay-steps 4"
    if "--base" in arguments:  # that of a run of two epochs
        base = Path(arguments[arguments.index("--base") + 1])
        flags += f" --base {base.with_name('2.pt')}"
    return [*arguments, *flags.split()]


class ParsedError(Exception):
    """Raised by a parser in place of returning."""


def parse(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script until it has parsed its arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(*args, **keywords):
        parse_args(*args, **keywords)
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        with pytest.raises(ParsedError):
            call(script, *arguments)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> tuple[Path, list]:
    """A folder that stands for the repository, where scripts write, and what has been run in it."""
    return tmp_path_factory.mktemp("repository"), []


@pytest.mark.parametrize("document", [name for name in TRACKED if commands(name)])
def test_commands_do_what_the_document_says(document, repository, sound, tmp_path, monkeypatch):  # noqa: F811
    root, done = repository
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    started = recorded(document, sound, tmp_path)
    assert started
    for cwd, words in started:
        if (cwd, words) in done or not (found := script_of(cwd, words)):
            continue
        done.append((cwd, words))
        script, arguments = found
        study = ROOT / "studies" in cwd.parents
        if study or script not in SHORTER or {"clip-vit-b32", "…"} & set(arguments):
            parse(script, [word for word in arguments if word != "…"], monkeypatch)
            continue
        here = root / cwd.relative_to(ROOT)
        here.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(here)
        if "base.pt" in arguments:  # the reader's own model
            shutil.copy(next(root.rglob("soup_ViT*/*/checkpoints/2.pt")), here / "2.pt")
        result = call(script, *shorter(script, arguments))
        assert result.status == 0, f"{document}: {shlex.join(words)}: {result.err}"


@pytest.mark.parametrize("stage", ["run.sh", "swa", "soup", "lm"])
def test_a_folder_of_data_is_the_callers(stage, tmp_path):
    scripts = [ROOT / stage] if stage == "run.sh" else sorted((ROOT / stage).glob("run*.sh"))
    words = "gpt" if stage == "lm" else "Digits PreResNet20"
    default = [] if stage == "lm" else [ROOT / "datasets"]
    cases = [("my data", [tmp_path / "my data"]), ("/my data", [Path("/my data")]), ("", default)]
    for script, (data, meant) in itertools.product(scripts, cases):
        command = f"cd '{tmp_path}' && bash '{script}' {words} '{data}'"
        folder = tmp_path / f"{script.stem} {data.replace('/', 'of root ')}"
        calls = started_by(command, folder, str(script))
        assert calls
        for cwd, arguments in calls:
            pairs = itertools.pairwise(arguments)
            given = [path for flag, path in pairs if flag in ("--data-dir", "--data_path")]
            found = [Path(os.path.normpath(cwd / path)) for path in given]
            assert found == ([] if "show.py" in arguments else meant), shlex.join(arguments)


def test_commands_of_every_kind_are_found(tmp_path):
    text = (
        "Then `SEED=2 bash run.sh` and `run.sh`.\n\n"
        "    bash run.sh A \\\n        B\n    python x.py\n"
        "    no command\n\n```bash\nDST=a\npython y.py\n```\n\n```python\nimport z\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    found = commands(str(tmp_path / "page.md"))
    assert found == [
        "SEED=2 bash run.sh",
        "    bash run.sh A \\\n        B\n    python x.py\n",
        "DST=a\npython y.py\n",
    ]
