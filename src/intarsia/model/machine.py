"""Machines as rooflines (Williams et al. 2009, 10.1145/1498765.1498785): how fast they compute and read at best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from intarsia.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Machine:
    """A machine that computes and reads at the same time, each as fast as it can.

    What really runs takes longer; how much longer says how much there is to gain.
    """

    name: str
    flops: float
    """FLOP/s of products of matrices in the weights' dtype."""
    bandwidth: float
    """Bytes/s of the memory that holds weights and states."""

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time in which so many FLOPs can be computed and so many bytes moved."""
        return max(flops / self.flops, nbytes / self.bandwidth)


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("a100", 312e12, 2.039e12),
        Machine("h100", 989e12, 3.35e12),
        Machine("h200", 989e12, 4.8e12),
        Machine("mi300x", 1307e12, 5.3e12),
    )
}
"""Of bfloat16 without sparsity and the largest memory of the kind (SXM), as their makers state them."""


def free_memory() -> int | None:
    """Bytes of memory that programs on this machine can still take; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def machine_of(text: str) -> Machine:
    """The machine of a name in `MACHINES`, or of its TFLOP/s and GB/s: `2.5:80`.

    Raises:
        ConfigError: it is neither.
    """
    if text in MACHINES:
        return MACHINES[text]
    flops, colon, bandwidth = text.partition(":")
    try:
        made = Machine(text, float(flops) * 1e12, float(bandwidth) * 1e9)
    except ValueError:
        made = None
    if made is None or not (0 < made.flops < 1e21 and 0 < made.bandwidth < 1e18):
        near = "" if colon else did_you_mean(text, MACHINES)
        raise ConfigError(f"a machine is a name or TFLOP/s:GB/s, such as 2.5:80; got {text!r}{near}")
    return made
