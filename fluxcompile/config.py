"""What a router routes to: the frozen, validated settings of Flux Attention.

A :class:`FluxConfig` is saved beside the router it was trained with, and its
:meth:`~FluxConfig.stable_hash` is part of every compile-cache key.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Self

from fluxcompile.errors import ConfigError
from fluxcompile.pooling import Pooling

SPARSE_MODES = ("streaming", "xattention", "triangle", "power")
RETRIEVAL_MODES = ("full", "xattention")
DECODE_MODES = ("sparse", "dense")
SEGMENTS = ("joint", "separate")
HEADS = ("mean", "each")
BLOCKS = (16, 32, 64, 128)  # tokens a block that the kernels take

_CHOICES = {
    "sparse": SPARSE_MODES,
    "retrieval": RETRIEVAL_MODES,
    "decode": DECODE_MODES,
    "segments": SEGMENTS,
    "heads": HEADS,
}
_COUNTS = ("sink", "local", "pool_size", "stride", "block", "last")
# Beyond the paper: at their defaults they are not written, so that such a router's files and hash
# are what they were before there were such fields.
_EXTENSIONS = ("prefix_size", "suffix_size", "segments", "heads", "standardize")


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Settings of the routed attention (Flux Attention, arXiv 2604.07394). Lengths are in tokens.

    Attributes:
        sparse: prefill attention of a layer routed to SA: ``"streaming"`` (sink + local window),
            ``"xattention"`` (antidiagonal block scoring), ``"triangle"`` (streaming, except for
            the last queries) or ``"power"`` (blocks at power-of-two distances, sink and local).
        sink: valid tokens at the start of the sequence that every query attends to.
        local: latest valid tokens, the query's own included, that every query attends to.
        pool_size: valid tokens at each end of the prompt that the router's mean is taken over.
        decode: what a layer routed to SA reads while decoding: ``"sparse"`` (sink + local,
            whatever its prefill mode was) or ``"dense"`` (everything).
        retrieval: prefill attention of a layer routed to FA: ``"full"`` or ``"xattention"``.
        stride: XAttention: side of the antidiagonal that one strided score sums over.
        threshold: XAttention: share of a row's estimated mass its chosen blocks reach, in (0, 1].
        block: XAttention and power: side of a block, 16, 32, 64 or 128; a multiple of ``stride``.
        last: triangle: queries at the end of the prompt that stay dense.
        prefix_size: valid tokens at the beginning of the prompt that the router reads; None for
            ``pool_size``. 0 reads the end alone.
        suffix_size: the same at the end of the prompt. 0 reads the beginning alone.
        segments: ``"joint"``: the router reads one mean over both ends; a prompt shorter than the
            two counts each token once. ``"separate"``: the mean of each end, one after the other;
            in a short prompt the ends overlap.
        heads: ``"mean"``: the router reads the mean over the query heads; ``"each"``: every head.
        standardize: features are taken relative to the mean and deviation over a calibration set,
            which are saved with the router: see :mod:`fluxcompile.training.calibration`.

    The last five are not in the paper, whose router they describe by default.

    Raises:
        ConfigError: a field has the wrong type or an impossible value.
    """

    sparse: str = "streaming"
    sink: int = 128
    local: int = 2048
    pool_size: int = 100
    decode: str = "sparse"
    retrieval: str = "full"
    stride: int = 16
    threshold: float = 0.9
    block: int = 128
    last: int = 128
    prefix_size: int | None = None
    suffix_size: int | None = None
    segments: str = "joint"
    heads: str = "mean"
    standardize: bool = False

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ConfigError.mismatch(
                    f"FluxConfig.{name}", f"one of {list(known)}", f"{value!r}"
                )
        for name in _COUNTS:
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ConfigError.mismatch(f"FluxConfig.{name}", "an int >= 1", f"{value!r}")
        self._check_threshold()
        self._check_router_features()
        if self.block % self.stride:
            raise ConfigError.mismatch(
                "FluxConfig.block", f"a multiple of stride ({self.stride})", f"{self.block!r}"
            )
        if self.block not in BLOCKS:
            raise ConfigError.mismatch("FluxConfig.block", f"one of {BLOCKS}", f"{self.block!r}")

    def _check_threshold(self) -> None:
        value = self.threshold
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 < value <= 1:
            raise ConfigError.mismatch("FluxConfig.threshold", "a number in (0, 1]", f"{value!r}")
        # 1 and 1.0 mean the same and must hash the same.
        object.__setattr__(self, "threshold", float(value))

    def _check_router_features(self) -> None:
        for name in ("prefix_size", "suffix_size"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 0):
                raise ConfigError.mismatch(
                    f"FluxConfig.{name}", "an int >= 0, or None for pool_size", f"{value!r}"
                )
        if not self.pooling.prefix and not self.pooling.suffix:
            raise ConfigError.mismatch(
                "FluxConfig.suffix_size", "an int >= 1 (prefix_size is 0)", "0"
            )
        if not isinstance(self.standardize, bool):
            raise ConfigError.mismatch(
                "FluxConfig.standardize", "True or False", f"{self.standardize!r}"
            )

    @property
    def pooling(self) -> Pooling:
        """Which mean queries the router reads."""
        sizes = (self.prefix_size, self.suffix_size)
        prefix, suffix = (self.pool_size if size is None else size for size in sizes)
        return Pooling(prefix, suffix, self.segments == "separate", self.heads == "each")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON types only, in declaration order.

        Of the fields that are not in the paper, only those that differ from their default.
        """
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _EXTENSIONS or value != default[name]
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build a config from named fields; absent ones take their defaults.

        Raises:
            ConfigError: not a mapping, an unknown field, or a bad value.
        """
        if not isinstance(fields, Mapping):
            raise ConfigError.mismatch("FluxConfig", "a mapping of fields", type(fields).__name__)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in fields if name not in known)
        if unknown:
            raise ConfigError.mismatch("FluxConfig fields", f"any of {known}", f"unknown {unknown}")
        return cls(**fields)

    def to_json(self) -> str:
        """Return the fields as an indented JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: not JSON, or as :meth:`from_dict`.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError.mismatch(
                "FluxConfig", "a JSON object", f"bad JSON ({error})"
            ) from error
        return cls.from_dict(fields)

    def stable_hash(self) -> str:
        """Return a hex digest of the fields, equal in every process and Python version."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
