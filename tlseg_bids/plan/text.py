"""The plan for the eye: one block of text per scan."""

from __future__ import annotations

from tlseg_bids.bids.runlog import scan_name
from tlseg_bids.errors import one_line
from tlseg_bids.flow import Job, Plan, Skip


def describe(plan: Plan) -> str:
    """Scan, model, reason, device, memory, scans that the model sees beside it, refused models.

    ``--dry-run`` prints it.
    """
    blocks = [_job_text(job) for job in plan.jobs] + [_skip_text(skip) for skip in plan.skips]
    failed = sum(not skip.wanted for skip in plan.skips)
    left_out = len(plan.skips) - failed
    blocks.append(
        f"{len(plan.jobs)} to label, {failed} that cannot be used, {left_out} left out as asked"
    )
    return "\n".join(one_line(line) for block in blocks for line in block.splitlines()) + "\n"


def _job_text(job: Job) -> str:
    lines = [
        scan_name(job.scan),
        f"  model    {job.card.name} {job.card.version}: {job.reason}",
        f"  device   {job.device}, about {job.memory_gib:.1f} GiB of memory",
    ]
    lines += [f"  beside   {scan_name(other)}" for other in job.companions]
    lines += [f"  refused  {other.model}: {other.reason}" for other in job.refused]
    lines += [f"  warning  {warning}" for warning in job.warnings]
    return "\n".join(lines)


def _skip_text(skip: Skip) -> str:
    verb = "left out" if skip.wanted else "cannot be used"
    return f"{scan_name(skip.scan)}\n  {verb}: {skip.reason} – {skip.hint}"
