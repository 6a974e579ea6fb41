"""The plan for the eye: one block of text per scan, and one table row."""

from __future__ import annotations

import pandas as pd

from tlseg_bids.bids.scan import Scan
from tlseg_bids.flow import Job, Plan, Skip

COLUMNS = (
    "scan", "decision", "model", "version", "reason", "refused", "device", "memory_gib",
    "warnings", "hint", "key",
)  # fmt: skip


def describe(plan: Plan) -> str:
    """Scan, model, reason, refused models, device and memory, as ``--dry-run`` prints them."""
    blocks = [_job_text(job) for job in plan.jobs] + [_skip_text(skip) for skip in plan.skips]
    failed = sum(not skip.wanted for skip in plan.skips)
    left_out = len(plan.skips) - failed
    blocks.append(
        f"{len(plan.jobs)} to label, {failed} that cannot be used, {left_out} left out as asked"
    )
    return "\n".join(_printable(line) for block in blocks for line in block.splitlines()) + "\n"


def plan_table(plan: Plan) -> pd.DataFrame:
    """The plan as a table with the columns `COLUMNS`, a row per scan; all text but the memory."""
    rows = [
        {
            "scan": _name(job.scan),
            "decision": "label",
            "model": job.card.name,
            "version": job.card.version,
            "reason": job.reason,
            "refused": "; ".join(f"{other.model}: {other.reason}" for other in job.refused),
            "device": job.device,
            "memory_gib": round(job.memory_gib, 2),
            "warnings": "; ".join(job.warnings),
            "key": job.key,
        }
        for job in plan.jobs
    ] + [
        {
            "scan": _name(skip.scan),
            "decision": "leave out" if skip.wanted else "cannot be used",
            "reason": skip.reason,
            "hint": skip.hint,
        }
        for skip in plan.skips
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _name(scan: Scan) -> str:
    return scan.path.relative_to(scan.bids_dir).as_posix()


def _job_text(job: Job) -> str:
    lines = [
        _name(job.scan),
        f"  model    {job.card.name} {job.card.version}: {job.reason}",
        f"  device   {job.device}, about {job.memory_gib:.1f} GiB of memory",
    ]
    lines += [f"  refused  {other.model}: {other.reason}" for other in job.refused]
    lines += [f"  warning  {warning}" for warning in job.warnings]
    return "\n".join(lines)


def _skip_text(skip: Skip) -> str:
    verb = "left out" if skip.wanted else "cannot be used"
    return f"{_name(skip.scan)}\n  {verb}: {skip.reason} – {skip.hint}"


def _printable(line: str) -> str:
    """Control characters of a hostile name or header as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
