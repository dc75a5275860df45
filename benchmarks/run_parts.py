"""The parts of a whole run: which script with which settings, and how long one takes on an H200.

Lengths are powers of two, K of 1024. A part can be stopped at any time: it goes on with the row it
was at.
"""

import argparse
import importlib
import re
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
    """

    name: str
    script: str
    arguments: str
    minutes: float
    device: str = "cuda"

    def argv(self, args: argparse.Namespace) -> list[str]:
        """Arguments of the script, for ``args`` of `run.py`."""
        given = [*self.arguments.split(), "--device", self.device, "--lowering", args.lowering]
        return [*given, "--tiny"] if args.tiny else given

    def parsed(self, args: argparse.Namespace) -> argparse.Namespace:
        return importlib.import_module(self.script).parse_arguments(self.argv(args))


ROUTED = "--omega 0.5 0.75 --router"
DECODE = "--omega 0 0.5 0.75 --routes static"

PARTS = (
    Part("prefill-8k", "prefill", f"--lengths {8 * K} {ROUTED} --repeat 10", 5),
    Part("prefill-32k", "prefill", f"--lengths {32 * K} {ROUTED}", 6),
    Part(
        "prefill-128k", "prefill",
        f"--lengths {128 * K} --peers eager flux {ROUTED} --warm-up 1 --repeat 3", 8,
    ),
    Part(
        "prefill-256k", "prefill",
        f"--lengths {256 * K} --peers eager --omega 0.5 0.75 --warm-up 0 --repeat 2", 6,
    ),
    Part(
        "prefill-chunks", "prefill",
        f"--lengths {128 * K} --peers --omega 0.75 --chunk {16 * K} --warm-up 1 --repeat 3", 5,
    ),
    Part(
        "routers-32k", "prefill",
        f"--lengths {32 * K} --peers --omega 0 0.5 0.75 --router-pairs 10 --only routers", 9,
    ),
    Part(
        "routers-128k", "prefill",
        f"--lengths {128 * K} --peers --omega 0.5 0.75 --router-pairs 4 --only routers", 9,
    ),
    Part("decode-128k", "decode", f"--lengths {128 * K} {DECODE}", 11),
    Part("decode-8k", "decode", f"--lengths {8 * K} {DECODE}", 9),
    Part("decode-32k", "decode", f"--lengths {32 * K} {DECODE}", 9),
    Part(
        "decode-b8", "decode",
        f"--lengths {32 * K} --batch 8 --omega 0 0.5 --routes static mixed", 11,
    ),
    Part(
        "decode-b16", "decode",
        f"--lengths {8 * K} {32 * K} --batch 16 --omega 0.5 --caches flux --routes static mixed", 9,
    ),
    Part(
        "decode-routers", "decode",
        f"--lengths {32 * K} {128 * K} --routes static router --caches flux --only ^KV.*flux", 16,
    ),
    Part(
        "memory-128k", "memory", f"--lengths {128 * K} --omega 0.75", 6,
    ),
    Part(
        "memory-by-length", "memory",
        f"--lengths {8 * K} {32 * K} {256 * K} --omega 0.75 --caches dynamic flux-growing", 8,
    ),
    Part("compile", "compile_time", f"--length {8 * K}", 12),
    Part(
        "qwen3-prefill-32k", "prefill",
        f"--shape qwen3-8b --lengths {32 * K} --peers eager inductor flux --omega 0.5 0.75", 5,
    ),
    Part(
        "qwen3-decode-32k", "decode", f"--shape qwen3-8b --lengths {32 * K} {DECODE} --caches flux",
        7,
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
