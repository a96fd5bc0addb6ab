"""A folder that is either complete or not there.

Files are written to a hidden folder beside the one that is asked for, which is renamed when all is done. An old report
is replaced only when told to, only when nothing but a report is in it, and only once the new one is complete.
"""

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["FolderError", "new_folder"]


class FolderError(ValueError):
    """A folder that may not be replaced or cannot be written."""


@contextmanager
def new_folder(path: str | Path, *, force: bool = False, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """Fill a folder in the block ``with new_folder(path) as partial: ...``; it appears when the block has ended.

    Parameters
    ----------
    path
        The folder to make; folders above it are made as needed.
    force
        Whether to replace it if it has something in it.
    replaceable
        Names of the files and folders that may be replaced. If there is any other in it, it is not touched.

    Raises
    ------
    FolderError
        If ``path`` may not be replaced, holds the working directory, or cannot be written.
    """
    final = Path(path).resolve()
    _check(path, final, force, replaceable)
    made = [parent for parent in final.parents if not parent.exists()]
    partial: Path | None = None
    try:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            partial = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
            partial.mkdir()
        except OSError as error:
            raise FolderError(f"cannot write beside {path}: {error.strerror}.") from None
        yield partial
        _check(path, final, force, replaceable)  # somebody may have been there meanwhile
        _move(partial, final)
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            try:
                parent.rmdir()
            except OSError:  # somebody else uses it, or it was never made
                break
        raise


def _check(path, final: Path, force: bool, replaceable: Collection[str]) -> None:
    if Path.cwd().is_relative_to(final):
        raise FolderError(f"{path} holds the working directory: name a folder inside it.")
    if final.exists() and not final.is_dir():
        raise FolderError(f"{path} exists and is no folder.")
    present = sorted(item.name for item in final.iterdir()) if final.exists() else []
    if present and not force:
        raise FolderError(
            f"{path} exists and is not empty: add --force (in Python force=True) to replace it."
        )
    foreign = [name for name in present if name not in replaceable]
    if foreign:
        raise FolderError(
            f"{path} holds what no report is made of ({foreign[0]}) and is not replaced: name another."
        )


def _move(partial: Path, final: Path) -> None:
    """Put ``partial`` in the place of ``final``; if that fails the old one is put back."""
    if not final.exists():
        os.rename(partial, final)
        return
    aside = partial.with_name(partial.name + ".old")
    os.rename(final, aside)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
