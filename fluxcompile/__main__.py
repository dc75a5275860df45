"""``python -m fluxcompile`` is the ``fluxcompile`` command."""

from fluxcompile.cli import app

app()
