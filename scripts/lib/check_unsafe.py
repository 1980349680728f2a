# SPDX-License-Identifier: GPL-2.0
"""Confine unsafe code to the layers that scripts/unsafe.allow names.

Usage: check_unsafe.py TREE
"""

import os
import re
import sys

# Comments and strings may speak of it; lints are named unsafe_code and the like.
NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)


def blank(match):
    """Spaces and line ends instead of the text, so that line numbers stay."""
    return re.sub(r"[^\n]", " ", match[0])


def main():
    """Look at every Rust file of the module."""
    tree = sys.argv[1]
    with open(os.path.join(tree, "scripts/unsafe.allow"), encoding="utf-8") as f:
        allowed = [line.strip() for line in f if line.strip() and not line.startswith("#")]
    root = os.path.join(tree, "rust")
    bad = 0
    for directory, subdirs, files in os.walk(root):
        subdirs[:] = [d for d in subdirs if d != "target"]
        for name in files:
            path = os.path.relpath(os.path.join(directory, name), root)
            if not name.endswith(".rs") or name == "bindings_generated.rs":
                continue
            if any(path.startswith(a) if a.endswith("/") else path == a for a in allowed):
                continue
            with open(os.path.join(root, path), encoding="utf-8") as f:
                text = NOT_CODE.sub(blank, f.read())
            for number, line in enumerate(text.splitlines(), 1):
                if re.search(r"\bunsafe\b", line):
                    print(f"rust/{path}:{number}: unsafe outside of its layers")
                    bad += 1
    with open(os.path.join(root, "x86/mod.rs"), encoding="utf-8") as f:
        if "#![forbid(unsafe_code)]" not in f.read():
            with open(os.path.join(root, "x86/lib.rs"), encoding="utf-8") as g:
                if "#![forbid(unsafe_code)]" not in g.read():
                    print("rust/x86: does not forbid unsafe_code")
                    bad += 1
    sys.exit(bad > 0)


main()
