"""Whether ``torch.compile(backend="flux")`` finds this package, and this package only."""

from importlib import metadata

from fluxcompile.doctor.finding import Finding, fail, ok

BACKEND = "backend"
GROUP, NAME, VALUE = "torch_dynamo_backends", "flux", "fluxcompile.backend:flux"


def backend() -> Finding:
    """The entry point is there once, names our function, and Dynamo's own look-up takes it."""
    found = [entry.value for entry in metadata.entry_points(group=GROUP, name=NAME)]
    if not found:
        return fail(
            BACKEND,
            f"no entry point {NAME!r} in {GROUP}",
            "install the package (pip install fluxcompile): a folder on sys.path is not enough",
        )
    if found != [VALUE]:
        return fail(
            BACKEND,
            f"expected the entry point {VALUE} once, got {found}",
            "uninstall what else is called flux, or the second copy of fluxcompile",
        )
    try:
        looked_up = _look_up()
    except Exception as error:  # whatever stands in the way is what the user wants to read
        return fail(
            BACKEND,
            f"Dynamo does not load it ({type(error).__name__}: {error})",
            "see the lines above; call no register_backend of that name: the entry point is enough",
        )
    if f"{looked_up.__module__}:{looked_up.__name__}" != VALUE:
        return fail(
            BACKEND,
            f"Dynamo finds {looked_up.__module__}:{looked_up.__name__} under the name {NAME!r}",
            "call no register_backend of that name: the entry point is enough",
        )
    return ok(BACKEND, f"{NAME} = {VALUE}, registered once")


def _look_up():
    import torch

    return torch._dynamo.lookup_backend(NAME)
