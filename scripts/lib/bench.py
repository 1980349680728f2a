# SPDX-License-Identifier: GPL-2.0
"""What processes and memory cost in a Linux guest on kvm-intel and on rkvm, for scripts/bench.

Usage: bench.py TREE [--ept=0] [--kernel=KERNEL] [--verbose]

A small guest (scripts/guest/tiny) boots on each device in turn, in one boot of the emulated machine with
one CPU, measures, and has the VMM tell what KVM counted meanwhile. KERNEL is one of guests.TINY.
"""

import os
import re
import subprocess
import sys
import tempfile

import guests

HERE = os.path.dirname(os.path.abspath(__file__))
DEVICES = ("kvm", "rkvm")
# What the rows are; scripts/guest/tiny/rows.c has them.
WHAT = {
    "syscall": "system call",
    "switch": "byte to another process and back",
    "fork": "fork, exit, wait",
    "fork-exec": "fork, exec, exit, wait",
    "map-touch-16": "mmap of 16 pages, a write to each, munmap",
    "touch": "first write to a page",
    "protect": "mprotect to read-only and back, a write",
}


class Row:
    """A row on one device: ticks a turn, and counts a turn by name."""

    def __init__(self, turns, ticks, begin, end):
        self.ticks = ticks / turns
        self.counts = {name: (end[name] - begin.get(name, 0)) / turns for name in end}


def parse(text):
    """The rows in what a guest and its VMM wrote, by name."""
    marks = {}
    for number, counts in re.findall(r"^mark (\d+): (.*)$", text, re.MULTILINE):
        marks[int(number)] = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", counts)}
    rows = {}
    for number, name, turns, ticks in re.findall(r"^guest \w+: row (\d+) (\S+) (\d+) (\d+)$", text,
                                                 re.MULTILINE):
        begin, end = marks.get(2 * int(number), {}), marks.get(2 * int(number) + 1, {})
        rows[name] = Row(int(turns), int(ticks), begin, end)
    return rows


def figure(value):
    """VALUE with as many digits as say something."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def show(found, verbose):
    """Print the table; with VERBOSE, what else was counted."""
    print("| row | kvm-intel | rkvm | ratio | exits kvm-intel | exits rkvm | what |")
    print("|---|---|---|---|---|---|---|")
    for name, what in WHAT.items():
        kvm, rkvm = (found[device].get(name) for device in DEVICES)
        if not kvm or not rkvm:
            print(f"| `{name}` | - | - | - | - | - | {what} |")
            continue
        print(f"| `{name}` | {kvm.ticks:.0f} | {rkvm.ticks:.0f} | {rkvm.ticks / kvm.ticks:.3f} "
              f"| {figure(kvm.counts.get('exits'))} | {figure(rkvm.counts.get('exits'))} | {what} |")
    if not verbose:
        return
    for name in WHAT:
        counts = [found[device][name].counts if name in found[device] else {} for device in DEVICES]
        print(f"\n{name}, a turn:")
        for what in sorted(set(counts[0]) | set(counts[1])):
            values = [c.get(what) for c in counts]
            if any(value is not None and 0.01 <= value < 1e6 for value in values):
                print(f"  {what:32} {figure(values[0]):>10} {figure(values[1]):>10}")


def main():
    """Run both guests, show the table."""
    tree, *words = sys.argv[1:]
    kernel = next((w.partition("=")[2] for w in words if w.startswith("--kernel=")), "x86_64")
    if kernel not in guests.TINY:
        sys.exit(f"bench: no kernel {kernel}; there are {', '.join(guests.TINY)}")
    parameters = " ept=0" if "--ept=0" in words else ""
    with tempfile.TemporaryDirectory(prefix="rkvm-bench-") as work:
        script = []
        for device in DEVICES:
            guest = guests.Tiny(kernel, "kernel", append="loglevel=5 rkvm.rows")
            guest.stage(tree, work)
            script += [f"echo; echo 'device {device}'", guest.command("/dev/" + device, 600) + " 2>&1 || exit"]
        run = subprocess.run(
            [sys.executable, HERE + "/machine.py", "--accel", "bochs", "--quiet", "--timeout", "900",
             "--insmod", "kvm-intel" + parameters, "--insmod", "rkvm" + parameters,
             "--module", tree + "/build/module-plain/rkvm.ko",
             "--data", tree + "/build/bin/rkvm-vmm", "--data", work + ":tiny", "--", "\n".join(script)],
            stdout=subprocess.PIPE, text=True, errors="replace", check=False)
    output = run.stdout.replace("\r", "")
    if run.returncode or output.count("rows done") != len(DEVICES):
        print(output, file=sys.stderr)
        sys.exit(run.returncode or 1)
    print(f"\nA Linux guest ({kernel}{', both modules with ept=0' if parameters else ''}): instructions a "
          "turn, and exits\n")
    parts = re.split(r"^device (\w+)$", output, flags=re.MULTILINE)
    show({device: parse(text) for device, text in zip(parts[1::2], parts[2::2])}, "--verbose" in words)


if __name__ == "__main__":
    main()
