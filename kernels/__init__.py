"""Attention kernels: importing :mod:`fluxcompile.kernels.ops` registers the ``flux::`` ops.

Nothing here imports Triton; the CUDA implementations load it on their first call.
"""
