"""Keeps two runs from writing one folder at once; the operating system frees the lock of one that was killed."""

import os
import socket
from pathlib import Path

from trimtab.commands.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "FolderLock"]

LOCK = ".trimtab.lock"


class FolderLock:
    """The right to write a folder, which all processes of one run share.

    The first process takes it alone, then shares it; the others join. While any process of a run lives, no other run
    gets it. Locks of the file system (``flock``) end with their process, so a run that was killed leaves none.

    Args:
        folder: which exists.

    Raises:
        UsageError: when taken, if another run has it.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._file = folder / LOCK, -1

    def take(self) -> None:
        """Takes the folder for this run, if no process of another has it."""
        if fcntl is None:
            return
        while self._file < 0:
            self._open()
            self._lock(fcntl.LOCK_EX)
            self._drop_if_removed()
        os.truncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock(fcntl.LOCK_SH)

    def join(self) -> None:
        """Takes part in the lock that the run's first process took."""
        if fcntl is not None:
            self._open()
            self._lock(fcntl.LOCK_SH)

    def release(self, *, remove: bool = False) -> None:
        """Gives the lock back.

        Args:
            remove: also the file, by the last process.
        """
        if self._file >= 0:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)

    def _lock(self, kind: int) -> None:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
            self.release()
            raise UsageError(
                f"--output {self._path.parent} is being written by {holder}; wait for it or name another folder"
            ) from None
        except OSError:
            pass  # a file system without locks: two runs are kept apart by nothing there

    def _drop_if_removed(self) -> None:
        """The file may have been removed by its last holder between opening and locking."""
        try:
            same = os.path.samestat(os.fstat(self._file), os.stat(self._path, follow_symlinks=False))
        except FileNotFoundError:
            same = False
        if not same:
            self.release()
