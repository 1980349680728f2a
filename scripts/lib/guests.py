# SPDX-License-Identifier: GPL-2.0
"""Linux guests for the sample VMM: what to put on the disk, and the command to run."""

import os
import re
import secrets
import shlex
import shutil

import initramfs

HERE = os.path.dirname(os.path.abspath(__file__))
# No device that the VMM's machine lacks is in need of an option.
CMDLINE = "console=ttyS0,115200 panic=-1"


def modules(kernel):
    """The modules that lie beside KERNEL, as copies for an initramfs."""
    directory = os.path.join(os.path.dirname(kernel), "modules")
    # The test kernel has what a guest needs built in; its modules are the machine's.
    if os.path.basename(kernel) != "vmlinuz" or not os.path.isdir(directory):
        return {}
    return {"modules/" + name: os.path.join(directory, name) for name in os.listdir(directory)}


class Guest:
    """A Linux kernel, an initramfs of ours, and the line by which its init reports."""

    def __init__(self, kernel, append="", memory=256, timeout=240, options=""):
        self.kernel = kernel
        self.nonce = secrets.token_hex(8)
        self.cmdline = f"{CMDLINE} rkvm.nonce={self.nonce} {append}".strip()
        self.memory = memory
        self.timeout = timeout
        self.options = options
        self.report = re.compile(rf"guest {self.nonce}: init is up on Linux ([^\s,]+)")

    def stage(self, directory, programs=None):
        """Put the guest's files into DIRECTORY, which goes to the disk. Its initramfs has the modules
        beside the kernel, if there are any, and the files in the directory PROGRAMS."""
        os.makedirs(directory, exist_ok=True)
        target = os.path.join(directory, "vmlinuz")
        if os.path.exists(target):
            os.unlink(target)
        os.symlink(self.kernel, target)
        copies = modules(self.kernel)
        for name in os.listdir(programs) if programs else ():
            copies["bin/" + name] = os.path.join(programs, name)
        with open(os.path.join(directory, "initramfs"), "wb") as f:
            f.write(initramfs.with_busybox(os.path.join(HERE, "guest-init"), {}, copies))
        shutil.copy(os.path.join(HERE, "../guest/run"), directory)

    def command(self, device, directory):
        """The shell command that boots it inside, with its files in DIRECTORY."""
        return (f"rkvm-vmm --device {device} --kernel {directory}/vmlinuz "
                f"--initrd {directory}/initramfs --memory {self.memory} {self.options} "
                f"--timeout {self.timeout} --cmdline '{self.cmdline}'")


# Who moves the frames of a guest's network.
NETWORKS = {"": [], "tap": ["--tap", "tap0"], "vhost": ["--tap", "tap0,vhost"]}


def run(directory, device, cpus, irqchip, stress=0, network=""):
    """The shell command that boots the guest in DIRECTORY and judges it, disks and all."""
    return shlex.join(["sh", f"{directory}/run", directory, device, str(cpus), irqchip,
                       secrets.token_hex(8), str(stress or ""), *NETWORKS[network]])


def stage_qemu(directory, programs=None, run=""):
    """Put Debian's kernel into DIRECTORY, and an initramfs with a shell and the files in the
    directory PROGRAMS; the shell is to do what RUN says, or to ask the console."""
    kernel = os.environ["RKVM_GUEST"] + "/vmlinuz"
    os.makedirs(directory, exist_ok=True)
    shutil.copy(kernel, directory)
    copies = modules(kernel)
    for name in os.listdir(programs) if programs else ():
        copies["bin/" + name] = os.path.join(programs, name)
    with open(os.path.join(directory, "initramfs"), "wb") as f:
        f.write(initramfs.with_busybox(os.path.join(HERE, "qemu-init"),
                                       {"etc/run": run + "\n"} if run else {}, copies))
