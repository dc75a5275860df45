"""Benchmarks as a user runs them, and as modules."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run_script(name: str, *arguments: str) -> str:
    """Run a script on the toy model; returns what it prints."""
    # A script finds its neighbours beside itself, unless this is set.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, str(FOLDER / name), "--device", "cpu", "--tiny", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout


def forget_scripts() -> None:
    """Take modules of the folder out of ``sys.modules``: their names are anybody's."""
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)
