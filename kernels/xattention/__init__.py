"""XAttention (arXiv 2503.16428): blocks chosen by antidiagonal scores, attended to exactly.

Per query head, on the block grid of :mod:`fluxcompile.kernels.block_sparse`, with stride ``s`` and
block ``b``, a multiple of ``s``. Tokens of a row are taken in groups of ``s``: key group ``c`` from
``start + c * s``, query group ``a`` from ``origin + a * s``. A group may lack tokens, at the row's
end or at this call's last query; those count as zero vectors, like queries at no valid key. With
``offset = origin - start``:

* score ``A[a, c] = scale / s * sum over t < s of q[a * s + s - 1 - t] . k[c * s + t]``, where some
  query of ``a`` comes no earlier than some key of ``c``: ``c * s <= offset + a * s + s - 1``, for
  an offset of 0 ``c <= a``. Under a window, the last key of ``c`` must also lie within that of the
  first query of ``a``;
* ``A`` turns into weights by a softmax over ``c`` in fp32 or wider;
* the mass of KV block ``j`` for query block ``i`` is the sum of their groups' weights;
* ``i`` attends to the first KV block (the sink) and to those that it sits across itself (the
  diagonal), then to others by falling mass, the earlier first among equals, as long as the mass
  taken so far is below ``threshold`` of the mass of all blocks. A block without mass is not taken.

A softcap bounds the exact scores inside the chosen blocks, not ``A``. ``scale`` is ``1 / sqrt(D)``
in the paper.
"""
