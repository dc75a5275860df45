"""What compiles: Triton, and the C++ compiler that Inductor and Triton call."""

import importlib
import os
import shutil

import torch

from fluxcompile.doctor.finding import Finding, fail, ok, warn
from fluxcompile.doctor.versions import judge, triton_range

TRITON, COMPILER = "triton", "compiler"
COMPILERS = ("g++", "clang++", "c++")


def triton() -> Finding:
    """Importable, of a supported version, and compiling rather than interpreting."""
    try:
        module = importlib.import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        found = f"cannot be imported ({type(error).__name__}: {error})"
        install = 'pip install "fluxcompile[gpu]"'
        if torch.cuda.is_available():
            return fail(TRITON, found, install)
        return warn(TRITON, found, f"{install}, if this machine is to use a GPU")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return warn(
            TRITON,
            f"{module.__version__}, interpreted: slow, and wrong for bfloat16 matrix products",
            "unset TRITON_INTERPRET",
        )
    return judge(TRITON, module.__version__, triton_range())


def has_compiler() -> bool:
    """Whether a C++ compiler is on PATH, or named by ``CXX``."""
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in (*([named] if named else []), *COMPILERS))


def compiler() -> Finding:
    """Inductor compiles C++ on a CPU, Triton a launcher on a GPU."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        path = name and shutil.which(name)
        if path:
            return ok(COMPILER, path)
    return fail(
        COMPILER,
        f"none of {', '.join(COMPILERS)} is on PATH",
        "install g++ (or clang++), or compile with lowering='aot_eager'",
    )
