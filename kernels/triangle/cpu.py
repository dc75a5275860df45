"""Triangle attention on a CPU: streaming for all queries, then each row's last ones densely."""

import torch

from fluxcompile.kernels.streaming import cpu as streaming


def attention(q, k, v, bounds, q_start, route, sink, local, last, window, scale, softcap):
    """Rows without holes; see :func:`fluxcompile.kernels.triangle.op.triangle_attention`."""
    out = streaming.streaming_attention(
        q, k, v, bounds, None, None, None, q_start, route, sink, local, window, scale, softcap
    )
    batch, _, queries, _ = q.shape
    first = k.shape[2] - queries if q_start is None else int(q_start)
    ends = [k.shape[2]] * batch if bounds is None else bounds[:, 1].tolist()
    for i, end in enumerate(ends):
        stop = min(end - first, queries)
        begin = max(stop - last, 0)
        if begin >= stop:
            continue
        one, dense = slice(i, i + 1), slice(begin, stop)
        out[one, dense] = streaming.full_attention(
            q[one, :, dense], k[one], v[one], None if bounds is None else bounds[one], None,
            None, None, torch.tensor([first + begin]), window, scale, softcap,
        )  # fmt: skip
    return out
