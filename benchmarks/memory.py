"""Memory of a prompt: its keys and values after routing, and the peak while it runs.

    python benchmarks/memory.py --lengths 8192 131072 --json memory.json
    python benchmarks/memory.py --lengths 262144 --only "flux.*0.75"
    python benchmarks/memory.py --device cpu --tiny --lowering eager --lengths 700    # does it run?

Random weights of a known shape, logits of the last token only. Each cache is what a user would
make: a DynamicCache, a StaticCache or a FluxCache (growing, or with ``max_length``) with room for
the prompt and 128 more tokens. Bytes of keys and values are those of the memory behind a cache's
tensors, beside what arithmetic says they must be; ``FluxCache.memory()`` has to agree. The peak is
what was allocated beyond the weights while the prompt ran, compiled before (0 on a CPU).
"""

import argparse
import gc
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import fluxcompile
from caches import KINDS, SHORT, new_cache
from common import PeakMemory, forget_compiled, print_table, seconds
from fluxcompile.cache_argument import cache_argument
from models import SHAPES, kv_token_bytes, load_model
from record import Record, dtype_on, failure, parse_with_common
from routing import spread_dense

AFTER = 128  # tokens that a cache of fixed size has room for beyond the prompt


class WrongBytes(Exception):
    """A cache says another size than its tensors have."""


@dataclass(frozen=True)
class Contender:
    """One row of the table: "eager" or "flux", a kind of cache, and the share of sparse layers."""

    compiler: str
    cache: str
    omega: float = 0.0

    @property
    def name(self) -> str:
        share = f", Ω={self.omega:.2f}" * (self.compiler == "flux")
        return f"{self.compiler}, {self.cache} cache{share}"


def contenders(args: argparse.Namespace) -> Iterator[Contender]:
    yield from (Contender("eager", x) for x in args.caches if not x.startswith("flux"))
    yield from (Contender("flux", x, omega) for x in args.caches for omega in args.omega)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072, 262144])
    parser.add_argument("--omega", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--caches", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sink", type=int, default=fluxcompile.FluxConfig().sink)
    parser.add_argument("--local", type=int, default=fluxcompile.FluxConfig().local)
    return parse_with_common(parser, arguments)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    dtype = dtype_on(args.device)
    model, about = load_model(args.shape, args.layers, args.device, dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    record = Record(
        "memory", args,
        {"model": about, "dtype": str(dtype).removeprefix("torch."), "weights_bytes": weights},
    )  # fmt: skip
    memory = Memory(model, args)
    # A contender's lengths together: one compile, or two, serves them all.
    for contender in contenders(args):
        for length in args.lengths:
            name = f"{length} tokens: {contender.name}"
            if record.has(name) or (args.only and not re.search(args.only, name)):
                continue
            row = {"name": name, "length": length, **vars(contender)}
            try:
                row |= memory.measure(contender, length)
            except WrongBytes as problem:
                row["wrong"] = str(problem)
            except Exception as problem:
                traceback.print_exc()
                row |= failure(problem, args.device)
            print(f"{name}: {brief(row)}", flush=True)
            record.add(row)
        forget_compiled(args.device)
    for length in args.lengths:
        rows = [row for row in record.rows if row["length"] == length and "kv_bytes" in row]
        if rows:
            print_table(f"memory of {length} tokens, {args.shape}", [table_row(x) for x in rows])
    if wrong := record.finish():
        raise SystemExit(f"wrong: {', '.join(wrong)}")


class Memory:
    """Prompts of one model, each with a new cache."""

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.layers = model.config.num_hidden_layers
        self.config = fluxcompile.FluxConfig(sink=args.sink, local=args.local)
        self.per_token = kv_token_bytes(model.config, model.dtype)

    def measure(self, contender: Contender, length: int) -> dict:
        device = self.args.device
        routes = spread_dense(self.layers, contender.omega)
        call = self.model
        if contender.compiler == "flux":
            options = {"routes": routes, "config": self.config, "lowering": self.args.lowering}
            call = torch.compile(self.model, backend="flux", options=options)
        ids = torch.randint(self.model.config.vocab_size, (1, length), device=device)
        # Compiles; eager has only its libraries to load, for which a short prompt will do.
        self.prompt(call, contender, ids if contender.compiler == "flux" else ids[:, :SHORT])
        gc.collect()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        held: list[Cache] = []
        with PeakMemory(device) as peak:
            took = seconds(lambda: held.append(self.prompt(call, contender, ids)), 1, device)[0]
        cache = held.pop()
        after = torch.cuda.memory_allocated() if device == "cuda" else 0
        found = bytes_held(cache)
        whole = length * self.layers * self.per_token
        row = {
            "kv_bytes": found,
            "expected_bytes": self.expected(contender, length, routes),
            "whole_bytes": whole,
            "share": found / whole,
            "peak_bytes": max(peak.bytes - before, 0),
            "left_bytes": after - before,
            "seconds": took,
        }
        if isinstance(cache, fluxcompile.FluxCache):
            row["trimmed_layers"] = len(cache.memory().trimmed)
            if cache.memory().total != found:
                raise WrongBytes(f"expected {found} bytes, memory() says {cache.memory().total}")
        return row

    def prompt(self, call, contender: Contender, ids: torch.Tensor) -> Cache:
        cache = new_cache(contender.cache, self.model, self.config, ids.shape[1] + AFTER)
        call(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(self.model): cache},
        )
        return cache

    def expected(self, contender: Contender, length: int, routes: list[int]) -> int:
        """Bytes by arithmetic: tokens kept, and one slot more in a ring."""
        fixed = contender.cache in ("static", "flux")
        whole = length + AFTER * fixed + (contender.cache == "flux")
        slots = [whole] * self.layers
        if contender.cache.startswith("flux"):
            spare = fluxcompile.FluxCache(self.model).pattern.spare
            ring = self.config.sink + self.config.local + spare + 1
            slots = [whole if full else min(ring, whole) for full in routes]
        return sum(slots) * self.per_token


def bytes_held(cache: Cache) -> int:
    """Of the memory behind the keys and values of ``cache``, each piece once."""
    tensors = [kv for layer in cache.layers for kv in (layer.keys, layer.values)]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def brief(row: dict) -> str:
    problem = next((x for x in ("wrong", "failed") if x in row), None)
    if problem:
        return f"{problem.upper()}: {row[problem]}"
    peak = row["peak_bytes"] / 2**30
    return f"{row['kv_bytes'] / 2**30:.3f} GiB of keys and values, peak {peak:.2f} GiB"


def table_row(row: dict) -> dict[str, str]:
    def gib(name: str) -> str:
        return f"{row[name] / 2**30:.3f}"

    return {
        "contender": row["name"].split(": ", 1)[1],
        "KV GiB": gib("kv_bytes"),
        "by arithmetic": gib("expected_bytes"),
        "of all tokens": f"{row['share']:.4f}",
        "trimmed layers": str(row.get("trimmed_layers", "—")),
        "peak GiB": gib("peak_bytes") if row["peak_bytes"] else "—",
        "left GiB": gib("left_bytes") if row["left_bytes"] else "—",
    }


if __name__ == "__main__":
    main()
