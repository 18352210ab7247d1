"""A new file, whole or not at all, that never takes the place of another."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


@contextmanager
def new_file(path, overwrite: bool = False) -> Iterator[tuple]:
    """Makes the temporary file of a file to be, so that whatever forbids writing it shows at once.

    Args:
        path: what the file is to be called.
        overwrite: whether to replace a file of that name.

    Returns:
        As a context: the path of the temporary file, to be written to, and a function publish(), which gives the file
        its name and returns that. Where another file took the name meanwhile, it is the next free one of `numbered`: a
        picture may have taken minutes, and is never thrown away. Without publish() there is no file in the end.

    Raises:
        FileExistsError: there is such a file already.
        OSError: nothing can be written there.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        if not os.path.isdir(path.parent):
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder; name a file in it")
        with suppress(FileNotFoundError):
            path.lstat()  # refuses a name that is too long
            if not overwrite:
                raise FileExistsError(f"{path}: exists already; name another file, or allow overwriting")
        temporary.touch(exist_ok=False)
    except OSError as error:
        if not error.errno:  # said above
            raise
        raise type(error)(f"{path}: cannot be written ({error.strerror}); name another file") from None
    try:
        yield temporary, lambda: publish(temporary, path, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary, path, overwrite):
    """Moves a finished file to a path, or to the next free name, without taking another file's; returns where it is."""
    if overwrite:
        with suppress(OSError):  # by now a folder, or open in another program
            return temporary.replace(path)
    for name in numbered(path):
        with suppress(FileExistsError):
            try:
                os.link(temporary, name)  # unlike a move, it fails where the name is taken
                temporary.unlink()
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                name.touch(exist_ok=False)
                temporary.replace(name)
            return name


def numbered(path: Path) -> Iterator[Path]:
    """Yields picture.png, picture-2.png, picture-3.png and so on."""
    yield path
    stem = path.stem.encode(errors="ignore")[:200].decode(errors="ignore")  # a name has room for 255 bytes
    yield from (path.with_name(f"{stem}-{k}{path.suffix}") for k in count(2))
