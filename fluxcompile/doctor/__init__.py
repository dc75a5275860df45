"""``fluxcompile doctor``: is this machine ready, and what to do where it is not."""

from fluxcompile.doctor.checks import examine
from fluxcompile.doctor.finding import Finding, Status

__all__ = ["Finding", "Status", "examine"]
