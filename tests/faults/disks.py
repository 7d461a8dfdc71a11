"""Disks that lose what was not synced, are small, or slow."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

/* DISK_SYNC_MS: what a sync takes longer. DISK_LIES: it says it was done, and was not. */
static int sync_with(const char *name, int fd) {
    const char *ms = getenv("DISK_SYNC_MS");
    if (ms) {
        struct timespec pause = {atol(ms) / 1000, atol(ms) % 1000 * 1000000L};
        nanosleep(&pause, 0);
    }
    if (getenv("DISK_LIES")) return 0;
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(fd);
}
int fsync(int fd) { return sync_with("fsync", fd); }
int fdatasync(int fd) { return sync_with("fdatasync", fd); }
"""


def need(*programs: str, root: bool = False) -> None:
    """Skips the test, saying what is missing."""
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"{' and '.join(missing)} is not installed")
    if root and os.geteuid() != 0:
        pytest.skip("this needs root: mounts and network namespaces")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def shim(folder: Path, **settings: str) -> dict[str, str]:
    """The environment of a process whose syncs are slow (DISK_SYNC_MS=200) or lies (DISK_LIES=1)."""
    need("gcc")
    library = folder / "disk.so"
    (folder / "disk.c").write_text(_SHIM)
    run("gcc", "-shared", "-fPIC", "-O2", "-o", library, folder / "disk.c", "-ldl")
    return {"LD_PRELOAD": str(library), **settings}


class LoopDisk:
    """An ext4 file system in a file. `cut` keeps of it what a power cut would have left."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk"
        self._image = folder / "disk.img"
        self._cuts = 0
        self.path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(512 << 20)
        run("mkfs.ext4", "-q", self._image)
        self.mount()

    def mount(self) -> None:
        # Nothing is written back by the clock during a test: what was not synced is in memory only.
        run("mount", "-o", "loop,commit=300", self._image, self.path)

    def copy(self) -> None:
        """What the device has at this instant, to be found there after the next `cut`."""
        run("cp", "--sparse=always", self._image, f"{self._image}.cut")

    def cut(self) -> None:
        """The file system as it was at the `copy`; who used it must have been killed."""
        self.unmount()
        Path(f"{self._image}.cut").replace(self._image)
        self.mount()

    def unmount(self) -> None:
        run("umount", self.path)


@contextlib.contextmanager
def loop_disk(folder: Path) -> Iterator[LoopDisk]:
    need("mkfs.ext4", "losetup", "mount", root=True)
    disk = LoopDisk(folder)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk.path)], check=False)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of this size."""
    need("mount", root=True)
    path = folder / "small"
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)
