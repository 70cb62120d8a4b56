"""The closing summary of a run."""

from __future__ import annotations

import json
import sys

from ddinfer.distributed.progress import duration
from ddinfer.job.assignment import load_balance
from ddinfer.job.leader import RunReport


def print_summary(report: RunReport, *, as_json: bool) -> None:
    """Print counts, speed, load balance and output: JSON to stdout, else lines to stderr."""
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print("\n".join(summary_lines(report)), file=sys.stderr)


def summary_lines(report: RunReport) -> list[str]:
    lines = [
        f"ddinfer: {report.num_made} of {report.num_images} images are in {report.output}/images"
    ]
    if report.num_new:
        working = max(times.working for times in report.ranks)
        rate = report.num_new / working if working else 0.0
        lines.append(
            f"  {report.num_new} of them new, in {duration(report.seconds)}: loading took "
            f"{duration(max(times.loading for times in report.ranks))}, then {rate:.3g} images/s"
        )
    if len(report.ranks) > 1:
        makers = [times for times in report.ranks if times.stage == 0]
        num_stages = len(report.ranks) // len(makers)
        who = "rank" if num_stages == 1 else f"replica of {num_stages} ranks"
        shares = ", ".join(f"{t.images} ({duration(t.working)})" for t in makers)
        lines.append(f"  images by {who}: {shares}; load balance {load_balance(makers):.0%}")
    for flag, count in sorted(report.flags.items()):
        lines.append(f"  {count} flagged {flag}: see the flags in metadata.jsonl")
    if report.num_inexact:
        lines.append(
            f"  {report.num_inexact} were generated in a smaller batch than planned (exact: false)"
        )
    if report.num_failed:
        lines.append(f"  {report.num_failed} failed: see {report.output}/failures.jsonl")
    return lines
