"""Training layer routers on a frozen model (arXiv 2604.07394)."""

from fluxcompile.training.train import train_router

__all__ = ["train_router"]
