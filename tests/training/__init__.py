"""Training mode: the mixture of full and sparse attention, and its gradients."""
