"""Training layer routers on a frozen model."""
