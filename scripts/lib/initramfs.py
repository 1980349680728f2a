# SPDX-License-Identifier: GPL-2.0
"""Initramfs images made of busybox, an init and a few files, as newc archives."""

import subprocess

BUSYBOX = "/bin/busybox"


class Archive:
    """A newc archive, which the kernel unpacks as its initramfs."""

    def __init__(self):
        self.parts = []
        self.inode = 0

    def add(self, name, mode, data=b"", rdev=(0, 0)):
        """Add one entry: MODE has the file's type, RDEV a device's numbers."""
        self.inode += 1
        path = name.encode() + b"\0"
        fields = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, rdev[0], rdev[1], len(path), 0)
        head = "070701" + "".join(f"{value:08x}" for value in fields)
        entry = head.encode() + path
        entry += b"\0" * (-len(entry) % 4) + data
        self.parts.append(entry + b"\0" * (-len(entry) % 4))

    def finish(self):
        """Return the archive's bytes."""
        self.add("TRAILER!!!", 0)
        return b"".join(self.parts)


def alone(init):
    """An initramfs that has nothing but the program INIT as its /init."""
    archive = Archive()
    for name in ("dev", "proc"):
        archive.add(name, 0o040755)
    archive.add("dev/console", 0o020600, rdev=(5, 1))
    with open(init, "rb") as f:
        archive.add("init", 0o100755, f.read())
    return archive.finish()


def with_busybox(init, files, copies=()):
    """An initramfs whose /init is the file INIT; FILES is a dict of path to text, COPIES of path to
    a file to copy there, which may be a program."""
    archive = Archive()
    for name in ("bin", "dev", "proc", "sys", "tmp", "data", "etc", "modules"):
        archive.add(name, 0o040755)
    with open(BUSYBOX, "rb") as f:
        archive.add("bin/busybox", 0o100755, f.read())
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout
    for applet in applets.split():
        if applet != "busybox":
            archive.add("bin/" + applet, 0o120777, b"busybox")
    archive.add("dev/console", 0o020600, rdev=(5, 1))
    with open(init, "rb") as f:
        archive.add("init", 0o100755, f.read())
    for name, text in files.items():
        archive.add(name, 0o100644, text.encode())
    for name in copies:
        with open(copies[name], "rb") as f:
            archive.add(name, 0o100755, f.read())
    return archive.finish()
