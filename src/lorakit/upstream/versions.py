"""The versions of what is installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(library: str) -> str | None:
    """The version of an installed library.

    None: it is not installed, or is used from its sources in place.
    """
    try:
        return version(library)
    except PackageNotFoundError:
        return None
