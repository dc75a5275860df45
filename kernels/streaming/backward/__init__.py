"""Gradients of full and streaming attention with respect to queries, keys and values.

With ``p`` the weights that the forward's log-sum-exp gives anew, block by block::

    dv    = p^T grad_out
    ds    = p * (grad_out v^T - rowsum(grad_out * out))
    dq    = scale * ds k
    dk    = scale * ds^T q

and ``ds`` times the slope of the cap where scores are capped.
"""
