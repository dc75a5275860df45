"""A loaded model that answers prompts, compiled or not, with a clock and a progress bar."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import DynamicCache, PreTrainedModel

from fluxcompile import smollm2
from fluxcompile.cache_argument import cache_argument
from fluxcompile.demo.settings import DemoSettings
from fluxcompile.generation import Generation, greedy, say_that_it_grows


class Prompt(Protocol):
    """Token ids and their mask, int64 ``[1, S]`` each."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


@dataclass(frozen=True)
class Session:
    """The model of a demo, and where it writes."""

    settings: DemoSettings
    model: PreTrainedModel
    tokenizer: Any
    console: Console

    @classmethod
    def start(cls, settings: DemoSettings, console: Console) -> Self:
        """Load the model and say which it is."""
        # The loaders' own bars go to stderr, and would run through this one.
        with ticking(console, "loading SmolLM2-135M-Instruct", 1), redirect_stderr(io.StringIO()):
            model, tokenizer = smollm2.load(settings.device, settings.dtype)
        dtype = str(settings.dtype).removeprefix("torch.")
        threads = f", {torch.get_num_threads()} threads" if settings.device == "cpu" else ""
        console.print(
            f"[bold]model[/]  SmolLM2-135M-Instruct, {dtype} on {settings.device}{threads}, "
            f"lowered by {settings.lowering}"
        )
        return cls(settings, model, tokenizer, console)

    def compile(self, options: dict[str, Any]) -> None:
        """Forget what was compiled before and compile anew on the next call."""
        torch._dynamo.reset()
        self.model.compile(backend="flux", options=options)

    def answer(self, prompt: Prompt, label: str, max_new_tokens: int | None = None) -> Generation:
        """Continue ``prompt`` greedily, under a progress bar named ``label``."""
        limit = max_new_tokens or self.settings.max_new_tokens
        cache = DynamicCache(config=self.model.config)
        device = self.settings.device
        with ticking(self.console, label, limit) as tick:

            def on_token(done: int) -> None:
                tick(done)
                if done == 1:
                    say_that_it_grows(cache)

            return greedy(
                self.model,
                prompt.input_ids.to(device),
                prompt.attention_mask.to(device),
                limit,
                on_token=on_token,
                **{cache_argument(self.model): cache},
            )

    def text(self, generation: Generation) -> str:
        return self.tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()

    def report_pinned(self, pairs: list[tuple[Generation, Generation]]) -> bool:
        """Say whether routes pinned to full gave eager's tokens; ``pairs`` of eager and pinned.

        Returns False where they did not although they should have: in half precision a different
        but equally good rounding may change a token, so there only the report counts.
        """
        places = [first_difference(eager, pinned) for eager, pinned in pairs]
        place = next((place for place in places if place is not None), None)
        if place is None:
            self.console.print("routes pinned to full: [green]the same text as eager[/]")
            return True
        self.console.print(
            f"routes pinned to full: [red]differs from eager[/] at new token {place}"
        )
        return self.settings.dtype != torch.float32


def first_difference(one: Generation, other: Generation) -> int | None:
    """The first new token in which two answers differ, or None."""
    if one.tokens == other.tokens:
        return None
    pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
    shorter = min(len(one.tokens), len(other.tokens))
    return next((i for i, (a, b) in pairs if a != b), shorter)


@contextmanager
def ticking(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar whose clock goes on while one long call runs; yields its setter."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
