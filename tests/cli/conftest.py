"""The command line, as its tests call it."""

import json

import pytest

from lorakit.cli.main import main


@pytest.fixture
def run(capsys):
    """A function that runs a command line and gives back its exit code and JSON."""

    def command(*words):
        code = main([*map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return command
