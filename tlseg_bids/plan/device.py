"""Where a job runs: the GPU with the most free memory, or the CPU, and why."""

from __future__ import annotations

from dataclasses import dataclass

from tlseg_bids.errors import UsageError


@dataclass(frozen=True)
class Machine:
    """The devices of this machine.

    Parameters
    ----------
    cuda_free_gib : tuple of float
        Free memory of each visible CUDA device, in GiB; 0 for one that cannot be used.
    mps : bool
        Whether Apple's Metal backend is there.
    cuda_built : bool
        Whether PyTorch was built for CUDA.
    """

    cuda_free_gib: tuple[float, ...] = ()
    mps: bool = False
    cuda_built: bool = False

    @classmethod
    def here(cls) -> Machine:
        """Ask PyTorch. Asking a CUDA device for its memory opens it in this process."""
        import torch

        free = []
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            try:
                free.append(torch.cuda.mem_get_info(index)[0] / 2**30)
            except RuntimeError:
                free.append(0.0)
        return cls(tuple(free), torch.backends.mps.is_available(), torch.backends.cuda.is_built())


def choose_device(wanted: str, needed_gib: float, machine: Machine) -> tuple[str, tuple[str, ...]]:
    """The device of a job, with warnings.

    Parameters
    ----------
    wanted : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    needed_gib : float
        Free memory the model wants on a GPU, in GiB.
    machine : Machine
        What is there.

    Returns
    -------
    device : str
        As PyTorch names it: ``cpu``, ``cuda:0``, ``mps``.
    warnings : tuple of str
        What the user should know.

    Raises
    ------
    UsageError
        If a device was asked for that is not there.
    """
    free = machine.cuda_free_gib
    best = max(range(len(free)), key=free.__getitem__, default=None)
    if wanted == "cpu":
        return "cpu", ()
    if wanted == "mps":
        if not machine.mps:
            raise _missing(wanted, "this machine has no Metal device that PyTorch can use")
        return "mps", ()
    if wanted == "auto":
        if best is not None and free[best] >= needed_gib:
            return f"cuda:{best}", ()
        if machine.mps:
            return "mps", ()
        return "cpu", () if best is None else (
            f"run on the CPU: the freest GPU, cuda:{best}, has {free[best]:.1f} GiB free and the "
            f"model wants {needed_gib:.1f} GiB",
        )
    return _asked_cuda(wanted, needed_gib, machine, best)


def _asked_cuda(
    wanted: str, needed_gib: float, machine: Machine, best: int | None
) -> tuple[str, tuple[str, ...]]:
    free = machine.cuda_free_gib
    if best is None:
        reason = (
            "PyTorch sees no CUDA device (a driver, or a container option such as --gpus all or "
            "--nv, may be missing)"
            if machine.cuda_built
            else "this PyTorch was built without CUDA"
        )
        raise _missing(wanted, reason)
    index = best if wanted == "cuda" else int(wanted.partition(":")[2])
    if index >= len(free):
        raise _missing(wanted, f"the last CUDA device is cuda:{len(free) - 1}")
    if free[index] >= needed_gib:
        return f"cuda:{index}", ()
    return f"cuda:{index}", (
        f"cuda:{index} has {free[index]:.1f} GiB free and the model wants {needed_gib:.1f} GiB; "
        "it was asked for, so it is tried",
    )


def _missing(wanted: str, reason: str) -> UsageError:
    return UsageError(
        f"the device {wanted} is not there: {reason}", f"--device {wanted}",
        "use --device auto or --device cpu",
    )  # fmt: skip
