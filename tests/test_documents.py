"""The documents that git tracks: what they link to, and the scripts that they run, exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
CODE_BLOCK = re.compile(r"^```.*?^```|^    .*?$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\b(?:bash|python)(?: -u)? ([\w./-]+\.(?:py|sh))\b")


def prose(document: Path) -> str:
    return CODE_BLOCK.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """The headings as links name them on GitHub: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(document: Path) -> list[str]:
    """The relative links of a document, images included, to files or headings that do not exist."""
    found = []
    for link in LINK.findall(prose(document)):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file) if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("name", TRACKED)
def test_links_of_the_documents_lead_somewhere(name):
    assert broken(ROOT / name) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Two words, and more\n\n```\n# no heading\n```\n")
    document = tmp_path / "document.md"
    document.write_text(
        "[a](other.md#two-words-and-more) [b](https://example.org) ![c](gone.png)\n"
        "[d](other.md#no-heading) [e](#nowhere)\n\n    [f](in_code.md)\n"
    )
    assert broken(document) == ["gone.png", "other.md#no-heading", "#nowhere"]


@pytest.mark.parametrize("name", TRACKED)
def test_scripts_that_the_documents_run_are_there(name):
    document = ROOT / name
    for script in COMMAND.findall(document.read_text()):
        assert (ROOT / script).exists() or (document.parent / script).exists(), script


def test_the_flags_are_those_of_the_parsers():
    """`python docs/flags.py > docs/flags.md` writes them anew."""
    script = [sys.executable, ROOT / "docs/flags.py"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs/flags.md").read_text()


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().split()) <= 900
