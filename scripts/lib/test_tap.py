# SPDX-License-Identifier: GPL-2.0
"""Unit tests of tap.py: no failure may get lost."""

import unittest

import tap


class Recorder:
    """Stands in for the report."""

    def __init__(self):
        self.results = {}

    def result(self, name, passed, skip=None, why=()):
        """Keep the verdict."""
        del why
        self.results[name] = "skip" if passed and skip is not None else passed


def run(expected, lines, status):
    """The verdicts on a program that was to run EXPECTED, wrote LINES and ended with STATUS."""
    recorder = Recorder()
    program = tap.Program(recorder, "p", expected)
    for line in lines:
        program.line(line)
    program.end(status)
    return recorder.results


class Program(unittest.TestCase):
    """Programs that do well, and in every way badly."""

    def test_all_reported(self):
        """Names with and without the subject; skips."""
        self.assertEqual(
            run(["a", "b", "c"], ["1..3", "ok 1 s.a", "ok 2 - b", "ok 3 s.c # SKIP no such thing"], 0),
            {"p/a": True, "p/b": True, "p/c": "skip"})

    def test_failure(self):
        """A failed test is one failure, not two."""
        self.assertEqual(run(["a", "b"], ["1..2", "not ok 1 s.a", "ok 2 s.b"], 1),
                         {"p/a": False, "p/b": True})

    def test_missing(self):
        """What is not reported fails by name, whatever the status."""
        self.assertEqual(run(["a", "b"], ["1..2", "ok 1 s.a"], 0), {"p/a": True, "p/b": False})
        self.assertEqual(run(["a", "b"], [], None), {"p/a": False, "p/b": False})
        self.assertEqual(run(["a"], ["Segmentation fault"], 139), {"p/a": False})

    def test_status_disagrees(self):
        """All passed, but the program says otherwise."""
        self.assertEqual(run(["a"], ["1..1", "ok 1 s.a"], 1), {"p/a": True, "p/exit": False})
        self.assertEqual(run(["a"], ["1..1", "ok 1 s.a"], 134), {"p/a": True, "p/exit": False})
        self.assertEqual(run(["a"], ["1..1", "ok 1 s.a"], None), {"p/a": True, "p/exit": False})

    def test_unknown_and_twice(self):
        """A result that nobody expects, and a second one of the same name."""
        results = run(["a"], ["ok 1 s.a", "ok 2 s.b", "ok 3 s.a"], 0)
        self.assertIs(results["p/s.b"], False)
        self.assertIs(results["p/s.a"], False)

    def test_plan_disagrees(self):
        """A plan that is not what the program lists."""
        self.assertIs(run(["a"], ["1..2", "ok 1 s.a"], 0)["p/plan"], False)


if __name__ == "__main__":
    unittest.main()
