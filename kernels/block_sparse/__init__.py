"""Prefill attention over any choice of blocks.

Blocks of ``block`` tokens are counted from where the row begins, so that a left-padded row has the
blocks of its unpadded run. With ``start`` the row's first valid key, query ``i`` at key index
``q_start + i`` and ``origin = max(start, q_start)``:

* KV block ``j`` holds the keys at ``start + j * block`` up to the next block;
* query block ``i`` holds the queries at key indices ``origin + i * block`` up to the next block.

A query attends exactly and causally to the valid keys of the KV blocks chosen for its block. Both
grids share their boundaries where ``origin - start`` is a multiple of ``block``; elsewhere (a chunk
of a prompt) a query block sits across two KV blocks. Queries before ``start`` see no key.

A block grid needs rows without holes. If any row of the batch has holes, or the mask could not be
read, every row attends densely under exactly that mask.
"""
