"""A program: groups of warps that take turns, and what runs beside them."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from .values import Block

_PATIENCE = 60  # seconds that one group may compute between two waits


class Deadlock(Exception):
    """No group of a program can go on."""


@dataclass
class Product:
    """A product of the tensor cores, which has its result once it has been waited for."""

    compute: Callable[[], Block]
    result: Block | None = None


@dataclass
class Group:
    """A group of warps."""

    may_go_on: Callable[[], bool] | None = None
    wakes: threading.Event = field(default_factory=threading.Event)
    products: list[Product] = field(default_factory=list)
    stores: list["Copy"] = field(default_factory=list)
    ended: bool = False


@dataclass
class Copy:
    """A copy on its way."""

    run: Callable[[], None]
    done: bool = False


class Program:
    """The groups of one program, of which one runs at a time, and its copies on their way."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], draw: random.Random) -> None:
        self.index, self.grid, self.draw = index, grid, draw
        self.copies: list[Copy] = []
        self.groups: list[Group] = []
        self.failure: BaseException | None = None
        self.finished = threading.Event()
        self.here = threading.local()

    @property
    def group(self) -> Group:
        return self.here.group

    def run_groups(self, bodies: list[tuple[Callable, tuple]]) -> None:
        self.groups = [Group() for _ in bodies]
        threads = [
            threading.Thread(target=self._run, args=(group, *body), daemon=True)
            for group, body in zip(self.groups, bodies, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._pass_on()
        self.finished.wait()
        if self.failure is None:
            for copy in self.copies:
                copy.run()
            return
        raise self.failure

    def _run(self, group: Group, body: Callable, args: tuple) -> None:
        self.here.group = group
        group.wakes.wait()
        try:
            if self.failure is None:
                body(*args)
                assert not group.products, "a product that nobody has waited for"
        except BaseException as error:
            self.failure = self.failure or error
        group.ended = True
        self._pass_on()

    def wait(self, may_go_on: Callable[[], bool]) -> None:
        """Let others run, until this group may go on and is drawn."""
        group = self.group
        group.may_go_on = may_go_on
        group.wakes.clear()
        self._pass_on()
        assert group.wakes.wait(_PATIENCE)
        if self.failure is not None:
            raise self.failure

    def _pass_on(self) -> None:
        """Run copies, then wake one group, all drawn; with no group left, end."""
        while True:
            waiting = [group for group in self.groups if not group.ended]
            if not waiting:
                self.finished.set()
                return
            if self.failure is not None:
                waiting[0].wakes.set()
                return
            ready = [g for g in waiting if g.may_go_on is None or g.may_go_on()]
            if not ready and not self.copies:
                self.failure = Deadlock(f"program {self.index}: {len(waiting)} groups wait")
                continue
            chosen = self.draw.choice([*ready, *self.copies])
            if isinstance(chosen, Group):
                chosen.may_go_on = None
                chosen.wakes.set()
                return
            self.copies.remove(chosen)
            chosen.run()
            chosen.done = True


_running: list[Program] = []


def start(program: Program) -> None:
    """Make this the program that runs."""
    _running[:] = [program]


def now() -> Program:
    """The program that runs."""
    return _running[0]


def pause() -> None:
    """Let other groups run, and copies."""
    now().wait(lambda: True)
