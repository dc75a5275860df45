"""What models call the argument that takes their cache."""

import inspect

from torch import nn

#: names under which models and their decoder layers take it, the newer first
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> str:
    """The name of ``model``'s own: newer versions of transformers warn of the older one."""
    newer, older = CACHE_ARGUMENTS
    return newer if newer in inspect.signature(model.forward).parameters else older
