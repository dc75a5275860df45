"""Train many router recipes side by side: the ablation's first half.

    python benchmarks/recipes.py --output runs --per-gpu 4 --seeds 0 1 2
    python benchmarks/quality.py --output report --gpus 8 \\
      --router paper=runs/paper-{0,1,2} --router distilled=runs/distilled-{0,1,2} ...

A file of recipes has what all share and what each adds (see `recipes_file.read_recipes`), with a
sentence that says why it is there. `recipes/smollm2.json` goes from the paper's recipe to the one
that is shipped, and then changes one setting of that at a time: what a setting is worth is the
difference between two recipes, and how sure one may be of it their spread over the seeds. Data,
noise and start depend on the seed alone, so a seed is the same draw for every recipe.

Each recipe and seed is a ``fluxcompile train`` of its own, on one GPU, several at a time. Their
output goes to ``OUTPUT/NAME-SEED.log``, their routers to ``OUTPUT/NAME-SEED``, and what became of
them to ``OUTPUT/recipes.json``, which is written anew whenever a run ends. What is printed last is
the command that evaluates them.

``--seconds`` ends it in good time where commands may only take so long; ``--resume`` then goes on
from the checkpoints, and leaves alone what is done. Exit code: 1 if a run failed, 3 if none did
but some were stopped.
"""

import argparse
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import environment, print_table, visible_gpus, write_json
from fluxcompile.errors import FluxError, OptionError
from fluxcompile.router_io import CONFIG_FILE, is_saved_router
from recipes_file import read_recipes
from recipes_run import Ended, Run, Runner

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "fluxcompile", "train"]
SHOWN = {"Ω": "routed_sparsity", "soft Ω": "sparsity", "loss": "lm_loss"}
FAILED, UNFINISHED = 1, 3


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=Path, default=HERE / "recipes" / "smollm2.json")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="recipes; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-gpu", type=int, default=1, help="processes at a time on one GPU")
    parser.add_argument("--steps", type=int, help="in place of the recipes' own")
    parser.add_argument("--seconds", type=float, help="stop what has not finished then")
    parser.add_argument("--resume", action="store_true", help="go on with what was stopped")
    parser.add_argument("--cpu", action="store_true", help="no GPU, one process at a time")
    parser.add_argument("--command", type=shlex.split, default=COMMAND, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.per_gpu < 1:
        parser.error("--per-gpu: expected at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stops the runs too
    recipes = read_recipes(args.recipes, args.only)
    runs = [Run(recipe, seed) for seed in args.seeds for recipe in recipes]
    more = [] if args.steps is None else ["--steps", str(args.steps)]
    gpus: list[str | None] = [None] if args.cpu else visible_gpus() * args.per_gpu
    if not gpus:
        raise OptionError.mismatch("GPUs", "at least one (or --cpu)", "none")
    if args.cpu:
        more.append("--cpu")
    before = done_before(args.output) if args.resume else {}
    where = environment("cpu" if args.cpu else "cuda")
    for key, value in where.items():
        print(f"{key:>12}: {value}")
    for recipe in recipes:
        print(f"{recipe.name:>16}: {recipe.why}")
    left = [run for run in runs if run.name not in before]
    print(f"{len(left)} runs, {len(gpus)} at a time, {len(runs) - len(left)} done before")

    ended: dict[str, dict] = {run.name: before[run.name] for run in runs if run.name in before}
    started = time.perf_counter()
    with Runner(
        left, command=args.command, output=args.output, gpus=gpus, limit=args.seconds, more=more,
        resume=args.resume,
    ) as runner:  # fmt: skip
        for one in runner:
            tidy(one, args.output)
            ended[one.run.name] = as_record(one)
            print(line(ended[one.run.name]), flush=True)
            ordered = [ended[run.name] for run in runs if run.name in ended]
            record = {"benchmark": "recipes", "environment": where, "file": str(args.recipes),
                      "at_once": len(gpus), "seconds": time.perf_counter() - started,
                      "runs": ordered}  # fmt: skip
            write_json(args.output / "recipes.json", record)
    records = [ended[run.name] for run in runs]
    if records:
        print_table("at the end of training (means over the last steps logged)", rows(records))
    routers = [
        f"--router {recipe.name}=" + " ".join(str(args.output / name) for name in names)
        for recipe in recipes
        if (names := [r["name"] for r in records
                      if r["recipe"] == recipe.name and r["outcome"] == "done"])
    ]  # fmt: skip
    print("python benchmarks/quality.py", *routers)
    outcomes = {record["outcome"] for record in records}
    unfinished = [r["name"] for r in records if r["outcome"] in ("stopped", "not begun")]
    if unfinished:
        print(f"after {args.seconds:.0f} s not finished (--resume goes on): {unfinished}")
    return FAILED if "failed" in outcomes else UNFINISHED if unfinished else 0


def as_record(ended: Ended) -> dict:
    """For the JSON file."""
    run = ended.run
    return {
        "name": run.name, "recipe": run.recipe.name, "seed": run.seed, "why": run.recipe.why,
        "outcome": ended.outcome, "exit_code": ended.exit_code, "seconds": ended.seconds,
        "arguments": ended.arguments, "final": ended.final,
    }  # fmt: skip


def done_before(output: Path) -> dict[str, dict]:
    """Records of the runs that an earlier call finished, by name."""
    file = output / "recipes.json"
    records = json.loads(file.read_text())["runs"] if file.exists() else []
    return {
        record["name"]: record
        for record in records
        if record["outcome"] == "done" and has_router(output / record["name"])
    }


def tidy(ended: Ended, output: Path) -> None:
    """Of a run that is done keep the router and the logs: its checkpoints are many times larger."""
    folder = output / ended.run.name
    if ended.outcome == "done" and has_router(folder):
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def has_router(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and is_saved_router(folder)


def line(record: dict) -> str:
    """One run, in a line; of what went wrong, its log says more."""
    said = ", ".join(f"{name} {text}" for name, text in _columns(record).items())
    code = "" if record["exit_code"] is None else f" ({record['exit_code']})"
    return f"{record['name']}: {record['outcome']}{code} after {record['seconds']:.0f} s; {said}"


def rows(records: Sequence[dict]) -> list[dict[str, str]]:
    """One run a row."""
    names = list(dict.fromkeys(name for record in records for name in _columns(record)))
    return [
        {
            "run": record["name"],
            "": record["outcome"],
            "seconds": f"{record['seconds']:.0f}",
            **{name: _columns(record).get(name, "—") for name in names},
        }
        for record in records
    ]


def _columns(record: dict) -> dict[str, str]:
    final = record["final"]
    tasks = [name.partition("/")[2] for name in final if name.startswith("lm_loss/")]
    steps = {"step": str(final["step"])} if "step" in final else {}
    values = {
        f"{task} {shown}": f"{final[f'{name}/{task}']:.3f}"
        for task in tasks
        for shown, name in SHOWN.items()
        if f"{name}/{task}" in final
    }
    return steps | values


if __name__ == "__main__":
    try:
        code = main()
    except FluxError as error:
        raise SystemExit(f"error: {error}") from error
    raise SystemExit(code)
