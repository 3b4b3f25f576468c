"""What the documentation tells its readers to type exists: make targets, scripts, options, links.

The ```bash blocks of README.md, CONTRIBUTING.md, docs/ and examples/ are read, not run.
"""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.command_lines import PROGRAM, ROOT, command_of, errors_of, example_command

PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")})
SCRIPT = re.compile(r"(\./)?((tools|examples|benchmarks|tests|\.ci)/[\w./*-]+|[\w-]+\.(py|sh|slurm|cfg))")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
BLOCK = re.compile(r"^( *)```(?:bash|sh|shell)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")

Command = tuple[dict[str, str], list[str]]
"""Assignments in front of a command, and its words."""


def commands_in(text: str) -> list[Command]:
    """The simple commands of the ```bash blocks of a page."""
    return [command for _, block in BLOCK.findall(text) for command in _parse(block)]


def _parse(block: str) -> list[Command]:
    commands: list[Command] = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=";&|<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|()") and words:
                commands.append(_split_assignments(words))
                words = []
            elif not set(word) <= set(";&|()"):
                words.append(word)
    return commands


def _split_assignments(words: list[str]) -> Command:
    assignments = {}
    while words and (match := ASSIGNMENT.fullmatch(words[0])):
        assignments[match[1]] = match[2]
        words = words[1:]
    return assignments, words


def all_commands() -> list[tuple[Path, Command]]:
    return [(page, command) for page in PAGES if page.exists() for command in commands_in(page.read_text())]


def test_blocks_are_read_as_a_shell_does() -> None:
    page = """
    ```bash
    make demo   # a comment; make nothing
    A=1 B="two words" torchrun --nproc-per-node 2 \\
        x.py --flag 'a b' && tools/y.py < in > out | tee log
    ```
    ```text
    make unread
    ```
    """
    assert commands_in(page.replace("\n    ", "\n")) == [
        ({}, ["make", "demo"]),
        ({"A": "1", "B": "two words"}, ["torchrun", "--nproc-per-node", "2", "x.py", "--flag", "a b"]),
        ({}, ["tools/y.py", "<", "in", ">", "out"]),
        ({}, ["tee", "log"]),
    ]


def test_readme_starts_with_the_two_commands() -> None:
    words = [words for _, words in commands_in((ROOT / "README.md").read_text())]
    assert ["make", "demo"] in words
    assert ["make", "test"] in words


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = [
        f"{page.name}: make {word}"
        for page, (_, words) in all_commands()
        if words[:1] == ["make"]
        for word in words[1:]
        if word not in targets and not ASSIGNMENT.fullmatch(word) and not word.startswith("-")
    ]
    assert not missing


def test_scripts_exist() -> None:
    missing = [
        f"{page.name}: {word}"
        for page, (_, words) in all_commands()
        for word in words
        if SCRIPT.fullmatch(word) and not list(ROOT.glob(word.removeprefix("./")))
    ]
    assert not missing


def test_links_lead_somewhere() -> None:
    missing = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in LINK.findall(page.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists()
    ]
    assert not missing


@cache
def _options(script: str) -> set[str]:
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, f"{script} --help: {shown.stderr}"
    return set(re.findall(r"--[a-z][\w-]*", shown.stdout))


def test_options_of_tools_exist() -> None:
    unknown = []
    for page, (_, words) in all_commands():
        for position, word in enumerate(words):
            if re.fullmatch(r"(\./)?(tools|benchmarks)/\w+\.py", word):
                given = {w.split("=")[0] for w in words[position + 1 :] if w.startswith("--")}
                unknown += [f"{page.name}: {word} {o}" for o in given and given - _options(word)]
    assert not unknown


def test_training_commands_are_accepted(tmp_path: Path) -> None:
    """Command lines of pretrain_archscale.py, and of the examples with what is written behind them."""
    found = []
    for number, (page, (assignments, words)) in enumerate(all_commands()):
        script = next((ROOT / w for w in words if re.fullmatch(r"(\./)?examples/[\w-]+\.(sh|slurm)", w)), None)
        if script is not None and script.is_file():
            options = words[[ROOT / w for w in words].index(script) + 1 :]
            command = example_command(script, tmp_path / str(number), *options, **assignments)
            found.append((f"{page.name}: {shlex.join(words)}", command))
        elif any(Path(w).name == PROGRAM for w in words) and "--help" not in words:
            found.append((f"{page.name}: {shlex.join(words)}", command_of(words)))
    errors = errors_of([command for _, command in found])
    refused = [f"{text}\n  {error}" for (text, _), error in zip(found, errors, strict=True) if error]
    assert found
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_without_a_command(page: Path) -> None:
    """A block that this file cannot read would be a block that nobody tests."""
    for _, block in BLOCK.findall(page.read_text()):
        assert _parse(block), block
