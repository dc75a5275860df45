"""Runs interpreted.py in a process of its own.

Triton must be told to interpret before it is imported, and importing it anywhere in this process,
as Inductor does, would settle the matter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("kernel", ["prefill", "decode"])
def test_kernels_through_the_interpreter(kernel):
    root = Path(__file__).parents[2]
    file = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", kernel]
    run = subprocess.run(
        [*command, str(file)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
