"""Every command that the documentation shows is one: its options exist and take such values."""

import re
import shlex
from pathlib import Path

import pytest

from src.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/your_model.md", "docs/merging.md", "docs/evaluation.md", "docs/studies.md")
OWN_FILE = re.compile(r"`(choose\.yaml)`:\n\n((?:    .*\n)+)")
"""A file that the reader writes, and what the README puts into it."""
USERS = "mystudy.yaml"


def documented():
    """Commands in indented blocks, each once; lines that end in a backslash are joined."""
    found = {}
    for document in DOCUMENTS:
        text = re.sub(r"\\\n\s*", " ", (ROOT / document).read_text())
        for line in re.findall(
            r"^ {4,}(?:\S+=\S+ |torchrun .* |srun .*)?(?:\S*python )?-m src (.*)$", text, re.MULTILINE
        ):
            command = " ".join(shlex.split(line, comments=True))
            found.setdefault(command, (document, shlex.split(line, comments=True)))
    return found


COMMANDS = documented()


def test_the_documents_show_commands():
    assert len(COMMANDS) > 40
    assert {words[0] for _, words in COMMANDS.values()} >= {"fit", "fisher", "merge", "test", "report", "experiment"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_understood(command, tmp_path, monkeypatch, capsys):
    document, words = COMMANDS[command]
    if USERS in words:
        pytest.skip("the study is the reader's own")
    monkeypatch.chdir(tmp_path)
    for name, content in OWN_FILE.findall((ROOT / document).read_text()):
        (tmp_path / name).write_text(re.sub("^    ", "", content, flags=re.MULTILINE))
    try:
        code = main([*words, "--print_config"])
    except SystemExit as end:  # jsonargparse ends the program when the configuration is printed
        code = end.code
    assert not code, capsys.readouterr().err
