"""Runs interpreted.py and interpreted_sparse.py in processes of their own.

Triton must be told to interpret before it is imported, and importing it anywhere in this process,
as Inductor does, would settle the matter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


# what pytest selects by: the file
KERNELS = {
    "gradients": "interpreted.py",
    "prefill or decode or router or row": "interpreted.py",
    "triangle or block_sparse or xattention or half": "interpreted_sparse.py",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_through_the_interpreter(kernel):
    root = Path(__file__).parents[2]
    file = Path(__file__).with_name(KERNELS[kernel])
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
