"""Where training may write: into a folder, and into none that it reads or replaces."""

from pathlib import Path

from outrider.errors import ConfigError


def check_folder(folder: Path) -> None:
    """ConfigError if a file stands where the folder, or one around it, is to be."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    if not place.is_dir():
        raise ConfigError(
            f"no folder can be made at {str(folder)!r}, for {str(place)!r} is a file: name another"
        )


def check_apart(out: Path, taken: Path, what: str) -> None:
    """ConfigError if `out` is the folder of something else."""
    if is_same(out, taken):
        raise ConfigError(
            f"out={str(out)!r} is the folder of the {what} ({str(taken)!r}), which would be "
            "overwritten: name another folder"
        )


def is_within(place: Path, folder: Path) -> bool:
    """Whether it is the folder, or lies somewhere in it; neither need exist."""
    place = place.resolve()
    return any(is_same(around, folder) for around in (place, *place.parents))


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place, through links or spelled in another case."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()
