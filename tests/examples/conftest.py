import sys

import pytest
from commands import run

from examples import steps


@pytest.fixture
def called(monkeypatch, own_cache):
    """The commands of a recipe, each in a process that need not import torch again."""
    commands = []

    def call(command, log=None):
        commands.append(command)
        done = run(*command)
        sys.stderr.write(done.stderr[-2000:] if done.returncode else "")
        return done.returncode

    monkeypatch.setattr(steps, "call", call)
    return commands
