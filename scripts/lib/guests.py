# SPDX-License-Identifier: GPL-2.0
"""Linux guests for the sample VMM: what to put on the disk, and the command to run."""

import os
import re
import secrets

import initramfs

HERE = os.path.dirname(os.path.abspath(__file__))
# No device that the VMM's machine lacks is in need of an option.
CMDLINE = "console=ttyS0,115200 panic=-1"


class Guest:
    """A Linux kernel, an initramfs of ours, and the line by which its init reports."""

    def __init__(self, kernel, append="", memory=256, timeout=240, options="--irqchip none"):
        self.kernel = kernel
        self.nonce = secrets.token_hex(8)
        self.cmdline = f"{CMDLINE} rkvm.nonce={self.nonce} {append}".strip()
        self.memory = memory
        self.timeout = timeout
        self.options = options
        self.report = re.compile(rf"guest {self.nonce}: init is up on Linux ([^\s,]+)")

    def stage(self, directory):
        """Put the guest's files into DIRECTORY, which goes to the disk."""
        os.makedirs(directory, exist_ok=True)
        target = os.path.join(directory, "vmlinuz")
        if os.path.exists(target):
            os.unlink(target)
        os.symlink(self.kernel, target)
        with open(os.path.join(directory, "initramfs"), "wb") as f:
            f.write(initramfs.with_busybox(os.path.join(HERE, "guest-init"), {}))

    def command(self, device, directory):
        """The shell command that boots it inside, with its files in DIRECTORY."""
        return (f"rkvm-vmm --device {device} --kernel {directory}/vmlinuz "
                f"--initrd {directory}/initramfs --memory {self.memory} {self.options} "
                f"--timeout {self.timeout} --cmdline '{self.cmdline}'")
