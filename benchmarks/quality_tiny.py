"""A toy model and tokenizer: they show that the benchmark runs, and nothing about quality."""

import torch

from models import random_model


class ByteTokenizer:
    """A token a byte; id 0 begins a text, there is no chat template."""

    chat_template = None
    eos_token_id = 0

    def __len__(self) -> int:
        return 257

    def __call__(self, text: str, add_special_tokens: bool = True):
        ids = [0] * add_special_tokens + [1 + byte for byte in text.encode()]
        return _Encoded(ids)

    def decode(self, ids) -> str:
        return bytes(i - 1 for i in map(int, ids) if i).decode(errors="replace")


class _Encoded:
    def __init__(self, input_ids: list[int]) -> None:
        self.input_ids = input_ids


def load_tiny(device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, ByteTokenizer]:
    return random_model("tiny", None, device, dtype), ByteTokenizer()
