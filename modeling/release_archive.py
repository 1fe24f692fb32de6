"""The two files of a released VLM checkpoint of the paper, out of its tar or out of the folder that was in it.

Only these two are read, and only the checkpoint is written, under a name of our own, so nothing in an archive decides
where a file goes. An archive with anything but plain files and folders inside itself is refused all the same.
"""

import gzip
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import IO

CONFIG = "config.json"
CHECKPOINT = "checkpoints/latest-checkpoint.pt"
_FORM = f"a release is a tar, or the folder that was in it, with {CONFIG} and {CHECKPOINT}"
_MOST_CONFIG_BYTES = 1 << 20


def is_paper_release(source: str | PathLike) -> bool:
    """Whether this is a tar, or a folder with a release's checkpoint in it."""
    source = Path(source)
    return (source / CHECKPOINT).is_file() or (source.is_file() and tarfile.is_tarfile(source))


def read_config(source: Path) -> bytes:
    """`config.json` of a release.

    Raises:
        OSError: the source is not there, or a file is missing in the folder.
        ValueError: the archive is damaged, not safe, or no release.
    """
    if source.is_dir():
        if not (source / CONFIG).is_file() or not (source / CHECKPOINT).is_file():
            raise FileNotFoundError(f"The folder {str(source)!r} lacks {CONFIG} or {CHECKPOINT}: {_FORM}.")
        return (source / CONFIG).read_bytes()
    with _opened(source) as (archive, members), _packed(archive, members[CONFIG]) as file:
        return file.read(_MOST_CONFIG_BYTES)


def unpack_checkpoint(source: Path, scratch: Path) -> Path:
    """The checkpoint of a release as a file of its own: in the folder, or unpacked into `scratch`.

    Raises:
        OSError: the disk has no space for the checkpoint and what is to be made of it.
        ValueError: as in `read_config`.
    """
    if source.is_dir():
        return source / CHECKPOINT
    with _opened(source) as (archive, members):
        needed, free = 2 * members[CHECKPOINT].size, shutil.disk_usage(scratch).free
        if needed > free:
            raise OSError(
                f"{str(scratch.parent)!r} has {free / 1e9:.1f} GB of free space, but {needed / 1e9:.1f} GB are needed: "
                f"the checkpoint in {str(source)!r} is unpacked there and written anew."
            )
        checkpoint = scratch / "checkpoint.pt"
        with _packed(archive, members[CHECKPOINT]) as packed, checkpoint.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 24)
    return checkpoint


def _packed(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file is not None  # it is None of folders and devices only, which `_members` does not give
    return file


@contextmanager
def _opened(source: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]]:
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {str(source)!r}.")
    try:
        with tarfile.open(source) as archive:
            yield archive, _members(archive, source)
    except (tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{str(source)!r} is not a whole tar file: {error}.") from error


def _members(archive: tarfile.TarFile, source: Path) -> dict[str, tarfile.TarInfo]:
    """The two files, at the top or inside one folder, of an archive of plain files and folders only."""
    found: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name:
            raise ValueError(f"{str(source)!r} is not safe: its member {member.name!r} lies outside of the archive.")
        if not (member.isreg() or member.isdir()):
            raise ValueError(
                f"{str(source)!r} is not safe: its member {member.name!r} is a link or a device, where a release has "
                "files and folders only."
            )
        for name in (CONFIG, CHECKPOINT):
            folders = len(path.parts) - len(PurePosixPath(name).parts)  # that it lies in
            if member.isreg() and folders in (0, 1) and path == PurePosixPath(*path.parts[:folders], name):
                if name in found:
                    raise ValueError(f"{str(source)!r} holds {name} twice: {found[name].name!r} and {member.name!r}.")
                found[name] = member
    for name in (CONFIG, CHECKPOINT):
        if name not in found:
            raise ValueError(f"{str(source)!r} holds no {name}: {_FORM}.")
    return found


__all__ = ["CHECKPOINT", "CONFIG", "is_paper_release", "read_config", "unpack_checkpoint"]
