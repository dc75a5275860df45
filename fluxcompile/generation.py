"""Greedy generation with a clock: prefill and decode timed apart."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """New token ids and the seconds they took: ``prefill`` up to the first, ``decode`` the rest."""

    tokens: tuple[int, ...]
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode

    @property
    def decode_per_token(self) -> float:
        """Seconds a token after the first; nan if there was only one."""
        steps = len(self.tokens) - 1
        return self.decode / steps if steps else float("nan")

    def seconds_for(self, tokens: int) -> float:
        """What a run of ``tokens`` new tokens takes at this pace."""
        return self.prefill + (tokens - 1) * self.decode_per_token


class TokenClock(BaseStreamer):
    """Notes when each token of a batch of one arrives.

    ``generate`` hands tokens over on the CPU, so a GPU has finished them by then.
    """

    def __init__(self, on_token: Callable[[int], None] | None = None) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # the first call brings the prompt back
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.tokens += value.flatten().tolist()
        if self._on_token:
            self._on_token(len(self.tokens))

    def end(self) -> None:
        pass


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    max_new_tokens: int,
    on_token: Callable[[int], None] | None = None,
    **generate_kwargs,
) -> Generation:
    """`model.generate` without sampling on a batch of one.

    Args:
        input_ids, attention_mask: [1, S].
        on_token: called after each new token with the number of tokens so far.
        generate_kwargs: passed on to ``generate``.
    """
    clock = TokenClock(on_token)
    start = time.perf_counter()
    model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=clock,
        **generate_kwargs,
    )
    return Generation(
        tokens=tuple(clock.tokens),
        prefill=clock.times[0] - start,
        decode=clock.times[-1] - clock.times[0],
    )


def say_that_it_grows(cache: DynamicCache) -> None:
    """The next graph takes the cache's length as a symbol: one decode graph serves every step.

    Dynamo would find out by itself, at the price of compiling the second decode step again.
    """
    for layer in cache.layers:
        for buffer in (layer.keys, layer.values):
            torch._dynamo.maybe_mark_dynamic(buffer, 2)
