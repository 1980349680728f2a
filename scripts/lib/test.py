# SPDX-License-Identifier: GPL-2.0
"""The whole test suite, or what a pattern names, for scripts/test.

Usage: test.py TREE [PATTERN]

A test's name is PLACE/.../TEST: host/CRATE/TEST for unit tests on this machine,
JOB/DEVICE/PROGRAM/TEST for the selftests in an emulated machine,
guest/KERNEL/DEVICE for Linux in the sample VMM, guest/GROUP/DEVICE/GUEST for small guests of 32 and 64 bits, smp-Ncpu/DEVICE/KERNEL-IRQCHIP-CPUS for the same on
more processors and with disks, qemu-Ncpu/DEVICE/qemu/TEST for QEMU, and kselftests/PROGRAM ARGUMENTS for the kernel's own KVM selftests
on rkvm (kselftests-2cpu with two CPUs). PATTERN is a regular
expression searched in it. testbed/TEST is about the testbed itself. Every job adds JOB/machine: its kernel complained of
nothing and powered off. RKVM_NOT_BUILT names what did not build.
"""

import concurrent.futures
import functools
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
import unittest

import guests
import kselftests
import tap

HERE = os.path.dirname(os.path.abspath(__file__))
TARGET = "x86_64-unknown-linux-gnu"
# Unit tests of Python modules beside this one.
PYTHON = ("test_guests", "test_tap")
CRATES = {"x86": "rust/x86", "vmm": "samples/rkvm-vmm", "selftests": "selftests"}
# What of them has unit tests, where most has none: each of the selftests' programs would be built once more.
TARGETS = {"selftests": ["--lib"]}
DEVICES = {"kvm": "/dev/kvm", "rkvm": "/dev/rkvm"}
# Binaries of the selftests that are not tests.
NOT_TESTS = {"bench"}
# What needs a job of its own, for what it needs on the disk.
QEMU = "qemu"
# Tests of our module's own life make no sense elsewhere.
RKVM_ONLY = {"module"}
# Programs that have boots of their own: they take long, and do to the machine's memory what other
# tests need not suffer.
STRESS = {"faults", "stress", "userfault"}
# Programs to look for leaks behind: those that make and drop what the module allocates. kmemleak
# doubles the time of everything, and guests' instructions allocate nothing.
LEAKS = {"coalesced", "irqchip", "irqfd", "lifecycle", "module", "pit",
         "prefault", "robustness", "routing", "smoke", "stats", "system", "vcpu", "vm"}
# Programs that put the machine to sleep and take its processors away: in boots of their own too.
POWER = {"hotplug", "power"}
# Modules that the first need, and what the kernel is told for them.
STRESS_MODULES = ("kvm-intel", "rkvm", "zram")
STRESS_SHADOW = ("kvm-intel", "rkvm ept=0", "zram")
# rkvm without EPT, with shadow page tables; kvm-intel as it is, beside it.
SHADOW = ("kvm-intel", "rkvm ept=0")
# The same with the oracle, at each page fault.
AUDITED = ("kvm-intel", "rkvm ept=0 mmu_audit=1")
# Programs whose matter a second CPU changes. The others are about one vCPU, and run on one CPU only.
SMP_PROGRAMS = {"accounting", "adversary", "apic_timer", "concurrency", "dirty", "dirty_ring", "dirty_writes", "interrupts",
                "ioeventfd", "ipi", "irqfd", "isolation", "kvmclock", "lifecycle", "memory", "migrate", "msr_filter",
                "paging_smp", "prefault", "pv", "regions", "robustness", "routing", "signals", "smp", "state", "tsc"}
# On the debug kernel, which is slow: what is about locks. The rest of them, and all others, run there on one CPU.
SMP_DEBUG = {"concurrency", "dirty_ring", "interrupts", "ipi", "memory", "paging_smp", "signals", "smp"}
# Programs that take their time on the debug kernel, and are on it only when all is wanted.
LONG = {"accounting", "dirty", "dirty_writes", "migrate"}
# Programs about what instructions do in a guest, and not about the kernel under it: not on the debug kernel.
INSTRUCTIONS = {"cpu", "exceptions", "features", "fpu", "mmio_insns", "mmio_system"}
# Programs about what the guest's page tables have no part in: not once more without EPT.
NO_TABLES = {"accounting", "apic_timer", "coalesced", "cpuid", "ioapic", "ioeventfd", "irqchip", "irqfd", "kvmclock", "lapic",
             "lapic_order", "lifecycle", "mce", "module", "msr_filter", "pic", "pit", "routing", "system", "tsc"}
# Programs that take their time, and are about how the module stands what is done to it: kvm-intel is asked when all
# is wanted.
LONG_ON_KVM = STRESS | {"accounting", "adversary", "lifecycle", "migrate", "robustness"}
# Thousands of programs for the guest: too many for the debug kernel.
MANY = {"nr_mmu_pages", "paging"}
# Allocations that fail: on the debug kernel, which has fault injection.
INJECTED = {"enomem"}
# What the oracle looks at; and what is about memory and concurrency, for two CPUs and for the debug kernel.
SHADOW_AUDIT = {"modes", "paging", "paging_smp"}
SHADOW_SMP = {"concurrency", "dirty", "dirty_ring", "dirty_writes", "ipi", "memory", "paging_smp", "regions", "smp"}
SHADOW_DEBUG = {"memory", "modes", "paging_smp", "smoke"}
ONLY = {"shadow-audit": SHADOW_AUDIT, "shadow-2cpu": SHADOW_SMP, "shadow-debug": SHADOW_DEBUG,
        "plain-2cpu": SMP_PROGRAMS, "debug-2cpu": SMP_DEBUG, "debug-leaks": LEAKS}
# Long: the oracle's job has the paging programs, and what migrates is in the dirty logs' programs too.
NOT = {"shadow-1cpu": NO_TABLES | {"migrate", "paging"}, "debug-1cpu": SMP_DEBUG | LEAKS | MANY | LONG | INSTRUCTIONS}
# make test-full; Documentation/testing.rst has what it adds.
FULL = bool(os.environ.get("RKVM_TEST_FULL"))
# A processor whose VMX has no EPT, no VPID and no unrestricted guests.
CORE2 = "core2_penryn_t9600"
CORE2_PROGRAMS = {"interrupts", "memory", "mmio", "modes", "pio", "smoke", "vcpu", "vm"}
# EPT without unrestricted guests: real mode is VM86's, over the identity map.
RESTRICTED = ("kvm-intel", "rkvm unrestricted_guest=0")
RESTRICTED_PROGRAMS = {"modes", "smoke"}
# Seconds from which on a program is named with the time of its job.
SLOW_STEP = 8
STRESS_APPEND = "proc_mem.force_override=always"


class Suite:
    """What every job needs to know."""

    def __init__(self, tree, pattern):
        self.tree = tree
        self.pattern = re.compile(pattern or "")
        self.report = tap.Report()
        self.logs = os.path.join(tree, "build/test")
        self.not_built = set(os.environ.get("RKVM_NOT_BUILT", "").split(","))
        os.makedirs(self.logs, exist_ok=True)

    def elsewhere(self, place):
        """Whether the pattern plainly names another PLACE: then nothing need be built to list."""
        head, slash, _ = self.pattern.pattern.partition("/")
        return bool(slash) and re.fullmatch(r"[\w-]+", head) is not None and head not in place

    def wants(self, name):
        """Whether the pattern selects the test NAME."""
        return bool(self.pattern.search(name))


def unit_tests(suite, crate):
    """Run the unit tests of CRATE on this machine."""
    prefix = f"host/{crate}"
    if suite.elsewhere(prefix):
        return
    log = os.path.join(suite.logs, f"host-{crate}.log")
    env = dict(os.environ, CARGO_TARGET_DIR=os.path.join(suite.tree, "build/host-" + crate))
    package = ["--locked", "--manifest-path", os.path.join(suite.tree, CRATES[crate], "Cargo.toml")]
    command = ["cargo", "test", *package, *TARGETS.get(crate, [])]
    if crate in TARGETS:
        # Tests run them. What is wrong with one of them shows there.
        subprocess.run(["cargo", "build", *package, "--quiet", "--examples"], env=env, check=False)
    listing = subprocess.run([*command, "--", "--list"], env=env, text=True, check=False,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if listing.returncode:
        with open(log, "w", encoding="utf-8") as f:
            f.write(listing.stdout)
        suite.report.result(f"{prefix}/build", False, why=listing.stdout.splitlines()[-30:])
        return
    names = re.findall(r"^(.*): test$", listing.stdout, re.MULTILINE)
    wanted = [name for name in names if suite.wants(f"{prefix}/{name}")]
    if not wanted:
        return
    # Names repeat between the binaries of a package (a test of the library may be one of the
    # program too): count, do not look up.
    words = [] if len(wanted) == len(names) else ["--exact", *wanted]
    run = subprocess.run([*command, "--no-fail-fast", "--", *words], env=env, text=True, check=False,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    with open(log, "w", encoding="utf-8") as f:
        f.write(run.stdout)
    missing = list(wanted)
    failed = 0
    # A test's own output may come before the verdict, on the same line.
    for name, verdict in re.findall(r"^test (.*?)(?: - should panic)? \.\.\. .*?"
                                    r"(ok|FAILED|ignored)\b[^\n]*$", run.stdout, re.MULTILINE):
        if name in missing:
            missing.remove(name)
        why = []
        if verdict == "FAILED":
            failed += 1
            found = re.search(rf"^---- {re.escape(name)} stdout ----\n(.*?)\n\n", run.stdout,
                              re.MULTILINE | re.DOTALL)
            why = found[1].splitlines()[:30] if found else []
        suite.report.result(f"{prefix}/{name}", verdict != "FAILED",
                            "ignored" if verdict == "ignored" else None, why)
    for name in missing:
        suite.report.result(f"{prefix}/{name}", False, why=["not reported", f"see {log}"])
    if run.returncode and not failed and not missing:
        suite.report.result(f"{prefix}/exit", False, why=[f"cargo test: {run.returncode}", f"see {log}"])


def python_tests(suite):
    """Run the testbed's own unit tests."""
    for module in PYTHON:
        for case in unittest.defaultTestLoader.loadTestsFromName(module):
            for test in case:
                name = f"host/testbed/{test.id()}"
                if suite.wants(name):
                    result = unittest.TestResult()
                    test.run(result)
                    why = [line for _, text in result.errors + result.failures
                           for line in text.splitlines()]
                    suite.report.result(name, result.wasSuccessful(), why=why)


class Step:
    """A command of a job, and what becomes of its output."""

    def __init__(self, command, sink):
        self.command = command
        self.sink = sink
        self.began = None
        self.seconds = None


class Check:
    """Sink of a command that is one test: it passes by its status, and by ALSO(output)."""

    def __init__(self, suite, name, also=None):
        self.suite = suite
        self.name = name
        self.also = also
        self.lines = []

    def line(self, text):
        """Take a line of output."""
        self.lines.append(text)

    def end(self, status):
        """The command ended with STATUS; None: it did not."""
        why = None
        if status is None:
            why = "did not end"
        elif status:
            why = f"exit status {status}"
        elif self.also and not self.also("\n".join(self.lines)):
            why = "the line to look for is not in the output"
        self.suite.report.result(self.name, why is None, why=[*self.lines[-25:], why] if why else ())


class Job:
    """One boot of the machine, with the steps to run in it."""

    def __init__(self, suite, name, *, kernel="plain", cpus=1, memory=1024, timeout=600,
                 insmod=("kvm-intel", "rkvm"), append="", cpu=None):
        self.suite = suite
        self.name = name
        self.kernel = kernel
        self.options = ["--kernel", kernel, "--cpus", str(cpus), "--memory", str(memory),
                        "--timeout", str(timeout), f"--append={append}",
                        *(["--cpu", cpu] if cpu else [])]
        self.insmod = insmod
        self.steps = []
        self.data = []

    def add(self, command, sink):
        """Run COMMAND in the machine; SINK takes its lines and its end."""
        self.steps.append(Step(command, sink))

    def check(self, test, command, also=None):
        """A COMMAND that is one test, if it is wanted."""
        name = f"{self.name}/{test}"
        if self.suite.wants(name):
            self.add(command, Check(self.suite, name, also))

    def module(self):
        """Our module's file in the machine, and the parameters that it is loaded with; None if it is
        not loaded."""
        for item in self.insmod:
            name, *parameters = item.split()
            if name == "rkvm":
                return " ".join(["/data/modules/rkvm.ko", *parameters])
        return None

    def missing(self):
        """What this job needs and was not built."""
        needs = {"user"} | ({f"module-{self.kernel}"} if self.module() else set())
        return needs & self.suite.not_built

    def run(self):
        """Boot, run the steps, give their output to the sinks, judge the machine."""
        if not self.steps:
            return
        suite = self.suite
        if self.missing():
            why = [f"not run: {', '.join(sorted(self.missing()))} did not build"]
            suite.report.result(f"{self.name}/machine", False, why=why)
            return
        nonce = secrets.token_hex(8)
        script = ["export HOME=/tmp"]
        for number, step in enumerate(self.steps):
            script += [f"echo; echo '{nonce} begin {number}'",
                       f"( {step.command}\n)", f"s=$?; echo; echo \"{nonce} end {number} $s\""]
        command = [sys.executable, HERE + "/machine.py", *self.options]
        if self.module():
            command += ["--module", f"{suite.tree}/build/module-{self.kernel}/rkvm.ko"]
        for module in self.insmod:
            command += ["--insmod", module]
        for item in self.data:
            command += ["--data", item]
        log = os.path.join(suite.logs, self.name.replace("/", "-") + ".log")
        began = time.monotonic()
        suite.report.note(f"{self.name}: started; log in {os.path.relpath(log, suite.tree)}")
        with open(log, "wb") as f:
            process = subprocess.Popen([*command, "--", "\n".join(script) + "\nexit 0\n"],
                                       stdout=subprocess.PIPE, stderr=f)
            self.follow(process.stdout, f, nonce)
            status = process.wait()
        for step in self.steps:
            if step.seconds is None:
                step.sink.end(None)
        why = []
        if status:
            with open(log, "rb") as f:
                text = f.read().decode(errors="replace").splitlines()
            why = [line for line in text if line.startswith("machine:")] + [f"status {status}; see {log}"]
        suite.report.result(f"{self.name}/machine", status == 0, why=why)
        suite.report.note(f"{self.name}: {time.monotonic() - began:.0f} s{self.slowest()}")

    def slowest(self):
        """The steps that took a good part of the job's time, in words."""
        slow = sorted((step for step in self.steps if (step.seconds or 0) >= SLOW_STEP),
                      key=lambda step: -step.seconds)
        return "".join(f"; {step.sink.name} {step.seconds:.0f}" for step in slow)

    def follow(self, stream, log, nonce):
        """Hand the lines of STREAM to the steps that wrote them."""
        mark = re.compile(rf"^{nonce} (begin|end) (\d+)(?: (\d+))?$")
        current = None
        for raw in stream:
            log.write(raw)
            log.flush()
            line = raw.decode(errors="replace").rstrip("\r\n")
            found = mark.match(line)
            if not found:
                if current:
                    current.sink.line(line)
                continue
            step = self.steps[int(found[2])]
            if found[1] == "begin":
                current = step
                step.began = time.monotonic()
            else:
                current = None
                step.seconds = time.monotonic() - step.began
                step.sink.end(int(found[3]))


def selftest_programs(suite):
    """The selftests' programs and the names of their tests."""
    directory = os.path.join(suite.tree, "build/bin/selftests")
    programs = {}
    if "user" in suite.not_built or not os.path.isdir(directory):
        return programs
    for name in sorted(set(os.listdir(directory)) - NOT_TESTS):
        listing = subprocess.run([os.path.join(directory, name), "--list"], check=True,
                                 capture_output=True, text=True)
        programs[name] = listing.stdout.split()
    return programs


def selftests(suite, job, programs, devices, slow=1):
    """Add the selftests on DEVICES to JOB."""
    job.data.append(os.path.join(suite.tree, "build/bin/selftests"))
    for program, tests in programs.items():
        for device in devices:
            if device == "kvm" and (program in RKVM_ONLY or program in LONG_ON_KVM and not FULL):
                continue
            prefix = f"{job.name}/{device}/{program}"
            wanted = [t for t in tests if suite.wants(f"{prefix}/{t}")]
            if not wanted:
                continue
            words = ["./" + program, "--device", DEVICES[device], "--slow", str(slow)]
            if device == "rkvm":
                words += ["--module", job.module()]
            expected = wanted
            if len(wanted) < len(tests):
                words += wanted
                # The program takes a name for all names that contain it.
                expected = [t for t in tests if any(w in t for w in wanted)]
            job.add(shlex.join(words), tap.Program(suite.report, prefix, expected))


def life_cycle(job):
    """The module leaves, comes back and leaves again; nothing of it stays."""
    # A parameter that is not known is nothing but a line in the log.
    if " " in job.module():
        job.check("parameters", "! dmesg | grep 'rkvm: unknown parameter'")
    job.check("unload", "rmmod rkvm && test ! -e /dev/rkvm && test ! -e /sys/module/rkvm")
    job.check("reload", "if test -e /sys/module/rkvm; then rmmod rkvm; fi; "
              f"insmod {job.module()} && test -c /dev/rkvm && rmmod rkvm")


def only(programs, names):
    """Those of PROGRAMS that are among NAMES."""
    return {program: tests for program, tests in programs.items() if program in names}


def power_job(suite, programs, name, devices, **options):
    """A boot whose machine sleeps, and at last powers off, under running guests."""
    job = Job(suite, name, cpus=2, insmod=tuple({"kvm": "kvm-intel", "rkvm": "rkvm"}[device]
                                                for device in devices), **options)
    selftests(suite, job, only(programs, POWER), devices, 2 if job.kernel == "plain" else 10)
    for device in devices:
        # It is judged by the machine's end: no complaint comes, and the power goes off.
        job.check(f"{device}/left-running", f"./stress --device {DEVICES[device]} --soak 9 "
                  ">/dev/null 2>&1 & sleep 1; kill -0 $!")
    return job


def guest_job(suite, work, name, image, devices, ept=True, **options):
    """A boot in which the kernel IMAGE boots as a guest, on each of DEVICES."""
    insmod = tuple({"kvm": "kvm-intel", "rkvm": "rkvm" if ept else "rkvm ept=0"}[device]
                   for device in devices)
    job = Job(suite, name, insmod=insmod, **options)
    guest = guests.Guest(image, timeout=900 if job.kernel == "plain" else 3000,
                         options="--irqchip none")
    directory = os.path.join(work, name.replace("/", "-"))
    guest.stage(directory)
    job.data += [f"{directory}:guest", os.path.join(suite.tree, "build/bin/rkvm-vmm")]
    for device in devices:
        job.check(device, guest.command(DEVICES[device], "guest"), guest.report.search)
    if job.steps and "rkvm" in devices:
        job.check("unload", "rmmod rkvm")
    return job


# Small guests: kernel, interrupt controllers, processors, more options of the VMM's. They run on both
# devices, with kvm-intel's and rkvm's EPT; and in the jobs whose name says shadow, on rkvm without.
TINY = {
    "tiny": [("i386", "none", 1), ("i386", "kernel", 2), ("i386pae", "split", 2),
             ("x86_64", "split", 1, "--protocol=32")],
    "shadow": [("i386", "none", 1), ("i386", "split", 2), ("i386pae", "split", 2),
               ("x86_64", "none", 1), ("x86_64", "split", 2)],
    "core2": [("i386", "none", 1), ("i386pae", "split", 2), ("x86_64", "split", 2)],
    "restricted": [("i386", "none", 1), ("x86_64", "kernel", 2)],
}


def tiny_guests(suite, work, job, group, devices):
    """Add the small guests of GROUP, on each of DEVICES, to JOB."""
    directory = os.path.join(work, job.name.replace("/", "-") + "-tiny")
    staged = False
    for kernel, irqchip, cpus, *options in TINY[group]:
        for device in devices:
            guest = guests.Tiny(kernel, irqchip, cpus, options)
            if suite.wants(f"{job.name}/{device}/{guest.name}") and "user" not in suite.not_built:
                guest.stage(suite.tree, directory)
                staged = True
            job.check(f"{device}/{guest.name}", guest.command(DEVICES[device], 600), guest.judge)
    if staged:
        job.data += [f"{directory}:tiny", os.path.join(suite.tree, "build/bin/rkvm-vmm")]


def tiny_job(suite, work, name, devices, **options):
    """A boot in which small guests run."""
    job = Job(suite, f"guest/{name}", timeout=1500, **options)
    tiny_guests(suite, work, job, name, devices)
    if job.steps:
        life_cycle(job)
    return job


def poorer_job(suite, work, name, programs, devices, **options):
    """A boot in which VMX has less than it may have: some PROGRAMS, and small guests."""
    job = Job(suite, name, timeout=1800, **options)
    selftests(suite, job, programs, devices, 2)
    tiny_guests(suite, work, job, name, ["rkvm"])
    if job.steps:
        life_cycle(job)
    return job


# Guests with disks, by the number of the machine's CPUs: kernel, interrupt controllers, processors,
# seconds of stress, network.
SMP = {
    1: [("test", "split", 1, 0, "tap"), ("test", "kernel", 2, 3, "vhost"), ("test", "split", 4, 3, ""),
        ("debian", "split", 2, 0, "vhost")],
    2: [("test", "split", 2, 3, "vhost"), ("test", "kernel", 8, 3, "tap")],
}
# What `make guests-full` runs.
SMP_FULL = [(kernel, irqchip, cpus, 0 if cpus == 1 else 10, network)
            for kernel in ("test", "debian") for irqchip in ("none", "split", "kernel")
            for cpus, network in (((1, ""),) if irqchip == "none" else
                                  ((1, "tap"), (2, "vhost"), (4, "tap"), (8, "vhost")))]


def smp_job(suite, work, cpus, kernels, devices):
    """A boot in which guests with disks, most with more processors than there are, run."""
    full = bool(os.environ.get("RKVM_GUESTS_FULL"))
    name = f"smp-{cpus}cpu"
    # Documentation/testing.rst says why kvm-intel does without APIC virtualisation.
    job = Job(suite, name, cpus=cpus, timeout=7200 if full else 1200,
              insmod=("kvm-intel enable_apicv=0", "rkvm", "tun", "vhost_net"))
    job.data.append(os.path.join(suite.tree, "build/bin/rkvm-vmm"))
    programs = os.path.join(suite.tree, "build/bin/guest")
    if "user" in suite.not_built or not os.path.isdir(programs):
        programs = None
    for kernel, image in kernels.items():
        directory = os.path.join(work, f"{name}-{kernel}")
        guests.Guest(image).stage(directory, programs)
        job.data.append(f"{directory}:{kernel}")
    for kernel, irqchip, processors, stress, network in SMP_FULL if full else SMP[cpus]:
        for device in DEVICES if full else devices:
            job.check(f"{device}/{kernel}-{irqchip}-{processors}",
                      guests.run(kernel, DEVICES[device], processors, irqchip, stress, network))
    if job.steps:
        job.check("unload", "rmmod rkvm")
    return job


# QEMU's tests, by the number of the machine's CPUs; with make qemu-full, all on each. What the jobs
# are called, their CPUs, devices, our module's parameters.
QEMU_TESTS = {
    "qemu-1cpu": ["microvm_split_1", "q35_kernel_4", "disk_pc", "savevm", "gdb_boot_sector"],
    "qemu-2cpu": ["migrate_across"],
    "qemu-shadow": ["q35_kernel_1"],
}


def qemu_job(suite, work, name, tests, cpus=1, devices=("kvm", "rkvm"), module="rkvm"):
    """A boot in which QEMU runs guests on each of DEVICES."""
    full = bool(os.environ.get("RKVM_QEMU_FULL"))
    if full and module == "rkvm":
        devices = ("kvm", "rkvm")
    # Documentation/testing.rst says why kvm-intel does without APIC virtualisation.
    job = Job(suite, name, cpus=cpus, timeout=7200 if full else 1500,
              insmod=("kvm-intel enable_apicv=0", module))
    if not tests:
        return job
    directory = os.path.join(work, job.name)
    guests.stage_qemu(directory, os.path.join(suite.tree, "build/bin/guest"))
    job.data += [os.environ["RKVM_QEMU"] + ":opt/qemu", f"{directory}:guest",
                 os.path.join(suite.tree, "build/bin/selftests", QEMU)]
    for test in tests if full else QEMU_TESTS[name]:
        for device in devices:
            prefix = f"{job.name}/{device}/{QEMU}"
            if suite.wants(f"{prefix}/{test}"):
                job.add(shlex.join(["./" + QEMU, "--device", DEVICES[device], test]),
                        tap.Program(suite.report, prefix, [test]))
    if job.steps:
        job.check("unload", "rmmod rkvm")
    return job


def kernel_selftests(suite, name, cpus, groups, flavour=kselftests.EPT):
    """A boot with the kernel's own tests of GROUPS which both KVM and rkvm are known to pass, as
    FLAVOUR loads them."""
    job = Job(suite, name, cpus=cpus, memory=kselftests.MEMORY, timeout=1800, insmod=flavour.insmod)
    job.data += kselftests.payload()
    expected = kselftests.read_expected(suite.tree, flavour)
    seen = set()
    for case in kselftests.read_list(suite.tree):
        # Without EPT one way to call each program says enough.
        again = flavour is not kselftests.EPT and not FULL and case.name.split()[0] in seen
        if case.group in groups and case.cpus == cpus and not again:
            if expected.get(case.name, ())[:2] == ("pass", "pass"):
                seen.add(case.name.split()[0])
                job.check(case.name, shlex.join(case.command("rkvm")),
                          lambda text: not kselftests.NOT_RUN.search(text))
    return job


def huge_page_job(suite):
    """A boot with so much memory that the kernel finds pages of 1 GiB in it."""
    job = Job(suite, "gigabyte", memory=6144, insmod=STRESS_MODULES)
    job.data.append(os.path.join(suite.tree, "build/bin/selftests"))
    for device, path in DEVICES.items():
        job.check(f"{device}/faults/hugetlb_1g", f"./faults --device {path} hugetlb_1g",
                  lambda text: "SKIP" not in text)
    return job


def testbed_tests(suite):
    """The testbed judged: what must fail a run does, and what it passes on is right."""
    cases = {
        "status": (["--", "exit 3"], 3),
        "kernel-complains": (["--", "echo '<4>WARNING: made up' >/dev/kmsg"], 120),
        "panic": (["--", "echo c >/proc/sysrq-trigger"], 120),
        "hang": (["--timeout", "10", "--", "while :; do :; done"], 121),
        "module-refused": (["--cpu", "ryzen", "--insmod", "kvm-intel", "--", "true"], 125),
        "user-cannot-complain": (["--", "echo 'WARNING: BUG: Oops'"], 0),
    }
    for name, (words, expected) in cases.items():
        if not suite.wants(f"testbed/{name}"):
            continue
        run = subprocess.run([sys.executable, HERE + "/machine.py", "--accel", "bochs", "--quiet",
                              *words], check=False, capture_output=True, text=True, errors="replace")
        why = [*run.stderr.splitlines()[-15:], f"status {run.returncode}, not {expected}"]
        suite.report.result(f"testbed/{name}", run.returncode == expected, why=why)


def runs_in(program, job):
    """Whether the job of that name is one for PROGRAM."""
    if program in POWER:
        return False
    if program in INJECTED:
        return job in ("debug-1cpu", "shadow-debug")
    if FULL and job in ("debug-1cpu", "debug-2cpu", "plain-2cpu", "shadow-1cpu"):
        return program not in STRESS and not (program in MANY and job.startswith("debug"))
    if program in NOT.get(job, ()):
        return False
    if job in ONLY:
        return program in ONLY[job]
    return (program in STRESS) == job.startswith("stress")


def jobs(suite, work):
    """All boots, the longest first."""
    programs = selftest_programs(suite)
    qemu_tests = programs.pop(QEMU, [])
    test_kernel = os.environ["RKVM_KERNEL_PLAIN"] + "/bzImage"
    debian = os.environ["RKVM_GUEST"] + "/vmlinuz"
    out = []
    stress = {"insmod": STRESS_MODULES, "append": STRESS_APPEND, "timeout": 2400}
    both = ["kvm", "rkvm"]
    # What runs on one CPU on both devices runs on ours alone in other jobs.
    ours = both if FULL else ["rkvm"]
    for name, options, devices, slow in (
            ("debug-2cpu", {"kernel": "debug", "cpus": 2, "timeout": 3600}, ["rkvm"], 10),
            ("debug-leaks", {"kernel": "debug", "timeout": 2400, "append": "kmemleak=on"}, ["rkvm"], 20),
            ("debug-1cpu", {"kernel": "debug", "timeout": 2400}, ["rkvm"], 10),
            ("stress-debug", {**stress, "kernel": "debug", "cpus": 2}, ["rkvm"], 10),
            ("stress-2cpu", {**stress, "cpus": 2}, ours, 2),
            ("plain-2cpu", {"cpus": 2, "timeout": 2400}, ours, 2),
            # With two CPUs the kernel does not accept that siblings are on two nodes.
            ("stress-1cpu", {**stress, "append": STRESS_APPEND + " numa=fake=2"}, both, 1),
            ("plain-1cpu", {"cpus": 1, "timeout": 2400}, both, 1),
            ("shadow-debug", {"kernel": "debug", "insmod": SHADOW, "timeout": 2400}, ["rkvm"], 20),
            ("shadow-2cpu", {"cpus": 2, "insmod": SHADOW, "timeout": 2400}, ["rkvm"], 4),
            ("shadow-audit", {"insmod": AUDITED, "timeout": 1200}, ["rkvm"], 10),
            ("shadow-1cpu", {"insmod": SHADOW, "timeout": 2400}, ["rkvm"], 2),
            *([("stress-shadow", {**stress, "insmod": STRESS_SHADOW, "append": STRESS_APPEND + " numa=fake=2"},
                ["rkvm"], 4)] if FULL else [])):
        job = Job(suite, name, **options)
        chosen = {program: tests for program, tests in programs.items() if runs_in(program, name)}
        selftests(suite, job, chosen, devices, slow)
        life_cycle(job)
        out.append(job)
    out += [qemu_job(suite, work, "qemu-1cpu", qemu_tests, devices=ours),
            qemu_job(suite, work, "qemu-2cpu", qemu_tests, cpus=2),
            qemu_job(suite, work, "qemu-shadow", qemu_tests, devices=["rkvm"], module="rkvm ept=0"),
            poorer_job(suite, work, "core2", only(programs, CORE2_PROGRAMS), both, cpu=CORE2),
            poorer_job(suite, work, "restricted", only(programs, RESTRICTED_PROGRAMS), ["rkvm"],
                       insmod=RESTRICTED)]
    out += [
        kernel_selftests(suite, "kselftests", 1, ("memory", "x86")),
        kernel_selftests(suite, "kselftests-2cpu", 2, ("x86",)),
        kernel_selftests(suite, "kselftests-shadow", 1, ("memory",), kselftests.SHADOW),
        huge_page_job(suite),
        power_job(suite, programs, "power-2cpu", both),
        # Only here does VMX go off when rkvm gives it back.
        power_job(suite, programs, "power-alone", ["rkvm"]),
        guest_job(suite, work, "guest/debian", debian, ["rkvm"], timeout=1200),
        guest_job(suite, work, "guest/test-kernel", test_kernel, ["kvm", "rkvm"]),
        guest_job(suite, work, "guest/test-kernel-2cpu", test_kernel, ["rkvm"], cpus=2),
        tiny_job(suite, work, "tiny", both),
        tiny_job(suite, work, "shadow", ["rkvm"], insmod=SHADOW),
    ]
    if FULL:
        out += [
            power_job(suite, programs, "power-debug", ["rkvm"], kernel="debug", timeout=1200),
            guest_job(suite, work, "guest/test-kernel-debug", test_kernel, ["rkvm"], kernel="debug",
                      timeout=1200),
            guest_job(suite, work, "guest/debian-shadow", debian, ["rkvm"], ept=False, timeout=1200),
        ]
    kernels = {"test": test_kernel, "debian": debian}
    out += [smp_job(suite, work, cpus, kernels, ours) for cpus in SMP]
    return out


def main():
    """Run what is wanted, two boots at a time on two CPUs."""
    suite = Suite(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
    for what in sorted(suite.not_built - {""}):
        suite.report.result(f"build/{what}", False, why=["does not build; the log is above"])
    python_tests(suite)
    with tempfile.TemporaryDirectory(prefix="rkvm-test-") as work, \
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # A fault of ours in a job must not look like success.
        work_items = [job.run for job in jobs(suite, work)]
        work_items[1:1] = [functools.partial(unit_tests, suite, crate) for crate in CRATES]
        work_items.append(functools.partial(testbed_tests, suite))
        for future in [pool.submit(item) for item in work_items]:
            future.result()
    sys.exit(suite.report.finish())


main()
