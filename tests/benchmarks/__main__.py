"""``python tests/benchmarks``: measure, print a table, write JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests" / "support")]  # not installed: this checkout
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *sys.path[1:3], *filter(None, [os.environ.get("PYTHONPATH")])]
)

import cases  # noqa: E402
import torch  # noqa: E402

CASES = ("training", "tensors", "generation", "features", "flatness")
PROCESSES = ("startup", "api")  # of whole processes, at no size


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=("mini", "sd15"), default=["mini"], help="sd15 takes an hour")
    parser.add_argument("--only", nargs="+", choices=(*CASES, *PROCESSES), default=[*CASES, *PROCESSES])
    parser.add_argument("--work", default=str(ROOT / "runs" / "benchmarks"), help="stored features, SD1.5's weights")
    parser.add_argument("--json", default=str(ROOT / "runs" / "benchmarks" / "results.json"))
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work, results_file = Path(args.work).resolve(), Path(args.json).resolve()
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # what the runs write is not kept
        if args.child is not None:
            cases.child(args.child, cases.mini(work))
            return
        results: dict[str, Any] = {"machine": machine(), "rows": []}
        for name in args.sizes:
            size = getattr(cases, name)(work)
            for case in CASES:
                if case in args.only:
                    results["rows"] += [{"size": name, "case": case, **row} for row in getattr(cases, case)(size)]
        for case in PROCESSES:
            if case in args.only:
                results["rows"] += [{"size": "", "case": case, **row} for row in getattr(cases, case)()]
        results["machine"]["load_after"] = os.getloadavg()
        os.chdir(ROOT)
    results_file.parent.mkdir(parents=True, exist_ok=True)
    results_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(results["rows"]) + f"\n\n{results['machine']}\n{results_file}")


def machine() -> dict[str, Any]:
    """What a figure depends on beyond the code."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: metadata.version(name) for name in ("torch", "lightning", "diffusers", "transformers")}
    return {
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load_before": os.getloadavg(),
        **versions,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the ratio of medians of neighbours in time, its quartiles, and the same of CPU time."""
    lines = [
        "| size | what | value | quartiles | by CPU time | seconds | reference | peak MiB | aim |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        value = next((f"{row[key]:.{digits}f}{unit}" for key, digits, unit in VALUES if key in row), "")
        quartiles = " to ".join(f"{q:.3f}" for q in row.get("quartiles", []))
        cpu, seconds, reference = (
            f"{row[key]:.3f}" if key in row else "" for key in ("ratio_cpu", "seconds", "reference_seconds")
        )
        peaks = " / ".join(f"{row[key]:.0f}" for key in ("peak_mib", "reference_peak_mib") if key in row)
        aim = f"{row['aim']}: {'met' if row['met'] else 'NOT met'}" if "aim" in row else ""
        cells = (row["size"], row["what"], value, quartiles, cpu, seconds, reference, peaks, aim)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


VALUES = (
    ("ratio", 3, ""),
    ("gflop", 3, ""),
    ("anonymous_mib", 0, " MiB"),
    ("gigabytes", 2, " GB"),
    ("cpu_seconds", 2, " CPU s"),
)

if __name__ == "__main__":
    main()
