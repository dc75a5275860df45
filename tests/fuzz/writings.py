"""The ways to write one attention that the graph fuzzer draws from."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

#: what reads as no attention that we know, on purpose: it must be left alone
QUIRKS = ("weights-returned", "small-fill", "bias", "scaled-after-mask", "softmax-by-hand")
#: read or left alone, by what was copied before: only the result counts. Drawn by its own test
CHANGES = ("query-changed",)


@dataclass(frozen=True)
class Writing:
    """One choice for each part; ``tests/fuzz/attend.py`` says what each means."""

    batch: int
    length: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: str
    padding: str
    window: int
    softcap: float
    # heads
    heads_first: str
    contiguous: bool
    repeat: str
    # products
    product: str
    flatten: str
    key_flip: str
    weigh: str
    # scores
    scaling: str
    scale: float
    masks: str
    causal: str
    blocked: str
    in_place: bool
    # softmax
    softmax: str
    upcast: str
    dropout: str
    leave: str
    quirk: str
    dynamic: bool

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def writings() -> SearchStrategy[Writing]:
    """Every part drawn on its own, then made to fit."""
    return st.builds(
        Writing,
        batch=st.integers(1, 3),
        length=st.integers(2, 14),
        kv_heads=st.integers(1, 3),
        group=st.sampled_from([1, 1, 2, 3]),
        head_dim=st.sampled_from([4, 8]),
        dtype=st.sampled_from(["float32"] * 4 + ["bfloat16", "float16"]),
        padding=st.sampled_from(["none", "left", "right", "holes"]),
        window=st.sampled_from([0, 0, 7, 9]),
        softcap=st.sampled_from([0.0, 0.0, 0.0, 3.0]),
        heads_first=st.sampled_from(["transpose", "permute", "swapaxes", "movedim", "never"]),
        contiguous=st.booleans(),
        repeat=st.sampled_from(["expand", "repeat_interleave", "groups"]),
        product=st.sampled_from(["matmul", "@", "bmm", "einsum", "sdpa"]),
        flatten=st.sampled_from(["reshape", "flatten", "view"]),
        key_flip=st.sampled_from(["transpose", "named", "permute", "mT", "swapaxes", "contiguous"]),
        weigh=st.sampled_from(["matmul", "@", "bmm", "einsum", "einsum-tokens-first"]),
        scaling=st.sampled_from(["q", "k", "both", "mul", "left", "div", "tensor"]),
        scale=st.sampled_from([0.5, 0.35, 1.0]),
        masks=st.sampled_from(
            [
                "fill",
                "where",
                "add",
                "add-filled",
                "add-inverted",
                "fill-each",
                "add-each",
                "where-each",
            ]
        ),
        causal=st.sampled_from(["compare", "not-greater", "tril", "triu", "triu-compared"]),
        blocked=st.sampled_from(["-inf", "lowest", "-1e9"]),
        in_place=st.booleans(),
        softmax=st.sampled_from(["functional", "torch", "method"]),
        upcast=st.sampled_from(["no", "dtype", "scores"]),
        dropout=st.sampled_from(["none", "none", "zero", "evaluating"]),
        leave=st.sampled_from(["reshape", "view", "flatten"]),
        quirk=st.sampled_from([""] * 19 * len(QUIRKS) + list(QUIRKS)),
        dynamic=st.sampled_from([False, False, False, True]),
    )
