"""How much memory this process can still take: of a GPU, or of the machine within its control group."""

from __future__ import annotations

from pathlib import Path

import torch

ASSUMED_BYTES = 4 << 30  # free memory of a machine that does not report it


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that this process can still take: the GPU's, or the machine's within its control group.

    Args:
        device: whose memory.
        root: of the file system from which the machine's figures are read.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    machine, group = _machine_bytes(root / "proc"), _group_bytes(root / "sys/fs/cgroup")
    return machine if group is None else min(machine, group)


def _machine_bytes(proc: Path) -> int:
    """Memory that the kernel calls available; ``ASSUMED_BYTES`` where it does not say."""
    try:
        fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return ASSUMED_BYTES


def _group_bytes(group: Path) -> int | None:
    """What the control group (version 2) leaves of its limit; None without a limit."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        # Cached pages of files count as used, and the kernel frees them on demand.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
