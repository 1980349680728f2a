# SPDX-License-Identifier: GPL-2.0
"""Results of tests from many sources, as one TAP stream and one line of totals."""

import re
import sys
import threading

RESULT = re.compile(r"^(not )?ok\b\s*(\d+)?\s*(?:-\s*)?(.*?)(?:\s*#\s*(SKIP|TODO)\b\s*(.*))?$",
                    re.IGNORECASE)
PLAN = re.compile(r"^1\.\.(\d+)(?:\s*#\s*SKIP\b\s*(.*))?", re.IGNORECASE)


class Report:
    """Numbers results as they come from any thread, and counts them."""

    def __init__(self):
        self.lock = threading.Lock()
        self.passed = self.failed = self.skipped = 0
        self.failures = []
        print("TAP version 13", flush=True)

    def result(self, name, passed, skip=None, why=()):
        """Record one result; WHY is lines that explain a failure."""
        with self.lock:
            number = self.passed + self.failed + self.skipped + 1
            if not passed:
                self.failed += 1
                self.failures.append(name)
                for line in why:
                    print(f"# {line}")
                print(f"not ok {number} - {name}")
            elif skip is not None:
                self.skipped += 1
                print(f"ok {number} - {name} # SKIP {skip}")
            else:
                self.passed += 1
                print(f"ok {number} - {name}")
            sys.stdout.flush()

    def note(self, text):
        """A comment in the stream."""
        with self.lock:
            print(f"# {text}", flush=True)

    def finish(self):
        """Print the plan, the failures again and the totals; return the exit status."""
        print(f"1..{self.passed + self.failed + self.skipped}")
        for name in self.failures:
            print(f"# failed: {name}")
        totals = f"{self.passed} passed, {self.failed} failed"
        if self.skipped:
            totals += f", {self.skipped} skipped"
        print(totals, flush=True)
        return 1 if self.failed or not self.passed else 0


class Program:
    """The TAP of one program, checked against what it was to run.

    EXPECTED is the names of its tests, in the program's own words. What it does
    not report on fails by name; so does a plan that is not theirs.
    """

    def __init__(self, report, prefix, expected):
        self.report = report
        self.prefix = self.name = prefix
        self.missing = dict.fromkeys(expected)
        self.expected = len(self.missing)
        self.comments = []
        self.plan = None
        self.failed = 0

    def line(self, text):
        """Take a line of output."""
        found = RESULT.match(text)
        if found:
            self.take(found)
            self.comments = []
            return
        found = PLAN.match(text)
        if found:
            self.plan = int(found[1])
        elif text.strip() and not text.startswith("TAP version"):
            self.comments.append(text.removeprefix("# "))

    def take(self, found):
        """A line "ok" or "not ok"."""
        # A program may write its subject before the test's name.
        name = found[3].strip()
        key = name if name in self.missing else name.partition(".")[2]
        if key not in self.missing:
            self.report.result(f"{self.prefix}/{name}", False,
                               why=["reported, but not among what the program lists (or twice)"])
            self.failed += 1
            return
        del self.missing[key]
        skip = found[5] if (found[4] or "").upper() == "SKIP" else None
        self.report.result(f"{self.prefix}/{key}", not found[1], skip, self.comments[-40:])
        self.failed += bool(found[1])

    def end(self, status):
        """The program ended with STATUS; None: it did not."""
        if status is None:
            why = "did not end"
        elif status not in (0, 1, 4) or (status == 1 and not self.failed):
            why = f"exit status {status}"
        else:
            why = None
        for name in self.missing:
            self.report.result(f"{self.prefix}/{name}", False,
                               why=[*self.comments[-10:], f"not reported; the program: {why or 'ended'}"])
        if self.plan not in (None, self.expected):
            self.report.result(f"{self.prefix}/plan", False,
                               why=[f"plans {self.plan} tests, lists {self.expected}"])
        if why and not self.missing:
            self.report.result(f"{self.prefix}/exit", False, why=[*self.comments[-10:], why])
