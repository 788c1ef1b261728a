"""What the documents say can be typed. Catches commands, flags and Python that do not exist, and links to nothing."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from conftest import ROOT
from dflash_cpp import cli

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^ *(?:\$ )?(?:pip install [^&]*&& |echo [^|]*\| )?(dflash-cpp [^\n#|]*)", re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Command lines, each from the program's name on to a comment or a pipe."""
    return [shlex.split(line) for line in COMMAND.findall(text)]


def helps() -> str:
    """The examples of every command's help."""
    parser = cli.build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return "\n".join(str(p.epilog) for p in (parser, *commands.choices.values()))


def blocks(path: Path) -> str:
    """The code blocks of a document."""
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))


def test_commands_are_found() -> None:
    assert len(commands(blocks(ROOT / "README.md"))) >= 7
    assert len(commands(helps())) > 20


@pytest.mark.parametrize(
    "text", [*(blocks(path) for path in DOCUMENTS), helps()], ids=[*(p.name for p in DOCUMENTS), "help"]
)
def test_commands_parse(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.build_parser()
    for words in commands(text):
        try:
            parser.parse_args(words[1:])
        except SystemExit as e:
            assert e.code == 0, (words, capsys.readouterr().err)


def test_the_python_of_the_readme(nano_path: Path, nano_drafter_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    for code in found:
        code = code.replace('"m2.gguf"', repr(str(nano_path))).replace('"m2-dflash.gguf"', repr(str(nano_drafter_path)))
        exec(compile(code, "README.md", "exec"), {})  # an example that fails raises here
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else (path.parent / name).resolve()
        assert target.exists(), (path.name, link)
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, (path.name, link)
