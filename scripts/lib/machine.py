# SPDX-License-Identifier: GPL-2.0
"""Boot a machine that has VMX or SVM, run a command in it, exit with its status.

The machine is Bochs (which emulates VMX and SVM) or, where the processor has
them, QEMU with KVM. Both get a test kernel, an initramfs with busybox, and a
squashfs disk with the payload, mounted at /data, where the command runs. The
command's output goes to stdout, the kernel's messages go to stderr, as they come.

  scripts/machine --data build/selftests -- ./ioctl_test
  scripts/machine --cpus 2 --kernel debug --insmod kvm --insmod kvm-intel \\
                  --data some/dir:tests -- 'cd tests && ./all'
"""

import argparse
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tty
import termios

import initramfs

HERE = os.path.dirname(os.path.abspath(__file__))

DEFAULT_CPU = "corei7_icelake_u"

# Exit statuses of our own; the command's are passed through.
KERNEL_COMPLAINED = 120
TIMED_OUT = 121
DIED = 122

# Lines of the kernel's console that fail a run. It has ttyS0 to itself.
TROUBLE = re.compile(r"""
    \bWARNING: | \bBUG: | \bOops\b | Kernel\ panic | \bUBSAN: | \bKASAN: | \bKFENCE:
  | Internal\ error | general\ protection\ fault | unable\ to\ handle
  | unchecked\ MSR\ access | double\ fault | stack\ segment | invalid\ opcode:
  | INFO:\ task\ .*\ blocked | INFO:\ rcu | rcu.*\ detected\ stall | soft\ lockup | hard\ LOCKUP
  | possible\ (recursive|circular)\ lock | possible\ irq\ lock | inconsistent\ lock\ state
  | lock\ held\ when\ returning | held\ lock\ freed | bad\ unlock\ balance
  | suspicious\ RCU | sleeping\ function\ called | scheduling\ while\ atomic
  | INFO:\ trying\ to\ register\ non-static\ key | INFO:\ lockdep
  | unreferenced\ object\ 0x | new\ suspected\ memory\ leaks
  | rust_kernel:\ panicked | \bpanicked\ at\b | refcount_t: | list_(add|del)\ corruption
  | Bad\ page | page\ dumped\ because | nobody\ cared | Unbalanced | Objects\ remaining
  | sysfs:\ cannot\ create\ duplicate | Spurious\ interrupt | vmwrite\ failed | vmread\ failed
""", re.VERBOSE)
# After one of these nothing more is to be expected.
FATAL = re.compile(r"end Kernel panic|Kernel panic - not syncing|System halted")

# What the kernel has to say of a CPU model as Bochs has it, before init.
KNOWN = {"core2_penryn_t9600": re.compile(r"WARNING: .*topology_common\.c:\d+ at parse_topology")}

# Bits of /proc/sys/kernel/tainted that no run may set: forced module load and
# unload, machine check, bad page, died, warned, soft lockup.
BAD_TAINT = {1: "F", 3: "R", 4: "M", 5: "B", 7: "D", 9: "W", 14: "L"}

SECTOR = 512
SETUP_AT = 0x10000      # real-mode part of the kernel; bootrom.S knows it
CMDLINE_AT = 0x1e000    # above its heap and stack
KERNEL_AT = 0x100000


def parse_arguments():
    """Return the parsed command line."""
    p = argparse.ArgumentParser(
        prog="scripts/machine", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""exit status: the command's; or
  {KERNEL_COMPLAINED}  the kernel complained (oops, WARNING, lockdep, KASAN, UBSAN, a leak, a hung
       task, ...): the lines are repeated at the end
  {TIMED_OUT}  time ran out
  {DIED}  the machine stopped, or did not power off, before the command was done
  125  a module did not load

Inside: busybox; /data is read-only, /tmp and /dev/shm are tmpfs; the test
kernel's modules (kvm-intel.ko, kvm-amd.ko, ...) are in /data/modules. Under Bochs
the TSC counts instructions (100 million a second of emulated time).""")
    p.add_argument("--cpu", metavar="MODEL",
                   help=f"Bochs CPU model (default {DEFAULT_CPU}; core2_penryn_t9600: VMX without "
                   "EPT; ryzen: SVM)")
    p.add_argument("--cpus", type=int, default=1, metavar="N", help="number of CPUs (default 1)")
    p.add_argument("--memory", type=int, default=1024, metavar="MIB", help="default %(default)s")
    p.add_argument("--kernel", default="plain", metavar="FLAVOUR",
                   help="plain, debug, or a bzImage's path (default plain)")
    p.add_argument("--data", action="append", default=[], metavar="PATH[:DEST]",
                   help="put a file, or a directory's contents, at /data or /data/DEST; repeatable")
    p.add_argument("--insmod", action="append", default=[], metavar="'NAME [PARAM=V...]'",
                   help="load /data/modules/NAME.ko, and what it depends on, before the command; "
                   "repeatable, in order")
    p.add_argument("--module", action="append", default=[], metavar="FILE",
                   help="put a module's file at /data/modules; repeatable")
    p.add_argument("--timeout", type=float, default=300, metavar="S",
                   help="seconds of wall-clock time (default %(default)s)")
    p.add_argument("--accel", default="auto", choices=["auto", "bochs", "kvm", "tcg"],
                   help="auto: QEMU with KVM if the processor has VMX and no --cpu is given, else "
                   "Bochs; kvm: with VMX or SVM; tcg: QEMU's emulation, which has SVM only")
    p.add_argument("--append", default="", metavar="S", help="more of the kernel's command line")
    p.add_argument("--log", metavar="DIR",
                   help="keep the emulator's log, its configuration and both consoles in DIR "
                   "(why VM entry failed: grep VMFAIL and VMENTER in DIR/bochs.log)")
    p.add_argument("--log-level", choices=["error", "debug"], default="error",
                   help="with --log: what Bochs logs; error lines of a busy guest come to "
                   "hundreds of MB")
    p.add_argument("--quiet", action="store_true",
                   help="show the kernel's messages only when it complains")
    p.add_argument("--interactive", action="store_true",
                   help="connect this terminal to the command")
    p.add_argument("--debugger", action="store_true",
                   help="Bochs with its debugger, on this terminal; the machine starts with c, "
                   "Ctrl-C stops it. Best with a long --timeout")
    p.add_argument("command", nargs="*", metavar="-- COMMAND",
                   help="one word is a shell script, several are a command's words; "
                   "nothing: only boot")
    return p.parse_args()


def stage(source, target):
    """Copy SOURCE (a file, or a directory's contents) under the directory TARGET."""
    if os.path.isdir(source):
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif os.path.exists(source):
        os.makedirs(target, exist_ok=True)
        shutil.copy2(source, target)
    else:
        sys.exit(f"machine: {source}: no such file (only the tree, the cache, /tmp and the current "
                 "directory are visible from the build root; name more in RKVM_BIND)")


def dependencies(path):
    """Names (as in /sys/module) of the modules that the one at PATH needs first."""
    with open(path, "rb") as f:
        found = re.search(rb"\0depends=([^\0]*)\0", f.read())
    return [name for name in found[1].decode().split(",") if name] if found else []


def insmod_script(wanted, directory):
    """A shell script that loads the modules WANTED ("name param=value...") from DIRECTORY.

    What a module depends on is loaded before it, unless it is there already.
    """
    files = {name[:-3].replace("-", "_"): name for name in os.listdir(directory)}
    lines = []

    def load(name, params):
        if name not in files:
            sys.exit(f"machine: no {name}.ko among the modules: {' '.join(sorted(files.values()))}")
        for other in dependencies(os.path.join(directory, files[name])):
            load(other, [])
        line = f"insmod /data/modules/{files[name]} {shlex.join(params)} || exit 125"
        if line not in lines:
            lines.append(line)

    for item in wanted:
        name, *params = item.split()
        load(name.replace("-", "_"), params)
    return "\n".join(lines) + "\n"


def make_disk(args, work, kernel_dir):
    """Build the squashfs that the machine mounts at /data.

    Return its path and a script that loads the modules asked for.
    """
    root = os.path.join(work, "data")
    os.makedirs(os.path.join(root, "modules"))
    if kernel_dir:
        stage(os.path.join(kernel_dir, "modules"), os.path.join(root, "modules"))
    for module in args.module:
        stage(module, os.path.join(root, "modules"))
    for item in args.data:
        source, _, dest = item.partition(":")
        stage(source, os.path.join(root, dest.lstrip("/")))
    insmod = insmod_script(args.insmod, os.path.join(root, "modules"))
    disk = os.path.join(work, "data.sqfs")
    # Nobody pays for size here, and the emulated CPU would pay for inflating.
    subprocess.run(["mksquashfs", root, disk, "-quiet", "-no-progress", "-noI", "-noD", "-noF",
                    "-noX", "-all-root"], check=True, stdout=subprocess.DEVNULL)
    # Bochs guesses the geometry as 16 heads of 63 sectors: whole cylinders only.
    cylinder = 16 * 63 * SECTOR
    size = os.path.getsize(disk)
    os.truncate(disk, -(-size // cylinder) * cylinder)
    shutil.rmtree(root)
    return disk, insmod


def split_kernel(image, cmdline, initrd_at, initrd_size):
    """Split a bzImage into its real-mode part, patched as a boot loader would, and the rest.

    Documentation/arch/x86/boot.rst of the kernel names the fields.
    """
    with open(image, "rb") as f:
        data = f.read()
    if data[0x202:0x206] != b"HdrS":
        sys.exit(f"machine: {image} is not a bzImage")
    setup_size = ((data[0x1f1] or 4) + 1) * SECTOR
    setup = bytearray(data[:setup_size])
    setup[0x210] = 0xff                                    # type_of_loader: undefined
    setup[0x211] |= 0x80                                   # loadflags: CAN_USE_HEAP
    struct.pack_into("<II", setup, 0x218, initrd_at, initrd_size)
    struct.pack_into("<H", setup, 0x224, 0xe000 - 0x200)   # heap_end_ptr
    struct.pack_into("<I", setup, 0x228, CMDLINE_AT)
    setup += b"\0" * (CMDLINE_AT - SETUP_AT - len(setup)) + cmdline.encode() + b"\0"
    return bytes(setup), data[setup_size:]


def write(path, data):
    """Write DATA (bytes or text) to PATH and return PATH."""
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    return path


def bochs_command(args, work, kernel, cmdline, initrd, disk, serial):
    """Write what Bochs needs into WORK; return its command line."""
    bochs_dir = os.environ["RKVM_BOCHS_DEBUG" if args.debugger else "RKVM_BOCHS"]
    initrd_at = (min(args.memory, 1024) - 64 << 20) - (len(initrd) + 0xfffff & ~0xfffff)
    cmdline += " tsc_early_khz=100000"
    setup, rest = split_kernel(kernel, cmdline, initrd_at, len(initrd))
    with open(os.path.join(bochs_dir, "bootrom.bin"), "rb") as f:
        rom = bytearray(f.read())
    rom[-1] = -sum(rom[:-1]) & 0xff
    level = "report" if args.log and args.log_level == "debug" else "ignore"
    error = "report" if args.log else "ignore"
    rc = f"""# What Bochs was started with.
config_interface: textconfig
display_library: nogui
cpu: model={args.cpu or DEFAULT_CPU}, count={args.cpus}, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest={args.memory}, host={min(args.memory, 2048)}
romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot
vgaromimage: file=/usr/share/vgabios/vgabios.bin
optromimage1: file={write(work + "/bootrom.bin", bytes(rom))}, address=0xd0000
optramimage1: file={write(work + "/setup.bin", setup)}, address={SETUP_AT:#x}
optramimage2: file={write(work + "/kernel.bin", rest)}, address={KERNEL_AT:#x}
optramimage3: file={write(work + "/initrd.cpio", initrd)}, address={initrd_at:#x}
pci: enabled=1, chipset=i440fx
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path={disk}, mode=volatile
boot: disk
com1: enabled=1, {serial[0]}
com2: enabled=1, {serial[1]}
clock: sync={"slowdown" if args.interactive else "none"}, time0=utc
log: {work}/bochs.log
panic: action=fatal
error: action={error}
info: action={error}
debug: action={level}
"""
    return [os.path.join(bochs_dir, "bochs"), "-q", "-f", write(work + "/bochsrc", rc)]


def qemu_command(args, work, kernel, cmdline, initrd, disk, accel):
    """Return QEMU's command line for ACCEL; its serial lines are added by the caller."""
    cpu = "host" if accel == "kvm" else "EPYC,+svm,+npt"
    return ["qemu-system-x86_64", "-accel", accel, "-cpu", cpu, "-machine", "pc",
            "-smp", str(args.cpus), "-m", str(args.memory), "-nodefaults", "-no-reboot",
            "-display", "none", "-kernel", kernel, "-append", cmdline,
            "-initrd", write(work + "/initrd.cpio", initrd),
            "-drive", f"file={disk},format=raw,if=ide,snapshot=on"]


def hardware(wanted):
    """Whether this processor has one of the flags WANTED, and KVM can be used."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
        flags = re.search(rf"^flags\s*:.*\b({wanted})\b", f.read(), re.MULTILINE)
    return bool(flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


class Console:
    """Bytes of one serial line: shown as they come, kept, and cut into lines.

    FD is where they are shown, or None; END is text after which nothing is.
    """

    def __init__(self, fd, end=b""):
        self.fd = fd
        self.end = end
        self.data = b""
        self.rest = b""
        self.shown = 0

    def feed(self, chunk):
        """Take CHUNK; return the lines that it completed."""
        self.data += chunk
        limit = self.data.find(self.end, self.shown) if self.end else -1
        if limit < 0:
            # What may be the beginning of END waits for the rest.
            held = next((n for n in range(min(len(self.end), len(self.data)), 0, -1)
                         if self.data.endswith(self.end[:n])), 0)
            limit = len(self.data) - held
        if limit > self.shown:
            if self.fd is not None:
                write_all(self.fd, self.data[self.shown:limit].replace(b"\r", b""))
            self.shown = limit
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in lines]


def write_all(fd, data):
    """Write all of DATA to the descriptor FD."""
    while data:
        data = data[os.write(fd, data):]


class Machine:
    """One run: the emulator's process, its two serial lines, and the verdict."""

    def __init__(self, args, nonce):
        self.args = args
        self.marker = re.compile(rf"machine {nonce}: status (\d+) taint (\d+)")
        self.kernel = Console(None if args.quiet else 2)
        # init writes an empty line before its last.
        self.user = Console(1, f"\nmachine {nonce}".encode())
        self.trouble = []
        self.status = None
        self.taint = 0
        self.excused = 0
        self.powered_down = False
        self.deadline = time.monotonic() + args.timeout
        self.timed_out = False

    def kernel_line(self, line):
        """Judge a line of the kernel's."""
        known = KNOWN.get(self.args.cpu)
        if known and known.search(line):
            self.excused = 1 << 9
        elif TROUBLE.search(line):
            self.trouble.append(line)
        if "reboot: Power down" in line:
            self.powered_down = True
        if FATAL.search(line):
            self.shorten(5)

    def shorten(self, seconds):
        """Bring the deadline to at most SECONDS from now."""
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def user_line(self, line):
        """Look for the end of the command."""
        found = self.marker.search(line)
        if found:
            self.status, self.taint = int(found[1]), int(found[2])
            self.shorten(60)

    def watch(self, process, kernel_fd, user_fd, terminal):
        """Pass bytes until PROCESS ends or time runs out."""
        poll = select.poll()
        for fd in (kernel_fd, user_fd):
            poll.register(fd, select.POLLIN)
        if terminal is not None:
            poll.register(terminal, select.POLLIN)
        ended = False
        while True:
            events = poll.poll(200)
            for fd, _ in events:
                try:
                    chunk = os.read(fd, 65536)
                except (BlockingIOError, OSError):
                    chunk = b""
                if not chunk:
                    # A pseudo-terminal whose other side is closed.
                    if ended or fd == terminal:
                        poll.unregister(fd)
                    continue
                if fd == kernel_fd:
                    for line in self.kernel.feed(chunk):
                        self.kernel_line(line)
                elif fd == user_fd:
                    for line in self.user.feed(chunk):
                        self.user_line(line)
                else:
                    write_all(user_fd, chunk)
            if ended and not events:
                return
            if process.poll() is not None:
                ended = True
            elif time.monotonic() > self.deadline:
                self.timed_out = True
                process.kill()
                process.wait()
                ended = True

    def verdict(self):
        """Return the exit status and say why on stderr."""
        bad = "".join(flag for bit, flag in BAD_TAINT.items() if (self.taint & ~self.excused) >> bit & 1)
        if bad and not self.trouble:
            self.trouble.append(f"kernel tainted: {bad}")
        if self.trouble:
            say("the kernel complained:")
            for line in self.trouble[:20]:
                say("  " + line)
            return KERNEL_COMPLAINED
        if self.status is None:
            if self.timed_out:
                say(f"no end after {self.args.timeout:.0f} s")
                return TIMED_OUT
            say("the machine stopped before the command was done")
            return DIED
        if self.timed_out or not self.powered_down:
            say("the machine did not power off")
            return DIED
        if self.status:
            say(f"the command exited with {self.status}")
        return self.status


def say(text):
    """One line on stderr."""
    print(f"machine: {text}", file=sys.stderr, flush=True)


def find_kernel(args):
    """Return the bzImage and the directory of its modules (or None)."""
    directory = os.environ.get("RKVM_KERNEL_" + args.kernel.upper())
    if directory:
        image = os.path.join(directory, "bzImage")
        if not os.path.exists(image):
            sys.exit(f"machine: no {args.kernel} kernel: run scripts/setup kernel-{args.kernel}")
        return image, directory
    return args.kernel, None


def open_serial(work, interactive):
    """Make the two serial lines; return for each our descriptor and the emulator's path."""
    lines = []
    for name in ("ttyS0", "ttyS1"):
        path = os.path.join(work, name)
        if interactive and name == "ttyS1":
            ours, theirs = os.openpty()
            tty.setraw(theirs)
            lines.append((ours, os.ttyname(theirs), "term"))
        else:
            os.mkfifo(path)
            # Read and write: never an end of file, whoever opens and closes it.
            lines.append((os.open(path, os.O_RDWR | os.O_NONBLOCK), path, "file"))
    return lines


def run(args, work):
    """Boot, watch, judge."""
    kernel, kernel_dir = find_kernel(args)
    nonce = secrets.token_hex(8)
    command = args.command[0] if len(args.command) == 1 else shlex.join(args.command)
    if args.interactive:
        command = "stty -F /dev/ttyS1 sane; " + (command or "setsid -c sh -i")
    disk, insmod = make_disk(args, work, kernel_dir)
    initrd = initramfs.with_busybox(os.path.join(HERE, "init"), {
        "etc/machine": f"NONCE={nonce}\n",
        "etc/insmod": insmod,
        "etc/run": command + "\n",
    })
    # No terminals of BSD's kind: to make 256 of them is a tenth of a debug kernel's boot.
    cmdline = ("console=ttyS0,115200 nokaslr loglevel=5 printk.time=1 rdinit=/init pty.legacy_count=0 "
               + args.append).strip()
    accel = args.accel
    if args.debugger:
        accel = "bochs"
    elif accel == "auto":
        # What is emulated by default has VMX: so must the real thing.
        accel = "kvm" if not args.cpu and hardware("vmx") else "bochs"
    elif accel == "kvm" and not hardware("vmx|svm"):
        sys.exit("machine: --accel kvm: the processor shows neither vmx nor svm, or /dev/kvm is not "
                 "there to open")

    lines = open_serial(work, args.interactive)
    if accel == "bochs":
        serial = [f"mode={mode}, dev={path}" for _, path, mode in lines]
        argv = bochs_command(args, work, kernel, cmdline, initrd, disk, serial)
    else:
        argv = qemu_command(args, work, kernel, cmdline, initrd, disk, accel)
        for number, (_, path, mode) in enumerate(lines):
            kind = "serial" if mode == "term" else "file"
            argv += ["-chardev", f"{kind},id=s{number},path={path}", "-serial", f"chardev:s{number}"]

    machine = Machine(args, nonce)
    out = None if args.debugger else open(work + "/emulator.out", "wb")
    terminal = saved = None
    if args.interactive and sys.stdin.isatty():
        terminal = sys.stdin.fileno()
        saved = termios.tcgetattr(terminal)
    process = subprocess.Popen(argv, stdin=None if args.debugger else subprocess.DEVNULL,
                               stdout=out, stderr=out, cwd=work,
                               start_new_session=not args.debugger)
    if args.debugger:
        # Ctrl-C is the debugger's.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if saved:
            tty.setraw(terminal)
        machine.watch(process, lines[0][0], lines[1][0], terminal)
    finally:
        if saved:
            termios.tcsetattr(terminal, termios.TCSADRAIN, saved)
        if process.poll() is None:
            process.kill()
        if out:
            out.close()
    status = machine.verdict()
    if args.quiet and machine.trouble:
        write_all(2, machine.kernel.data.replace(b"\r", b""))
    if status == DIED:
        say(f"the emulator's exit status was {process.returncode}")
        report_emulator(work)
    if args.log:
        keep_logs(args.log, work, machine)
    return status


def report_emulator(work):
    """Show what the emulator said when it stopped."""
    for name in ("bochs.log", "emulator.out"):
        path = os.path.join(work, name)
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                f.seek(0, os.SEEK_END)
                f.seek(max(0, f.tell() - 100000))
                tail = [l.rstrip() for l in f if "PANIC" in l or name == "emulator.out"]
            for line in tail[-8:]:
                say(line)


def keep_logs(directory, work, machine):
    """Put what helps to find a fault into DIRECTORY."""
    os.makedirs(directory, exist_ok=True)
    for name in ("bochs.log", "bochsrc", "emulator.out"):
        path = os.path.join(work, name)
        if os.path.exists(path):
            shutil.copy(path, directory)
    write(os.path.join(directory, "kernel.console"), machine.kernel.data)
    write(os.path.join(directory, "command.console"), machine.user.data)
    say(f"logs are in {directory}")


def main():
    """Make a private work directory, run, clean up."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work = tempfile.mkdtemp(prefix="rkvm-machine-")
    try:
        sys.exit(run(args, work))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
