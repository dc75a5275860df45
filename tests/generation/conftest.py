"""As in the parity tests: endless recompilation fails, and each test sees its own warnings."""

from tests.parity.conftest import fresh_warnings, loud_recompile_limit  # noqa: F401
