"""PowerAttention (arXiv 2503.03588): key blocks at power-of-two distances, as one pattern file."""
