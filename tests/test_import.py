"""Importing the package must be cheap and must not need Triton."""

import subprocess
import sys

_SCRIPT = """
import sys
sys.modules["triton"] = None  # any import of it now raises
import fluxcompile
for name in ("torch._inductor", "transformers"):
    assert name not in sys.modules, name
print(sorted(fluxcompile.__all__)[0])
"""


def test_import_needs_neither_triton_nor_inductor():
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "CacheError"
