"""Files: where nest-runtime keeps its own, how to read what others hand in, how to write what a crash must not tear.

What is read is a regular file of bounded size. A pipe that nobody writes to, a device without an end or a folder is
told apart by the descriptor that is read: nothing can be put in its place meanwhile. What is written is there whole or
not at all. Breaches are OSErrors whose ``strerror`` says what was found, so that whoever reports a file that
cannot be read or written reports these as well.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nest_runtime.errors import UsageError

MAX_SETTINGS = 1 << 20  # bytes of a policy, a list of tokens or logins, a template
MAX_RESULT = 1 << 30  # bytes of what eval, locate and compare write
MAX_OUTPUT_NAME = 200  # characters of a target's name that its temporary name repeats


def nest_home() -> Path:
    """``$NEST_HOME`` where set and not empty, else ``~/.cache/nest-runtime``; not created here.

    Raises:
        UsageError: this user has no home folder, as in some containers.
    """
    named = os.environ.get("NEST_HOME", "")
    return expand(named) if named else expand("~/.cache/nest-runtime")


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` and ``~user`` replaced. Raises UsageError if there is no such user, or no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        who = "this user" if str(path).startswith(("~/", "~\\")) or str(path) == "~" else str(path).split("/")[0]
        raise UsageError(
            f"the home folder of {who} cannot be found", "set NEST_HOME, or write the whole path"
        ) from error


class Unfit(OSError):
    """What stands at a path is no file, or is larger than it may be."""


_KINDS = (
    (stat.S_ISDIR, "a folder", errno.EISDIR),
    (stat.S_ISFIFO, "a pipe", errno.EINVAL),
    (stat.S_ISSOCK, "a socket", errno.EINVAL),
    (stat.S_ISCHR, "a device", errno.EINVAL),
    (stat.S_ISBLK, "a device", errno.EINVAL),
)


def open_file(path: str | os.PathLike[str], limit: int | None = None, *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: the file.
        limit: the most bytes it may have.
        follow: go through a symbolic link; False for files that only this program puts where they are.

    Raises:
        OSError: there is none, it cannot be read, it is something else than a file, or it is too large.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise Unfit(errno.ELOOP, "it is a link; expected the file itself", str(path)) from error
        if error.errno == errno.ENXIO:  # what open says of a socket
            raise Unfit(errno.ENXIO, "it is a socket; expected a file", str(path)) from error
        raise
    try:
        facts = os.fstat(handle)
        _check_regular(facts.st_mode, str(path))
        if limit is not None and facts.st_size > limit:
            raise _too_large(path, limit)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: str | os.PathLike[str], limit: int, *, follow: bool = True) -> bytes:
    """The content of a regular file; one that grows while it is read is held to the limit too. Raises as open_file."""
    with open_file(path, limit, follow=follow) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _too_large(path, limit)
    return data


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """The text of a UTF-8 file; a byte order mark is no part of it.

    Raises:
        ValueError: it is not UTF-8.
        OSError: as open_file.
    """
    return read_bytes(path, limit).decode("utf-8-sig")


def lines_of(text: str) -> list[str]:
    r"""The lines of a text file: they end with ``\n``, ``\r\n`` or ``\r``, and with nothing else that looks like it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n") if text else []


def is_text(value: str) -> bool:
    """Whether a string is text: without lone surrogates, which stand for half a character or for bytes of none."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, for one that is nested beyond measure as well."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text. Raises ValueError as ``parse_json``."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextlib.contextmanager
def replacing(target: str | os.PathLike[str], *, workdir: Path | None = None, secret: bool = False) -> Iterator[Path]:
    """A temporary file that takes the target's place when the block ends, and is gone if it raises.

    The file is synced before it is renamed, and the folder after. Its mode is what the umask leaves of any new file,
    also where a library wrote it under its own.

    Args:
        target: the file to create or replace; its folder must exist.
        workdir: where the temporary file stands until the rename (same file system); the target's folder by default.
        secret: for its owner's eyes only, mode 0600.

    Yields the temporary file's path.

    Raises:
        OSError: the disk fails, or the target is not a file.
    """
    target = Path(target)
    check_target(target)
    temporary = _beside(target, workdir)
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        _settle(temporary, mode)
        os.replace(temporary, target)
    except BaseException:  # an interrupt too must leave no half-written file
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)


def atomic_write(
    target: str | os.PathLike[str], data: bytes | str, *, workdir: Path | None = None, secret: bool = False
) -> None:
    """Write a whole file, text as UTF-8; arguments and errors as ``replacing``."""
    with replacing(target, workdir=workdir, secret=secret) as temporary, temporary.open("r+b") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; its folder is made if missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text)


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write a JSON file for people to read, atomically; its folder is made if missing. Raises OSError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value of a file of our own, or None if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def canonical_json(value: Any, *, errors: str = "strict", allow_nan: bool = False, default: Any = None) -> bytes:
    """The one byte form of a JSON value, for digests and signatures: sorted keys, no spaces, UTF-8.

    Args:
        value: what to write.
        errors: what becomes of half a surrogate pair, as for ``str.encode``.
        allow_nan: write NaN and infinities, which are no JSON.
        default: makes something of values that are no JSON, as for ``json.dumps``.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=allow_nan, default=default
    )
    return text.encode("utf-8", errors)


def check_target(target: Path) -> None:
    """Refuse to replace what is no file: a folder, a device. Raises OSError."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    _check_regular(mode, str(target))


def check_writable(target: str | os.PathLike[str]) -> None:
    """Find out before the work whether a file can be written at the end of it.

    Raises:
        OSError: as the writing would.
    """
    target = Path(target)
    check_target(target)
    _try_out(target.absolute().parent)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Find out before the work whether a folder can be made, or written to where it is there. Raises OSError."""
    folder = Path(folder).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    _try_out(folder)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. Some systems cannot open folders, or sync one, and need no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _beside(target: Path, workdir: Path | None) -> Path:
    return (workdir or target.parent) / f".{target.name[:MAX_OUTPUT_NAME]}.{secrets.token_hex(8)}.tmp"


def _try_out(folder: Path) -> None:
    trial = folder / f".{secrets.token_hex(8)}.tmp"
    os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(trial)


def _settle(path: Path, mode: int) -> None:
    """Bring a written file to the disk, and give it back the mode that it was made with."""
    handle = os.open(path, os.O_RDWR)
    try:
        if stat.S_IMODE(os.fstat(handle).st_mode) != mode:
            os.chmod(path, mode)
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_regular(mode: int, path: str) -> None:
    for test, name, number in _KINDS:
        if test(mode):
            raise Unfit(number, f"it is {name}; expected a file", path)


def _too_large(path: str | os.PathLike[str], limit: int) -> Unfit:
    return Unfit(errno.EFBIG, f"it has more than the {limit} bytes that it may have", str(path))
