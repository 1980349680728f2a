# SPDX-License-Identifier: GPL-2.0
"""Boot a Linux guest on rkvm in the emulated machine, for scripts/run.

Usage: run.py TREE [option of scripts/machine...]
"""

import os
import subprocess
import sys
import tempfile

import guests

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    """Run, and say what happened."""
    tree, *options = sys.argv[1:]
    guest = guests.Guest(os.environ["RKVM_KERNEL_PLAIN"] + "/bzImage", options="--cpus 2")
    with tempfile.TemporaryDirectory(prefix="rkvm-run-") as work:
        guest.stage(work + "/guest")
        script = f"{guest.command('/dev/rkvm', 'guest')} || exit\nrmmod rkvm || exit 100"
        process = subprocess.Popen(
            [sys.executable, HERE + "/machine.py", "--timeout", "300",
             "--module", tree + "/build/module-plain/rkvm.ko", "--insmod", "rkvm",
             "--data", tree + "/build/bin/rkvm-vmm", "--data", work + "/guest:guest",
             *options, "--", script],
            stdout=subprocess.PIPE)
        reported = None
        for line in process.stdout:
            text = line.decode(errors="replace")
            reported = reported or guest.report.search(text)
            sys.stdout.write(text)
            sys.stdout.flush()
        status = process.wait()
    if status == 100:
        print("run: rkvm.ko does not unload", file=sys.stderr)
    elif status:
        print(f"run: failed with status {status}", file=sys.stderr)
    elif not reported:
        print("run: the guest's init did not report", file=sys.stderr)
        status = 1
    else:
        print(f"run: a guest with Linux {reported[1]} ran on rkvm to its init and powered off; "
              "rkvm.ko unloaded", file=sys.stderr)
    sys.exit(status)


main()
