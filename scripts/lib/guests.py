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


# Kernels for small guests: where they lie, and the width of their programs.
TINY = {
    "i386": ("RKVM_GUEST32", "nopae/bzImage", 32),
    "i386pae": ("RKVM_GUEST32", "pae/bzImage", 32),
    "x86_64": ("RKVM_KERNEL_PLAIN", "bzImage", 64),
}
# What a guest's kernel or its init says when something is wrong.
COMPLAINT = re.compile(r"Call Trace:|BUG:|Oops|rcu.*stall|soft lockup|nobody cared|^guest \w+: bad:",
                       re.MULTILINE)


class Tiny:
    """A guest whose initramfs is one program, scripts/guest/tiny, and what it must say.

    KERNEL is one of TINY; OPTIONS are the VMM's.
    """

    def __init__(self, kernel, irqchip="split", cpus=1, options=(), append="loglevel=5"):
        self.kernel = kernel
        self.cpus = cpus
        self.nonce = secrets.token_hex(8)
        self.options = ["--irqchip", irqchip, "--cpus", str(cpus), *options]
        self.cmdline = f"{CMDLINE} rkvm.nonce={self.nonce} {append}"
        self.name = "-".join([kernel, irqchip, str(cpus),
                              *(o.lstrip("-") for o in options)])

    def stage(self, tree, directory):
        """Put the guest's files into DIRECTORY, which goes to the disk as tiny; guests with the same
        kernel share them."""
        variable, path, bits = TINY[self.kernel]
        os.makedirs(directory, exist_ok=True)
        target = os.path.join(directory, self.kernel)
        if not os.path.exists(target):
            os.symlink(os.path.join(os.environ[variable], path), target)
        with open(os.path.join(directory, f"initramfs{bits}"), "wb") as f:
            f.write(initramfs.alone(os.path.join(tree, f"build/bin/tiny/init{bits}")))

    def command(self, device, timeout):
        """The shell command that boots it inside."""
        bits = TINY[self.kernel][2]
        return shlex.join(["rkvm-vmm", "--device", device, "--kernel", f"tiny/{self.kernel}",
                           "--initrd", f"tiny/initramfs{bits}", "--memory", "128",
                           "--timeout", str(timeout), "--cmdline", self.cmdline, *self.options])

    def judge(self, text):
        """Whether it said in TEXT all that it has to, and nothing else that matters."""
        text = text.replace("\r", "")
        said = (rf"^guest {self.nonce}: init is up on Linux ", rf"^guest {self.nonce}: processors {self.cpus}$")
        return (all(re.search(line, text, re.MULTILINE) for line in said)
                and not COMPLAINT.search(text)
                and (self.cpus == 1 or f"guest {self.nonce}: processors wrote together" in text))


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
