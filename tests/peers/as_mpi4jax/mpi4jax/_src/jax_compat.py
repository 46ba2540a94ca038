"""Versions as tuples."""


def versiontuple(version: str) -> tuple[int, ...]:
    """The numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
