# SPDX-License-Identifier: Apache-2.0
"""The same benches on another commit and here, in turn, and both columns.

    python perf/compare.py REF [pytest arguments, e.g. -k "rope and llama3-8b"]

REF is checked out into a temporary git worktree. Runs go there-here-here-there; each column is the lower of its two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_benches(checkout, arguments, rows):
    """Time the benches of a checkout; seconds by (op, shape)."""
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "perf", "--benchmark-enable",
                    f"--rows={rows}", *arguments], cwd=checkout, check=True, stdout=sys.stderr,
                   env={**os.environ, "PYTHONPATH": str(checkout)})
    lines = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    return {(row["op"], row["shape"]): row["seconds"] for row in lines}


def lower(first, second):
    """Of two runs, the lower time of every bench."""
    return {key: min(first[key], second[key]) for key in first.keys() & second.keys()}


def comparison(ref, before, after):
    """Markdown table of the benches both sides have."""
    lines = [f"| op | shape | {ref} µs | here µs | speed-up |", "|---|---|---:|---:|---:|"]
    for op, shape in after:
        if (op, shape) in before:
            old, new = before[op, shape], after[op, shape]
            lines.append(f"| {op} | {shape} | {old * 1e6:.1f} | {new * 1e6:.1f} | {old / new:.2f}x |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ref", help="commit, branch or tag to compare with")
    options, passed_on = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "checkout")
        subprocess.run(["git", "worktree", "add", "--detach", str(there), options.ref], cwd=ROOT, check=True,
                       stdout=sys.stderr)
        try:
            runs = [run_benches(checkout, passed_on, Path(folder, f"{n}.jsonl"))
                    for n, checkout in enumerate((there, ROOT, ROOT, there))]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(there)], cwd=ROOT, check=True)
    after = lower(runs[1], runs[2])
    print(comparison(options.ref, lower(runs[0], runs[3]), {key: after[key] for key in runs[1] if key in after}))


if __name__ == "__main__":
    main()
