"""The prompt that one process and two serve, and the models."""

from tests.parity.models import Prompt, prompt, random_router, tiny_model

GIVEN = prompt(2, 63, "left")
NEW = 4
#: by model: a seed whose random router tells the rows apart
SEEDS = {"llama": 8, "qwen3": 8}


def row_of(given: Prompt, row: int) -> Prompt:
    """One row, with its padding."""
    return Prompt(given.ids[row : row + 1], given.mask[row : row + 1])


def make(kind: str):
    """A model, and a router that sends each row its own way."""
    model = tiny_model(kind, head_dim=16)
    return model, random_router(model, seed=SEEDS[kind])
