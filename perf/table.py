# SPDX-License-Identifier: Apache-2.0
"""Result rows as a Markdown table: what the benches print and what README shows of ``perf/results/<gpu>.json``."""

import json
import sys
from pathlib import Path


def _cells(row):
    seconds = row["seconds"]
    rate = f"{row['nbytes'] / seconds / 1e9:.1f} GB/s"
    if row["flops"] > 16 * row["nbytes"]:   # arithmetic may be the limit
        rate += f", {row['flops'] / seconds / 1e12:.2f} TFLOP/s"
    share = "" if row.get("share_of_read_bandwidth") is None else f"{row['share_of_read_bandwidth']:.0%}"
    if row.get("share_of_matmul_rate") is not None:
        share += f"; {row['share_of_matmul_rate']:.0%} of matmul"
    baseline = row.get("baseline_seconds")
    return (row["op"], row["shape"], f"{seconds * 1e6:.1f}", rate, share,
            "" if baseline is None else f"{baseline / seconds:.2f}x")


def markdown(rows):
    """A table per device that ran benches, one line per op and shape.

    Arrays are cold on a GPU and warm on the CPU executor, where those that fit in cache may beat the read bandwidth.
    """
    return "\n\n".join(_table(device, rows) for device in dict.fromkeys(row["device"] for row in rows))


def _table(device, rows):
    lines = [f"Measured on: {device}", "",
             "| op | shape | µs | rate | of read bandwidth | vs array library |", "|---|---|---:|---:|---:|---:|"]
    return "\n".join(lines + [f"| {' | '.join(_cells(row))} |" for row in rows if row["device"] == device])


def main(paths):
    for path in paths:
        print(markdown(json.loads(Path(path).read_text())["benches"]))


if __name__ == "__main__":
    main(sys.argv[1:] or sorted(Path(__file__).parent.glob("results/*.json")))
