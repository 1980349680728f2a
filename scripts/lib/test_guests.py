# SPDX-License-Identifier: GPL-2.0
"""Tests of what judges and measures small guests."""

import unittest

import bench
import guests


class Judge(unittest.TestCase):
    """What a small guest has to say."""

    def setUp(self):
        self.guest = guests.Tiny("i386", "split", 2)
        self.said = [f"guest {self.guest.nonce}: {line}\r" for line in (
            "processors 2", "processors wrote together, 5 faults", "init is up on Linux 7.2.0-nopae, 32-bit")]

    def judge(self, lines):
        """The verdict on LINES."""
        return bool(self.guest.judge("\n".join(lines)))

    def test_all_said(self):
        self.assertTrue(self.judge(self.said))

    def test_each_line_counts(self):
        for number in range(len(self.said)):
            self.assertFalse(self.judge(self.said[:number] + self.said[number + 1:]))

    def test_complaints(self):
        for line in ("guest 12ab: bad: new memory is not zero (errno 0)", "[    1.0] BUG: unable to", "Call Trace:"):
            self.assertFalse(self.judge([line, *self.said]))

    def test_another_run_is_not_this(self):
        self.assertFalse(self.judge([line.replace(self.guest.nonce, "0") for line in self.said]))

    def test_name(self):
        guest = guests.Tiny("x86_64", "none", 1, ["--protocol=32"])
        self.assertEqual(guest.name, "x86_64-none-1-protocol=32")


class Figures(unittest.TestCase):
    """What is made of a guest's rows and its VMM's marks."""

    def test_rows(self):
        rows = bench.parse("mark 0: exits=10 hypercalls=0\nguest 1f: row 0 syscall 100 12000\n"
                           "mark 1: exits=60 hypercalls=0\nmark 2: no counts: it\n"
                           "guest 1f: row 1 fork 10 50\n")
        self.assertEqual(rows["syscall"].ticks, 120)
        self.assertEqual(rows["syscall"].counts, {"exits": 0.5, "hypercalls": 0})
        self.assertEqual((rows["fork"].ticks, rows["fork"].counts), (5, {}))
