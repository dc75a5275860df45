"""Triangle attention: streaming, except that the prompt's last queries attend densely.

The paper's TA mode (Flux Attention, arXiv 2604.07394), after TriangleMix (arXiv 2507.21526). A
query is among the row's last ``n`` if it sits at a valid key and fewer than ``n`` later queries of
the same call do.
"""
