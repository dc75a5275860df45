"""Who does the jobs: this process, or several, each with a GPU of its own."""

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Self

from fluxcompile.errors import FluxError

Work = Callable[[Any], Any]  # a job to what it found


class WorkerError(FluxError):
    """A worker could not do its job; the others are ended."""


class InPlace:
    """Jobs in this process, one after the other."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        pass

    def __call__(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yields each job's place and what was found."""
        for i_job, job in enumerate(jobs):
            yield i_job, self._work(job)


class Spread:
    """Jobs over processes, begun in order. ``with Spread(...) as pool``: none outlives the block.

    Args:
        prepare: called in each process, once; gives what does its jobs. Small: it is sent there.
        environments: variables of each process, set before anything is imported there, and so
            before CUDA looks which GPUs there are.
    """

    def __init__(
        self, prepare: Callable[[], Work], environments: Sequence[Mapping[str, str]]
    ) -> None:
        self._prepare, self._environments = prepare, list(environments)
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._idle: list[Connection] = []
        self._places: dict[Connection, int] = {}  # of all workers, busy or not

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def __call__(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yields each job's place and what was found, as they are done.

        Raises:
            WorkerError: a job failed, or its process ended.
        """
        busy: dict[Connection, int] = {}
        begun = 0
        while begun < len(jobs) or busy:
            while begun < len(jobs) and (worker := self._free()) is not None:
                with contextlib.suppress(OSError):  # one that has ended: its answer says so
                    worker.send(jobs[begun])
                busy[worker] = begun
                begun += 1
            for worker in wait(list(busy)):
                i_job = busy.pop(worker)
                found = self._answer(worker, jobs[i_job])
                self._idle.append(worker)
                yield i_job, found

    def _free(self) -> Connection | None:
        """A worker without a job, a new one if there may be more."""
        if self._idle:
            return self._idle.pop(0)
        if len(self._processes) == len(self._environments):
            return None
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._prepare, theirs))
        with _variables(self._environments[len(self._processes)]):
            process.start()
        theirs.close()
        self._places[ours] = len(self._processes)
        self._processes.append(process)
        return ours

    def _answer(self, worker: Connection, job: Any) -> Any:
        what = f"{getattr(job, 'name', job)}, worker {self._places[worker]}"
        try:
            answer = worker.recv()
        except (EOFError, OSError):
            process = self._processes[self._places[worker]]
            process.join(5)
            raise WorkerError.mismatch(what, "a result", f"exit code {process.exitcode}") from None
        if isinstance(answer, _Failure):
            if answer.trace:
                print(answer.trace, file=sys.stderr)
            raise WorkerError(f"{what}: {answer.message}")
        return answer.found


class _Found(NamedTuple):
    found: Any


class _Failure(NamedTuple):
    message: str
    trace: str  # empty for what fluxcompile raises on purpose

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        if isinstance(error, FluxError):
            return cls(str(error), "")
        return cls(f"{type(error).__name__}: {error}", traceback.format_exc())


def _serve(prepare: Callable[[], Work], connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work = prepare()
        while True:
            connection.send(_Found(work(connection.recv())))
    except EOFError:
        pass
    except Exception as error:
        connection.send(_Failure.of(error))


def _end_with_parent() -> None:
    """Also where the parent was ended by force, and could not say so."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
