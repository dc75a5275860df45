"""A PyTorch that has renamed an internal: the first compile says which, and what versions work."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from fluxcompile import torch_internals
from fluxcompile.errors import TorchVersionError
from fluxcompile.torch_internals import internal, naming_versions
from tests.passes.graphs import Layer, hidden

RENAMED = (
    ("torch._dynamo.eval_frame", "_debug_get_cache_entry_list"),
    ("torch._dynamo.guards", "install_guard"),
)
#: those that are looked up when the backend is imported, or the lowering
AT_IMPORT = (
    ("torch._guards", "TracingContext"),
    ("torch._inductor.custom_graph_pass", "CustomGraphPass"),
)
_IMPORTING = """
import importlib, sys, torch
module, name, ours = sys.argv[1:]
module = importlib.import_module(module)
delattr(module, name)
importlib.import_module(ours)
"""


def says(message: str, module: str, name: str) -> None:
    assert f"{module}.{name}" in message
    assert "expected torch>=2.11" in message
    assert f"got torch {torch.__version__}" in message


@pytest.mark.parametrize(("module", "name"), RENAMED)
def test_the_first_compile_says_so(monkeypatch, module, name):
    model = Layer().requires_grad_(False)
    monkeypatch.delattr(f"{module}.{name}")
    compiled = torch.compile(model, backend="flux", options={"lowering": "eager", "routes": "full"})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        compiled(hidden())
    error = caught.value.inner_exception
    assert type(error) is TorchVersionError
    says(str(error), module, name)
    monkeypatch.undo()
    torch._dynamo.reset()
    with torch.no_grad():  # and nothing is left half done
        torch.testing.assert_close(compiled(hidden()).shape, model(hidden()).shape)


@pytest.mark.parametrize(
    ("module", "name", "ours"),
    [
        (*AT_IMPORT[0], "fluxcompile.backend"),
        pytest.param(*AT_IMPORT[1], "fluxcompile.branch_operands", marks=pytest.mark.slow),
    ],
)
def test_so_does_the_import_of_the_backend(module, name, ours):
    command = [sys.executable, "-c", _IMPORTING, module, name, ours]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "TorchVersionError" in last
    says(last, module, name)


def test_a_module_that_is_gone():
    with pytest.raises(TorchVersionError, match=r"torch\._inductor\.not_there: expected torch>="):
        internal("torch._inductor.not_there", "anything")


def test_an_attribute_of_an_internal_object():
    from torch._guards import Guard

    with (
        pytest.raises(TorchVersionError, match=r"torch\._guards\.Guard\.renamed"),
        naming_versions(),
    ):
        Guard.renamed  # noqa: B018


@pytest.mark.parametrize("fault", [AttributeError("of ours"), ImportError("no", name="triton")])
def test_other_errors_stay_what_they_are(fault):
    with pytest.raises(type(fault)) as caught, naming_versions():
        raise fault
    assert caught.value is fault


def test_the_versions_are_the_package_s():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (required,) = [d for d in project["dependencies"] if re.match(r"torch\W", d)]
    assert required == torch_internals.SUPPORTED
