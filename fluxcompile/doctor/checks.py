"""All checks, in the order in which their failures explain one another."""

from collections.abc import Iterator

from fluxcompile.doctor import caches, entry_point, gpu, self_test, toolchain, versions
from fluxcompile.doctor.finding import Finding


def examine(lowering: str | None = None) -> Iterator[Finding]:
    """Look at everything; each finding comes as soon as it is known.

    Args:
        lowering: of the self-test. None: Inductor where it can compile, eager otherwise.
    """
    yield versions.own_version()
    yield versions.python_version()
    yield versions.package_version("torch")
    yield versions.package_version("transformers")
    yield toolchain.triton()
    yield toolchain.compiler()
    yield gpu.gpu()
    yield caches.inductor_cache()
    yield caches.triton_cache()
    yield entry_point.backend()
    lowering = lowering or ("inductor" if toolchain.has_compiler() else "eager")
    yield self_test.self_test("full", lowering)
    yield self_test.self_test("sparse", lowering)
