"""Every error and warning fluxcompile raises on purpose.

Each class also derives from the closest built-in, so callers may catch either. Messages say what
was expected and what was found; :meth:`FluxError.mismatch` writes them in one form.
"""

from typing import Self


class FluxError(Exception):
    """Base of all errors raised by fluxcompile."""

    @classmethod
    def mismatch(cls, what: str, expected: object, got: object) -> Self:
        """Build ``"<what>: expected <expected>, got <got>"``.

        Args:
            what: the argument, field or file that is wrong.
            expected: what would have been accepted, in words or as a value.
            got: what was found instead.
        """
        return cls(f"{what}: expected {expected}, got {got}")


class ConfigError(FluxError, ValueError):
    """A field of a :class:`fluxcompile.FluxConfig` is unknown or out of range."""


class RouterError(FluxError, ValueError):
    """A router file is damaged, or belongs to another model or configuration."""


class OptionError(FluxError, ValueError):
    """An entry of ``torch.compile(..., options=...)`` is unknown or has a bad value."""


class TrainingError(FluxError, RuntimeError):
    """Training cannot start, or cannot go on, with this model, data or state."""


class DataError(FluxError, ValueError):
    """Training data, or the description of its tasks, cannot be trained on as it is."""


class RewriteError(FluxError):
    """An attention could not be rewritten and ``options={"strict": True}`` asked for it."""


class KernelError(FluxError, RuntimeError):
    """A kernel was called with operands, or on a machine, that it cannot serve."""


class TorchVersionError(FluxError, ImportError):
    """This PyTorch lacks an internal that fluxcompile needs; the message names the versions."""


class CacheError(FluxError, ValueError):
    """A :class:`fluxcompile.FluxCache` cannot be made, or cannot do, what was asked."""


class FluxWarning(UserWarning):
    """Warned once when a model runs as full attention where routing was possible in principle."""
