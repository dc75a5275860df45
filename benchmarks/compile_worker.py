"""One process of `compile_time.py`: compile, run a prompt and some steps, say how long it took.

Prints one line of JSON, the last of its output.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

import fluxcompile
from common import synchronise
from fluxcompile.cache_argument import cache_argument
from models import SHAPES, load_model
from record import dtype_on
from routing import router_for, spread_dense

CONTENDERS = (
    "eager",
    "inductor",
    "flux",
    "flux router",
    "flux regional",
    "flux regional router",
)


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """What a worker has to be told, and `compile_time.py` passes on."""
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape has")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--new", type=int, default=5, help="tokens after the prompt")
    parser.add_argument("--omega", type=float, default=0.5, help="share of sparse layers")
    parser.add_argument("--sink", type=int, default=fluxcompile.FluxConfig().sink)
    parser.add_argument("--local", type=int, default=fluxcompile.FluxConfig().local)
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    add_worker_arguments(parser)
    parser.add_argument("--device", required=True)
    parser.add_argument("--lowering", required=True)
    args = parser.parse_args()
    started = time.perf_counter()
    model, _ = load_model(args.shape, args.layers, args.device, dtype_on(args.device))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, args.length), generator=generator)
    ids = ids.to(model.device)
    with torch.no_grad():
        model(input_ids=ids[:, :64])  # libraries are loaded before the clock runs
        synchronise(args.device)
        ready = time.perf_counter()
        call = prepare(model, args, ids)
        first, tokens = generate(call, model, ids, args)
        again, _ = generate(call, model, ids, args)
    caches = {
        name: counters[group][name]
        for group, name in (
            ("inductor", "fxgraph_cache_hit"),
            ("inductor", "fxgraph_cache_miss"),
            ("aot_autograd", "autograd_cache_hit"),
            ("aot_autograd", "autograd_cache_miss"),
        )
    }
    found = {
        "setup": ready - started,
        "first": first,
        "again": again,
        "compile": sum(first) - sum(again),
        "graphs": counters["stats"]["unique_graphs"],
        "caches": caches,
        "tokens": tokens,
    }
    print(json.dumps(found))


def prepare(model: PreTrainedModel, args: argparse.Namespace, ids: torch.Tensor) -> Callable:
    """The model as the contender has it."""
    if args.contender == "eager":
        return model
    if args.contender == "inductor":
        return torch.compile(model)
    config = fluxcompile.FluxConfig(sink=args.sink, local=args.local)
    routes = spread_dense(model.config.num_hidden_layers, args.omega)
    options = {"routes": routes, "config": config, "lowering": args.lowering, "strict": True}
    if args.contender.endswith("router"):
        full = torch.tensor([routes], dtype=torch.bool)
        fluxcompile.attach(model, router_for(model, config, full, ids))
        options["routes"] = "router"
    if "regional" in args.contender:
        return fluxcompile.compile(model, regional=True, **options) or model
    return torch.compile(model, backend="flux", options=options)


def generate(
    call: Callable, model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace
) -> tuple[list[float], list[int]]:
    """Seconds of the prompt and of every step after it, and the tokens."""
    room = args.length + args.new
    static = args.cache == "static"
    cache: Cache = (
        StaticCache(config=model.config, max_cache_len=room)
        if static
        else DynamicCache(config=model.config)
    )
    cached = {cache_argument(model): cache}
    times, tokens = [], []
    for _ in range(args.new):
        started = time.perf_counter()
        output = call(input_ids=ids, use_cache=True, logits_to_keep=1, **cached)
        ids = output.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
        times.append(time.perf_counter() - started)
    return times, tokens


if __name__ == "__main__":
    main()
