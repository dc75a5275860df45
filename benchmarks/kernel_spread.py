"""The kernel table spread over GPUs: a process for each shape, and one record of all.

A shape's kernels and their peers, and the ceilings of its floors, are measured by one process on
one GPU, so that nothing is compared with what another GPU did. The processes' own records and logs
lie in a folder beside the file, ``NAME.parts``, until all of it is measured.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common import some_gpus, undated, write_json
from kernel_record import Record, merge
from slots import Ended, Job, Processes, script_job, shares

SCRIPT = Path(__file__).with_name("kernels.py")
Shape = tuple[int, int, int]  # head dim, length, batch


def spread(args: argparse.Namespace, record: Record, shapes: Sequence[Shape]) -> None:
    """Measure ``shapes`` into ``record`` and ``args.json``, on ``args.gpus`` GPUs.

    A process that ends early leaves what it has measured, and a line among the failures. With
    ``args.resume`` records of earlier processes are kept if they are complete, without failures,
    and of the same environment, kernels and window.

    Raises:
        OptionError: there are not so many GPUs.
    """
    gpus = some_gpus(args.gpus)
    folder = args.json.with_suffix(".parts")
    files = {name_of(shape): folder / f"{name_of(shape)}.json" for shape in shapes}
    found = {name: kept for name, file in files.items() if (kept := _kept(file, args, record))}
    waiting = [shape for shape in shapes if name_of(shape) not in found]
    for shape in waiting:
        files[name_of(shape)].unlink(missing_ok=True)
    # The largest first: begun last, one would hold up the end alone.
    waiting.sort(key=lambda shape: shape[1] * shape[2], reverse=True)
    record.at_once = min(len(gpus), len(waiting)) or 1
    jobs = [_job(shape, files[name_of(shape)], args, record.at_once) for shape in waiting]
    with Processes(jobs, shares(gpus[: record.at_once]), begins=lambda job, slot: print(
        f"{job.name}: begins on GPU {slot.gpu}, log {job.log}", flush=True
    )) as processes:  # fmt: skip
        for ended in processes:
            name = ended.job.name
            found[name] = _found(ended, files[name], record)
            print(f"{name}: {len(found[name].rows)} rows after {ended.seconds:.0f} s, "
                  f"status {ended.status}", flush=True)  # fmt: skip
            merge(record, [(name, found[name]) for name in files if name in found])
            write_json(args.json, asdict(record))
    merge(record, [(name, found[name]) for name in files])
    record.complete = True
    write_json(args.json, asdict(record))
    if not record.failures:
        shutil.rmtree(folder)


def name_of(shape: Shape) -> str:
    return "d{}-s{}-b{}".format(*shape)


def _job(shape: Shape, file: Path, args: argparse.Namespace, at_once: int) -> Job:
    head_dim, length, batch = map(str, shape)
    arguments = [
        "--head-dims", head_dim, "--lengths", length, "--batches",
        batch, "--sink", str(args.sink), "--local", str(args.local), "--device", args.device,
        *["--tiny"] * args.tiny, "--at-once", str(at_once), "--json", str(file),
        "--kernels", *args.kernels,
    ]  # fmt: skip
    return script_job(name_of(shape), SCRIPT, arguments, file.with_suffix(".log"))


def _found(ended: Ended, file: Path, like: Record) -> Record:
    """What a process wrote, with a failure more if it did not come to its end."""
    if file.exists():
        record = Record(**json.loads(file.read_text()))
    else:
        record = Record(like.environment, like.dtype, like.heads, like.kv_heads, like.kernels)
    if not record.complete:
        record.failures.append(f"{ended.job.name}: its process ended with status {ended.status} "
                               f"after {len(record.rows)} rows, see {ended.job.log}")  # fmt: skip
    return record


def _kept(file: Path, args: argparse.Namespace, now: Record) -> Record | None:
    """An earlier process's record, if it need not be measured again."""
    if not (args.resume and file.exists()):
        return None
    record = Record(**json.loads(file.read_text()))

    def same(record: Record) -> list:
        where = undated(record.environment)
        return [where, record.dtype, record.heads, record.kv_heads, record.kernels]

    window = all((row["sink"], row["local"]) == (args.sink, args.local) for row in record.rows)
    good = record.complete and not record.failures
    return record if good and window and same(record) == same(now) else None
