"""All benchmarks of a model's speed, part by part, and one summary of them.

    python benchmarks/run.py --output benchmarks/results/h200            # all, on one GPU
    python benchmarks/run.py --output benchmarks/results/h200 --gpus 8   # a part on each of eight
    python benchmarks/run.py --output ... --minutes 9                    # as far as it gets
    python benchmarks/run.py --output ... --parts decode-128k "prefill-.*"
    python benchmarks/run.py --output ... --device cpu                   # the parts for a CPU
    python benchmarks/run.py --output ... --summary                      # of what is there
    python benchmarks/run.py --list

Each part is a process of its own with a JSON file in ``--output``. One whose file is complete, of
the same settings and commit, is not run again without ``--fresh``; one that was stopped goes on
where it was. The summary, ``summary.md`` and ``summary.json``, holds every goal with what was
found; ``prefill.png`` and ``decode.png`` show times by length, with the floor.
(Plots need ``pip install "fluxcompile[bench]"``.)

With ``--gpus`` parts run side by side, the longest first, and those that goals need before the
others. Each sees one GPU, is held to its share of the CPU cores, and prints to
``OUTPUT/logs/PART.log``. Compile times are measured with nothing else running. Every row's record
says how many parts ran at once, and so does the summary.
"""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from common import git_commit, print_table, some_gpus, write_json
from fluxcompile.errors import FluxError
from record import settings_of
from run_goals import goals
from run_parts import PARTS, TINY, Part, chosen, in_turn
from run_plots import decode_plot, has_matplotlib, prefill_plot
from run_results import Results
from run_summary import bad_rows, goal_rows, markdown, part_rows
from slots import Ended, Job, Processes, Slot, leave_on_sigterm, script_job, shares

FOLDER = Path(__file__).parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder")
    parser.add_argument("--parts", nargs="*", metavar="REGEX", help="only parts named so")
    parser.add_argument("--minutes", type=float, help="stop then, in the middle of a part if it is")
    parser.add_argument("--gpus", type=int, default=1, help="parts at a time, one on each")
    parser.add_argument("--fresh", action="store_true", help="run again what is there")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--list", action="store_true", help="say what the parts are")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--tiny", action="store_true", help="a toy run, to try the scripts")
    args = parser.parse_args(arguments)
    if args.output is None and not args.list:
        parser.error("--output is needed")
    if args.gpus < 1 or (args.gpus > 1 and args.device == "cpu"):
        parser.error("--gpus: expected at least 1, and on a CPU no more")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    parts = chosen(args)
    if args.list:
        print_table(f"parts, {sum(x.minutes for x in parts):g} minutes", part_rows(parts, args))
        return
    left = [] if args.summary else run_parts(parts, args)
    results = Results.load(args.output, TINY if args.tiny else PARTS)
    verdicts = goals(results)
    if bad := bad_rows(results):
        print_table("not measured", bad)
    print_table("goals", goal_rows(verdicts))
    summary = {"goals": [vars(verdict) for verdict in verdicts], "parts": results.about()}
    write_json(args.output / "summary.json", summary)
    (args.output / "summary.md").write_text(markdown(verdicts, results))
    if not args.no_plots and has_matplotlib():
        prefill_plot(results, args.output / "prefill.png")
        decode_plot(results, args.output / "decode.png")
    if left:
        print(f"time is up: {len(left)} parts are left ({', '.join(left)}); the same command "
              "goes on")  # fmt: skip


def run_parts(parts: list[Part], args: argparse.Namespace) -> list[str]:
    """Run what is not there yet; returns the names of the parts that time was too short for.

    Raises:
        OptionError: there are not as many GPUs as ``args`` say.
    """
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    gpus = some_gpus(args.gpus) if args.gpus > 1 else []
    if args.fresh:
        for part in parts:
            file_of(part, args).unlink(missing_ok=True)
    commit = git_commit()
    waiting = []
    for part in parts:
        if is_there(part, args, commit):
            print(f"== {part.name}: is there", flush=True)
        else:
            waiting.append(part)
    left, failed = set(), []
    for group in in_turn(waiting) if gpus else [waiting]:
        slots = slots_of(group, gpus)
        jobs = [job_of(part, args, len(slots)) for part in group]
        with Processes(jobs, slots, deadline=deadline, begins=say_begun) as processes:
            for ended in processes:
                name = ended.job.name
                if ended.outcome != "not begun":
                    print(f"== {name}: {how_it_ended(ended)}", flush=True)
                if ended.status is None:
                    left.add(name)
                elif ended.status:
                    failed.append(name)
    if failed:
        print(f"{len(failed)} parts failed: {', '.join(failed)}")
    return [part.name for part in parts if part.name in left]


def slots_of(group: Sequence[Part], gpus: Sequence[str]) -> list[Slot]:
    """For a group of `in_turn`: GPUs with a share of the cores each; without GPUs, all there is."""
    if not gpus:
        return [Slot()]
    if group[0].alone:
        return [Slot(gpus[0])]
    return shares(gpus[: len(group)])


def say_begun(job: Job, slot: Slot) -> None:
    where = "" if job.log is None else f" on GPU {slot.gpu}, log {job.log}"
    print(f"== {job.name}: begins{where}: {shlex.join(job.command[1:])}", flush=True)


def how_it_ended(ended: Ended) -> str:
    said = f"{ended.outcome} after {ended.seconds:.0f} s"
    return f"{said}, status {ended.status}" if ended.status else said


def file_of(part: Part, args: argparse.Namespace) -> Path:
    return args.output / f"{part.name}.json"


def is_there(part: Part, args: argparse.Namespace, commit: str) -> bool:
    """Whether the part's file is complete, of these settings and this commit."""
    file = file_of(part, args)
    if not file.exists():
        return False
    record = json.loads(file.read_text())
    same = record["settings"] == settings_of(part.parsed(args))
    return record["complete"] and same and record["environment"]["commit"] == commit


def job_of(part: Part, args: argparse.Namespace, at_once: int) -> Job:
    """The part's process: with its log in a file, unless all that runs is on one GPU."""
    file = file_of(part, args)
    arguments = [*part.argv(args), "--json", str(file), "--resume", "--at-once", str(at_once)]
    log = args.output / "logs" / f"{part.name}.log" if args.gpus > 1 else None
    script = FOLDER / f"{part.script}.py"
    return script_job(part.name, script, arguments, log, append=file.exists())


if __name__ == "__main__":
    leave_on_sigterm()
    try:
        main()
    except FluxError as error:
        raise SystemExit(f"error: {error}") from error
