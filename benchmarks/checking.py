"""No speed of a wrong answer: how far logits may be from those they are compared with."""

import torch

# |got - expected| over |expected|, both norms of one row's logits. In bf16 eager itself is 2e-2
# from fp32 on a small model of this depth, and attention to the wrong keys is 4e-1 off.
ERROR_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


class WrongLogits(Exception):
    """A contender disagrees with what it is checked against: its speed is not reported."""


def checked_error(
    name: str, got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
) -> float:
    """The largest error of any row ``[..., V]``.

    Raises:
        WrongLogits: it is beyond the bound of ``dtype``, the model's.
    """
    error = ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    bound = ERROR_BOUND[dtype]
    if not error <= bound:  # also where it is nan
        raise WrongLogits(f"{name}: logits differ by {error:.2e}, bound {bound:.0e}")
    return error
