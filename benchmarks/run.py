"""All benchmarks of a model's speed, part by part, and one summary of them.

    python benchmarks/run.py --output benchmarks/results/h200            # all, on one GPU
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
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import environment, print_table, write_json
from record import settings_of
from run_goals import goals
from run_parts import PARTS, TINY, Part, chosen
from run_plots import decode_plot, has_matplotlib, prefill_plot
from run_results import Results
from run_summary import goal_rows, markdown, part_rows

FOLDER = Path(__file__).parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder")
    parser.add_argument("--parts", nargs="*", metavar="REGEX", help="only parts named so")
    parser.add_argument("--minutes", type=float, help="stop then, in the middle of a part if it is")
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
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    parts = chosen(args)
    if args.list:
        print_table("parts", part_rows(parts, args))
        return
    left = [] if args.summary else run_parts(parts, args)
    results = Results.load(args.output, TINY if args.tiny else PARTS)
    verdicts = goals(results)
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
    """Run what is not there yet; returns the names of the parts that time was too short for."""
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    if args.fresh:
        for part in parts:
            file_of(part, args).unlink(missing_ok=True)
    commit = environment(args.device)["commit"]
    for number, part in enumerate(parts):
        if is_there(part, args, commit):
            print(f"== {part.name}: is there", flush=True)
            continue
        print(f"== {part.name}: {part.script}.py {' '.join(part.argv(args))}", flush=True)
        if not run_part(part, args, deadline):
            return [part.name for part in parts[number:] if not is_there(part, args, commit)]
    return []


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


def run_part(part: Part, args: argparse.Namespace, deadline: float | None) -> bool:
    """Run to the end, or to ``deadline``; returns whether it was the end."""
    command = [sys.executable, str(FOLDER / f"{part.script}.py"), *part.argv(args)]
    command += ["--json", str(file_of(part, args)), "--resume"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    remaining = None if deadline is None else deadline - time.monotonic()
    if remaining is not None and remaining <= 0:
        return False
    # A session of its own, so that its compile workers end with it.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = process.wait(remaining)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        print(f"== {part.name}: ended with status {status}", flush=True)
    return True


if __name__ == "__main__":
    main()
