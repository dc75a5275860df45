"""Versions that are installed against those that this package asks for.

The ranges are those of the installed package's own metadata, so they cannot differ from what pip
was told.
"""

import platform
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import fluxcompile
from fluxcompile.doctor.finding import Finding, fail, ok, warn

PACKAGE = "fluxcompile"
#: the newest minor release of each that the tests have run with
NEWEST_TESTED = {"torch": "2.13", "triton": "3.9", "transformers": "5.24"}


def python_version() -> Finding:
    """Python itself."""
    version, wanted = platform.python_version(), SpecifierSet(_metadata("Requires-Python"))
    if wanted.contains(version, prereleases=True):
        return ok("python", f"{version} ({wanted})")
    return fail("python", f"{version}, not {wanted}", f"make an environment with Python {wanted}")


def own_version() -> Finding:
    """fluxcompile: what runs is what was installed."""
    try:
        installed = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return fail(
            PACKAGE,
            f"{fluxcompile.__version__} runs, and is not installed",
            "pip install fluxcompile: without its entry point torch.compile finds no backend",
        )
    if installed == fluxcompile.__version__:
        return ok(PACKAGE, installed)
    return fail(
        PACKAGE,
        f"{fluxcompile.__version__} runs, and {installed} is installed",
        "pip install --force-reinstall --no-deps fluxcompile; is a second copy on sys.path?",
    )


def package_version(name: str) -> Finding:
    """torch or transformers, which nothing works without."""
    wanted = _range_of(name)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return fail(name, f"not installed, expected {wanted}", _install(name, wanted))
    return judge(name, version, wanted)


def judge(name: str, version: str, wanted: SpecifierSet) -> Finding:
    """A version that is there against the range of those that are supported."""
    if not wanted.contains(version, prereleases=True):
        return fail(name, f"{version}, expected {wanted}", _install(name, wanted))
    tested = NEWEST_TESTED[name]
    if Version(version).release[:2] > Version(tested).release:
        return warn(
            name,
            f"{version}, newer than {tested}, the newest one that was tested",
            f'if something fails: pip install "{name}=={tested}.*"',
        )
    return ok(name, f"{version} ({wanted}, tested up to {tested})")


def _range_of(name: str) -> SpecifierSet:
    """Empty, which takes everything, where nobody says."""
    try:
        lines = metadata.requires(PACKAGE) or ()
    except metadata.PackageNotFoundError:  # a line of its own says so
        lines = ()
    for line in lines:
        requirement = Requirement(line)
        if requirement.name == name:
            return requirement.specifier
    return SpecifierSet()


def triton_range() -> SpecifierSet:
    return _range_of("triton")


def _metadata(key: str) -> str:
    try:
        return metadata.metadata(PACKAGE)[key] or ""
    except metadata.PackageNotFoundError:
        return ""


def _install(name: str, wanted: SpecifierSet) -> str:
    return f'pip install "{name}{wanted}"'
