"""Prefill: full causal attention and streaming (sink and local keys) attention.

The sparse pattern is StreamingLLM's (arXiv 2309.17453), chosen per row as in Flux Attention
(arXiv 2604.07394).
"""
