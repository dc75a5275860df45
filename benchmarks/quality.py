"""What routes cost in quality: learned routers, static patterns and full attention, held out.

    python benchmarks/quality.py --router flux=DIR --output benchmarks/results/quality
    python benchmarks/quality.py --device cpu --tiny --output /tmp/quality         # does it run?

Needles, other retrieval, code, prose and in-context learning on text that no router was trained
on, at 2K, 4K and 8K. Every router runs through the compiled model as a user runs it: the prompt
fills the cache and decides the routes, the answer follows. An answer counts if greedy generation
says it token for token (judged teacher-forced, which is the same); code and prose by the loss of
their second half, routed by the first. `fluxcompile/evaluation/as_user.py` says in which sparse
modes so long a half is what generation computes. Static patterns share one training-mode compile,
which is checked against the user's first, on 64 prompts of each cell; there it always is.

To compare at equal Ω, each router gets static counterparts with its own sparse attention and as
many sparse layers as it has on average, rounded down in their favour: ``greedy`` (searched on
training prompts: what costs least by ``--search-by``), ``greedy-retrieval`` (searched on those of
retrieval alone), ``exchanged`` and ``exchanged-retrieval`` (the same, with exchanges of layers
after it: the hardest), ``entropy``, ``random``, and ``majority``, the layers that the router itself
most often makes sparse. Routers are held against them by the probability of right answers, which
needs fewer prompts than their number. Routers of several sparse modes may take part at once: the
patterns then say theirs in their names.

The ablation: train routers that differ in one setting and give all of them, seeds under one name:

    for seed in 0 1 2; do
      fluxcompile train smollm2 --output runs/full-$seed --seed $seed --sink 64 --local 512
      fluxcompile train smollm2 --output runs/plain-$seed --seed $seed --sink 64 --local 512 \
        --set SETTING=VALUE
    done
    python benchmarks/quality.py --output report \
      --router full=runs/full-{0,1,2} --router plain=runs/plain-{0,1,2}

(``--router NAME=DIR`` may be repeated; further directories after it are further seeds.) A fixed
pattern of your own: ``--static NAME=1,0,0,…``, 1 for full attention. ``--output`` gets
``quality.json``, ``pareto.png`` and ``routes.png``; the plots need ``pip install
"fluxcompile[bench]"``. ``benchmarks/recipes.py`` trains many recipes at once.

``--gpus N`` spreads the contenders over N GPUs, a process each; what is found is the same. Each
contender is kept under ``--output/partial`` as soon as it is done: a run that was ended goes on
with ``--resume`` and otherwise the same arguments, on the same kind of device.
"""

import argparse
import time
from pathlib import Path

from common import environment, print_table, write_json
from fluxcompile.config import SPARSE_MODES, FluxConfig
from fluxcompile.errors import FluxError
from fluxcompile.evaluation import builtin_prompts
from fluxcompile.evaluation.prompts import METRICS, check_lengths
from fluxcompile.options import LOWERINGS
from fluxcompile.training.data import ALL
from quality_contenders import given_patterns, given_routers
from quality_goals import goals
from quality_plots import pareto, require_matplotlib, route_map
from quality_record import as_record
from quality_run import Bench, check_patterns, layers_of, partial_results, pool_of
from quality_search import BY
from quality_static import METHODS
from quality_tables import goal_rows, omega_rows, score_rows, summary_rows
from quality_worker import load


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help='"smollm2", a directory or a Hub id')
    parser.add_argument(
        "--router", nargs="+", action="append", default=[], metavar="NAME=DIR [DIR ...]"
    )
    parser.add_argument(
        "--bias", type=float, nargs="+", default=[0.0],
        help="towards full attention (FluxRouter.biased); every router takes part with each",
    )  # fmt: skip
    parser.add_argument("--static", action="append", default=[], metavar="NAME=1,0,0,...")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--sparse-layers",
        type=int,
        nargs="*",
        default=[],
        help="also static patterns with so many sparse layers, besides the routers' counterparts",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--tasks", nargs="+", default=list(ALL), choices=sorted(METRICS))
    parser.add_argument("--examples", type=int, default=100, help="prompts a task and length")
    parser.add_argument("--style", choices=("mixed", "chat", "plain"), default="mixed")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and resamples")
    parser.add_argument("--batch", type=int, default=8, help="prompts a call")
    parser.add_argument(
        "--sparse", choices=SPARSE_MODES, default="streaming", help="where no router says"
    )
    parser.add_argument("--sink", type=int, default=64, help="where no router says")
    parser.add_argument("--local", type=int, default=512, help="where no router says")
    parser.add_argument("--search-length", type=int, default=4096, help="of a search's prompts")
    parser.add_argument("--search-examples", type=int, default=64, help="a task, of a search's")
    parser.add_argument(
        "--search-by", choices=BY, default=BY[0],
        help="what a search's layers should cost least of",
    )  # fmt: skip
    parser.add_argument(
        "--through",
        choices=("user", "graph"),
        default="user",
        help="routers: an inference compile each, or the training-mode compile of the patterns",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=1, help="processes, with a GPU each")
    parser.add_argument("--resume", action="store_true", help="do not redo what --output has")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--lowering", choices=LOWERINGS, default="inductor")
    parser.add_argument(
        "--regional",
        action="store_true",
        help="compile the training-mode graph layer by layer, equal layers once",
    )
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--no-plots", action="store_true")
    args = parser.parse_args(arguments)
    if args.gpus < 1:
        parser.error("--gpus: expected at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if not args.no_plots:
        require_matplotlib()  # before anything takes time
    started = time.perf_counter()
    model, tokenizer = load(args)
    check_lengths(model, args.lengths)
    layers = layers_of(model)
    routers = given_routers(args.router, args.bias)
    for named in routers:
        named.router.check_model(model)
    patterns = given_patterns(args.static)
    check_patterns(patterns, layers)
    configs = [router.router.config for router in routers] or [
        FluxConfig(sparse=args.sparse, sink=args.sink, local=args.local)
    ]
    cells = builtin_prompts(
        tokenizer,
        tasks=args.tasks,
        lengths=args.lengths,
        examples=args.examples,
        seed=args.seed,
        style=args.style,
    )
    where = environment(args.device)
    for key, value in where.items():
        print(f"{key:>12}: {value}")
    print(f"{'seed':>12}: {args.seed}, {args.examples} prompts a task and length, {args.style}")

    partial = partial_results(model, cells, where, args)
    with pool_of(model, tokenizer, cells, args) as pool:
        bench = Bench(pool, partial, layers, args)
        runs = bench.run(configs, routers, patterns)
    verdicts = goals(runs, args.seed)

    for length in args.lengths:
        print_table(f"{length} tokens: accuracy, or loss of code and prose (95% intervals)",
                    score_rows(runs, length, args.seed))  # fmt: skip
    print_table("Ω of each task, over all lengths", omega_rows(runs))
    print_table("against full attention", summary_rows(runs, args.seed))
    if verdicts:
        print_table("goals", goal_rows(verdicts))
    record = as_record(where, args, bench, runs, verdicts)
    record["seconds"] = time.perf_counter() - started
    write_json(args.output / "quality.json", record)
    if not args.no_plots:
        pareto(runs, args.seed, args.output / "pareto.png")
        route_map(runs, args.output / "routes.png")
    print(f"{args.output}: quality.json and plots, after {record['seconds']:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except FluxError as error:
        raise SystemExit(f"error: {error}") from error
