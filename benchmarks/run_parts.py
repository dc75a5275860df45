"""The parts of a whole run: which script with which settings, and how long one takes on an H200.

Lengths are powers of two, K of 1024. A part can be stopped at any time: it goes on with the row it
was at. What is compared, by a goal or in a table, is in one part, and so of one process and GPU.
"""

import argparse
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

K = 1024


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of its file in the output folder.
        script: a module of this folder with ``main`` and ``parse_arguments``.
        arguments: as on the command line.
        minutes: about how long it takes; an estimate, made beforehand.
        device: what it is to be run on.
        goals: `run_goals` reads its rows. On several GPUs such parts come before the others.
        alone: nothing may run beside it, on any GPU. Compile times need all cores of the host, and
            what other processes compile would be in them.
    """

    name: str
    script: str
    arguments: str
    minutes: float
    device: str = "cuda"
    goals: bool = True
    alone: bool = False

    def argv(self, args: argparse.Namespace) -> list[str]:
        """Arguments of the script, for ``args`` of `run.py`."""
        given = [*self.arguments.split(), "--device", self.device, "--lowering", args.lowering]
        return [*given, "--tiny"] if args.tiny else given

    def parsed(self, args: argparse.Namespace) -> argparse.Namespace:
        return importlib.import_module(self.script).parse_arguments(self.argv(args))


DECODE = "--omega 0 0.5 0.75 --routes static"
MEMORY = "--only eager|flux,.flux"  # flux keeps all tokens in other caches, as eager does
DECODE_ROUTERS = "--omega 0 0.5 0.75 --caches flux --router-pairs 10 --steps 20 --only routers"

PARTS = (
    Part("prefill-8k", "prefill", f"--lengths {8 * K} --omega 0.5 0.75 --router --repeat 10", 4),
    Part(
        "prefill-32k", "prefill",
        f"--lengths {32 * K} --peers eager inductor flux --omega 0.5 0.75", 4,
    ),
    Part(
        "prefill-128k", "prefill",
        f"--lengths {128 * K} --peers eager flux --omega 0.5 0.75 --warm-up 1 --repeat 3", 5,
    ),
    Part(
        "prefill-256k", "prefill",
        f"--lengths {256 * K} --peers eager --omega 0.75 --warm-up 0 --repeat 2", 4,
    ),
    Part(
        "prefill-chunks", "prefill",
        f"--lengths {128 * K} --peers --omega 0.75 --chunk {16 * K} --warm-up 1 --repeat 3", 5,
        goals=False,
    ),
    Part(
        "routers-32k", "prefill",
        f"--lengths {32 * K} --peers --omega 0 0.5 0.75 --router-pairs 10 --only routers", 8,
    ),
    Part(
        "routers-128k", "prefill",
        f"--lengths {128 * K} --peers --omega 0.5 0.75 --router-pairs 4 --only routers", 11,
    ),
    Part("decode-128k", "decode", f"--lengths {128 * K} {DECODE}", 10),
    # Of a static cache only what a goal may take: with all layers full it may be the faster one.
    Part(
        "decode-8k", "decode",
        f"--lengths {8 * K} {DECODE} --only eager|inductor|flux.cache|=0.00", 7,
    ),
    Part("decode-32k", "decode", f"--lengths {32 * K} {DECODE} --caches flux", 6, goals=False),
    Part(
        "decode-b8", "decode",
        f"--lengths {32 * K} --batch 8 --omega 0.5 --routes static mixed", 8,
    ),
    Part(
        "decode-b16", "decode",
        f"--lengths {8 * K} {32 * K} --batch 16 --omega 0.5 --caches flux --routes static mixed "
        "--only flux|graphs", 6, goals=False,
    ),
    Part("decode-routers-32k", "decode", f"--lengths {32 * K} {DECODE_ROUTERS}", 5),
    Part("decode-routers-128k", "decode", f"--lengths {128 * K} {DECODE_ROUTERS}", 5),
    Part(
        "memory-128k", "memory", f"--lengths {128 * K} --omega 0.75 {MEMORY}", 4,
    ),
    Part(
        "memory-by-length", "memory",
        f"--lengths {8 * K} {32 * K} {256 * K} --omega 0.75 --caches dynamic flux-growing "
        f"{MEMORY}", 6,
        goals=False,
    ),
    Part(
        "compile", "compile_time", f"--length {8 * K} --only ^(inductor|flux|flux.regional)$", 6,
        alone=True,
    ),
    Part(
        "compile-routers", "compile_time", f"--length {8 * K} --only router$", 4,
        goals=False, alone=True,
    ),
    Part(
        "qwen3-prefill-32k", "prefill",
        f"--shape qwen3-8b --lengths {32 * K} --peers eager inductor flux --omega 0.5 0.75", 5,
        goals=False,
    ),
    Part(
        "qwen3-decode-32k", "decode", f"--shape qwen3-8b --lengths {32 * K} {DECODE} --caches flux",
        7, goals=False,
    ),
    Part(
        "smollm2-8k", "prefill",
        f"--shape smollm2 --lengths {8 * K} --peers eager flux --omega 0.75 --sink 64 --local 512 "
        "--warm-up 1 --repeat 3", 15, device="cpu",
    ),
)  # fmt: skip

_SMALL = "--sink 64 --local 256"
TINY = (
    Part(
        "tiny-prefill", "prefill",
        f"--lengths 600 --peers eager --omega 0.5 --repeat 1 --warm-up 0 {_SMALL}", 1, "cpu",
    ),
    Part(
        "tiny-decode", "decode",
        f"--lengths 600 --omega 0.5 --caches flux --routes static --steps 2 --only eager|flux "
        f"{_SMALL}", 1, "cpu",
    ),
    Part("tiny-memory", "memory", f"--lengths 600 --omega 0.5 --caches flux {_SMALL}", 1, "cpu"),
    Part("tiny-compile", "compile_time", f"--length 600 --only ^flux$ {_SMALL}", 1, "cpu"),
)  # fmt: skip


def chosen(args: argparse.Namespace) -> list[Part]:
    """The parts for the device of ``args`` whose whole name any of its patterns matches."""
    patterns = args.parts or [".*"]
    return [
        part
        for part in (TINY if args.tiny else PARTS)
        if part.device == args.device and any(re.fullmatch(x, part.name) for x in patterns)
    ]


def in_turn(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts for several GPUs: groups to be run one after the other, each longest first.

    First what goals need. Of either kind those that run alone are a group of their own, last.
    """
    keys = [(goals, alone) for goals in (True, False) for alone in (False, True)]
    groups = ([part for part in parts if (part.goals, part.alone) == key] for key in keys)
    # Begun last, a long part would be alone at the end, and all GPUs but one idle.
    return [sorted(group, key=lambda part: -part.minutes) for group in groups if group]
