# SPDX-License-Identifier: GPL-2.0
"""The kernel's own KVM selftests on kvm-intel and on rkvm, for scripts/selftests.

Usage: kselftests.py TREE [--ept=0] [--record] [PATTERN]

scripts/kselftests/list says what is run, scripts/kselftests/expected what comes
of it; with --ept=0 both modules are loaded so, and it is expected-shadow that
says. The programs are unmodified.
"""

import os
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
DEVICES = ("kvm", "rkvm")
MEMORY = 2048
# A machine that is busy for so many seconds of ours for each of its own hangs.
PATIENCE = 12
# Some programs say so, and end with 0.
NOT_RUN = re.compile(r"^(.*), skipping test$", re.MULTILINE)
GROUPS = {"memory": "Memory", "x86": "Other tests for x86", "not": "Not run"}

# Statuses of the programs: kselftest.h; 124 is kselftest-run's.
SKIPPED = 4
LATE = 124


class Flavour:
    """A way to load both modules, and where what comes of it is written down."""

    def __init__(self, name, insmod):
        self.name = name
        self.insmod = insmod
        suffix = f"-{name}" if name else ""
        self.expected = "scripts/kselftests/expected" + suffix
        self.logs = "build/kselftests" + suffix
        # Around its tables in Documentation/kselftests.rst.
        self.begin, self.end = (f".. tables{suffix} {edge}\n" for edge in ("begin", "end"))


EPT = Flavour("", ("kvm-intel", "rkvm"))
# Programs ask kvm-intel's parameters what to expect of either.
SHADOW = Flavour("shadow", ("kvm-intel ept=0", "rkvm ept=0"))


class Case:
    """A line of the list: one program with its arguments."""

    def __init__(self, group, seconds, options, words, remark):
        self.group = group
        self.seconds = seconds
        self.cpus = 2 if "2cpu" in options else 1
        self.huge = next((o.partition("=")[2] for o in options if o.startswith("huge=")), "64")
        self.words = words
        self.remark = remark
        self.name = " ".join(words)

    def command(self, device):
        """The words that run it in the machine."""
        program, *arguments = self.words
        return ["./kselftest-run", device, str(self.seconds), self.huge, "bin/" + program,
                *arguments]


def read_list(tree):
    """The cases of scripts/kselftests/list, in its order."""
    cases = []
    with open(os.path.join(tree, "scripts/kselftests/list"), encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            line, _, remark = line.partition("#")
            if not line.strip():
                continue
            group, how, *words = line.split()
            seconds, *options = how.split(",")
            if group not in GROUPS or not words or not all(
                    re.fullmatch(r"2cpu|huge=\d+", option) for option in options):
                sys.exit(f"scripts/kselftests/list:{number}: not understood")
            seconds = 0 if group == "not" else int(seconds)
            cases.append(Case(group, seconds, options, words, remark.strip()))
    return cases


def payload():
    """What a machine that runs them has in /data."""
    return [os.environ["RKVM_KSELFTESTS"], HERE + "/kselftest-run"]


def check_list(cases, directory):
    """Every program that was built must be in the list, and the other way round."""
    built = {os.path.relpath(os.path.join(where, name), directory)
             for where, _, names in os.walk(directory) for name in names}
    listed = {case.words[0] for case in cases}
    for name in sorted(built ^ listed):
        print(f"{name}: {'built, but not in the list' if name in built else 'not built'}")
    if built != listed:
        sys.exit(1)


class Outcome:
    """What came of a case on one device."""

    def __init__(self, verdict, why="", lines=()):
        self.verdict = verdict
        self.why = why
        self.lines = lines

    @classmethod
    def of(cls, status, lines):
        """Judge a program by its exit STATUS and the LINES that it wrote."""
        text = "\n".join(lines)
        if status == 0:
            found = NOT_RUN.search(text)
            return cls("skip", found[1], lines) if found else cls("pass", "", lines)
        if status == SKIPPED:
            found = re.findall(r"# SKIP (?:- )?(?:Requirement not met: )?(.*)$", text, re.MULTILINE)
            return cls("skip", found[-1] if found else lines[-1] if lines else "", lines)
        if status == LATE:
            return cls("timeout", "", lines)
        found = re.search(r"==== Test Assertion Failure ====\n\s*(.*)$", text, re.MULTILINE)
        return cls("FAIL", found[1] if found else f"exit status {status}", lines)


class Boot:
    """One boot of a machine with some number of CPUs, which runs cases until it ends.

    WORK is pairs of a case and a device. What the programs write is added to LOG.log, what the
    kernel says is in LOG.kernel.log.
    """

    def __init__(self, tree, cpus, work, log, insmod):
        self.tree = tree
        self.insmod = insmod
        self.cpus = cpus
        self.work = work
        self.log = log
        self.complaints = []

    def run(self, outcome):
        """Run the work; hand OUTCOME(case, device, Outcome) what comes of each.

        Return what was not begun.
        """
        nonce = secrets.token_hex(8)
        script = []
        for number, (case, device) in enumerate(self.work):
            # The machine holds a newline back until more comes.
            script += [f"echo; echo '{nonce} begin {number}'; echo", shlex.join(case.command(device)),
                       f"s=$?; echo; echo \"{nonce} end {number} $s\""]
        command = [sys.executable, HERE + "/machine.py", "--cpus", str(self.cpus),
                   "--memory", str(MEMORY), "--timeout", "86400",
                   "--module", self.tree + "/build/module-plain/rkvm.ko"]
        for item in payload():
            command += ["--data", item]
        for module in self.insmod:
            command += ["--insmod", module]
        with open(self.log + ".log", "ab") as f, open(self.log + ".kernel.log", "wb") as kernel:
            process = subprocess.Popen([*command, "--", "\n".join(script) + "\nexit 0\n"],
                                       stdout=subprocess.PIPE, stderr=kernel)
            rest = self.follow(process, nonce, f, outcome)
            status = process.wait()
        if status == 120:
            self.complaints = self.blame()
        return rest

    def follow(self, process, nonce, log, outcome):
        """Take the output of PROCESS apart; end it if nothing comes of a case."""
        mark = re.compile(rf"^{nonce} (begin|end) (\d+)(?: (\d+))?$")
        current, lines, timer = None, [], None

        def watch(seconds):
            nonlocal timer
            if timer:
                timer.cancel()
            timer = threading.Timer(seconds, process.terminate)
            timer.start()

        done = 0
        watch(300)
        for raw in process.stdout:
            log.write(raw)
            log.flush()
            line = raw.decode(errors="replace").rstrip("\r\n")
            found = mark.match(line)
            if not found:
                if line.strip():
                    lines.append(line)
            elif found[1] == "begin":
                current, lines = int(found[2]), []
                watch(self.work[current][0].seconds * PATIENCE + 60)
            else:
                case, device = self.work[current]
                outcome(case, device, Outcome.of(int(found[3]), lines))
                current, done = None, int(found[2]) + 1
                watch(300)
        timer.cancel()
        if current is not None:
            case, device = self.work[current]
            outcome(case, device, Outcome("HANG", "the machine hung or stopped", lines))
            done = current + 1
        elif done == 0:
            sys.exit(f"the machine ran nothing; see {self.log}.kernel.log")
        return self.work[done:]

    def blame(self):
        """What the kernel complained of, and during which case, from the log."""
        with open(self.log + ".kernel.log", encoding="utf-8", errors="replace") as f:
            text = f.read().splitlines()
        start = max(n for n, line in enumerate(text) if "machine: the kernel complained" in line)
        out = []
        for line in text[start + 1:]:
            if not line.startswith("machine:   "):
                break
            line = line.removeprefix("machine:   ")
            where = "boot"
            for earlier in text[:start]:
                found = re.search(r"kselftest: (.*)$", earlier)
                where = found[1] if found else where
                if earlier.endswith(line):
                    break
            out.append(f"{where}: {line}")
        return out


class Results:
    """Outcomes by case and device."""

    def __init__(self):
        self.outcomes = {}
        self.began = time.monotonic()

    def take(self, case, device, outcome):
        """Record and show one."""
        self.outcomes[case.name, device] = outcome
        now = time.monotonic()
        print(f"{now - self.began:5.0f} s  {device:4}  {outcome.verdict:13}  {case.name}"
              + (f"  ({outcome.why})" if outcome.why else ""), flush=True)
        if outcome.verdict in ("FAIL", "timeout", "HANG"):
            for line in [l for l in outcome.lines if "addr2line" not in l and "0x0000" not in l][-8:]:
                print(f"           | {line}")

    def verdicts(self, case):
        """The verdicts for CASE, kvm-intel first; None where it did not run."""
        return [getattr(self.outcomes.get((case.name, d)), "verdict", None) for d in DEVICES]


def read_expected(tree, flavour):
    """What FLAVOUR's file says: name to (verdict on kvm, on rkvm, why)."""
    out = {}
    path = os.path.join(tree, flavour.expected)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for line in f:
                if line.strip() and not line.startswith("#"):
                    name, kvm, rkvm, why = [field.strip() for field in line.split("|")]
                    out[name] = (kvm, rkvm, why)
    return out


def write_expected(tree, flavour, cases, expected):
    """Write what was found, in the list's order."""
    with open(os.path.join(tree, flavour.expected), "w", encoding="utf-8") as f:
        f.write("# Written by scripts/selftests --record. PROGRAM ARGUMENTS | on kvm-intel | on rkvm | why\n")
        for case in cases:
            if case.name in expected:
                f.write(" | ".join((case.name, *expected[case.name])).rstrip() + "\n")


def simple_table(rows):
    """ROWS, the first of which is the heading, as a table of reStructuredText."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    rule = " ".join("=" * width for width in widths)
    lines = [" ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [rule, lines[0], rule, *lines[1:], rule]


def write_document(tree, flavour, cases, expected):
    """Put the tables between FLAVOUR's markers of Documentation/kselftests.rst."""
    path = os.path.join(tree, "Documentation/kselftests.rst")
    lines = []
    for group, title in GROUPS.items():
        # What is not run is so for any flavour.
        if group == "not" and flavour is not EPT:
            continue
        rows = [("test", "reason")] if group == "not" else [("test", "kvm-intel", "rkvm", "remark")]
        for case in cases:
            if case.group != group:
                continue
            if group == "not":
                rows.append((f"``{case.name}``", case.remark or "-"))
            elif case.name in expected:
                kvm, rkvm, why = expected[case.name]
                why = f"``{why}``" if why else ""
                rows.append((f"``{case.name}``", kvm, rkvm, case.remark or why))
        if flavour is not EPT:
            title += ", without EPT"
        lines += ["", title, "-" * len(title), "", *simple_table(rows)]
    with open(path, encoding="utf-8") as f:
        text = f.read()
    head, begin, rest = text.partition(flavour.begin)
    _, end, tail = rest.partition(flavour.end)
    if not begin or not end:
        sys.exit(f"{path} has no place for the tables")
    with open(path, "w", encoding="utf-8") as f:
        f.write(head + begin + "\n".join(lines) + "\n\n" + end + tail)


def main():
    """Run what is wanted, compare or record."""
    tree, *words = sys.argv[1:]
    record = "--record" in words
    flavour = SHADOW if "--ept=0" in words else EPT
    pattern = re.compile(next((w for w in words if not w.startswith("--")), ""))
    cases = read_list(tree)
    check_list(cases, os.environ["RKVM_KSELFTESTS"] + "/bin")
    wanted = [c for c in cases if c.group != "not" and pattern.search(f"{c.group}/{c.name}")]
    logs = os.path.join(tree, flavour.logs)
    os.makedirs(logs, exist_ok=True)
    results = Results()
    complaints = []
    for cpus in (1, 2):
        work = [(case, device) for case in wanted if case.cpus == cpus for device in DEVICES]
        log = os.path.join(logs, f"{cpus}cpu")
        if work:
            with open(log + ".log", "wb"):
                pass
        while work:
            boot = Boot(tree, cpus, work, log, flavour.insmod)
            work = boot.run(results.take)
            complaints += boot.complaints

    expected = read_expected(tree, flavour)
    worse, better = [], []
    rows = [("test", "kvm-intel", "rkvm", "remark")]
    for case in wanted:
        found = results.verdicts(case)
        before = list(expected.get(case.name, ("-", "-", ""))[:2])
        why = getattr(results.outcomes[case.name, "rkvm"], "why", "")
        rows.append((case.name, *found, case.remark or why))
        for device, was, now in zip(DEVICES, before, found):
            if was == "pass" != now:
                worse.append(f"{case.name}: {now} on {device}, expected to pass")
            elif was != now:
                better.append(f"{case.name}: {now} on {device}, was {was}")
        if record:
            skip = why.replace("|", "/") if found[1] == "skip" else ""
            expected[case.name] = (*found, skip)
    print("\n" + "\n".join(simple_table(rows)))
    if record:
        write_expected(tree, flavour, cases, expected)
        write_document(tree, flavour, cases, expected)
    else:
        for line in better:
            print(f"changed: {line}")
        for line in worse:
            print(f"WORSE: {line}")
    for line in complaints:
        print(f"the kernel complained: {line}")
    good = sum(results.verdicts(case)[1] == "pass" for case in wanted)
    both = sum(results.verdicts(case) == ["pass", "pass"] for case in wanted)
    on_kvm = sum(results.verdicts(case)[0] == "pass" for case in wanted)
    print(f"{len(wanted)} run; {on_kvm} pass on kvm-intel, {good} on rkvm, {both} on both")
    sys.exit(1 if complaints or (worse and not record) else 0)


if __name__ == "__main__":
    main()
