"""Calls of Linux that Python's `os` lacks, through libc; where one is missing, the answer is ENOSYS, as from an old kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import platform

AT_FDCWD = -100
RENAME_EXCHANGE = 2
SYNC_FILE_RANGE_WRITE = 2
_RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "ppc64le": 357, "s390x": 347, "riscv64": 276}

_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: str, other: str) -> None:
    """Two names change places in one system call."""
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(_libc, "renameat2"):
        code = _libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], ctypes.c_uint(RENAME_EXCHANGE))
    elif platform.system() == "Linux" and platform.machine() in _RENAMEAT2:
        call = ctypes.c_long(_RENAMEAT2[platform.machine()])
        code = _libc.syscall(call, AT_FDCWD, names[0], AT_FDCWD, names[1], ctypes.c_uint(RENAME_EXCHANGE))
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), one, None, other)


def reserve(fd: int, length: int) -> None:
    """Takes the room that a file will need, so that a full disk shows before anything is written."""
    if length == 0 or not hasattr(_libc, "fallocate"):
        return
    # Not `os.posix_fallocate`: where a file system can not, that writes every block.
    if _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Asks the kernel to begin writing a range; only a hint: the fsync decides."""
    if length and hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(SYNC_FILE_RANGE_WRITE))
