"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "missing", "worse", "unknown"]
"""ok; missing, and kdmesh does not work without it; worse without it, or by what it is; not to be found out."""

Part = Literal["gpu", "rdma", "sglang", "jwt", "lora", "eightbit", "quantization", "liger", "kubernetes"]
"""What only some need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found, and what follows from it."""

    name: str
    verdict: Verdict
    found: str
    cost: str = ""  # of a miss
    cure: str = ""
    part: Part | None = None  # that a miss takes away; None: it matters to everybody

    def needed(self) -> Finding:
        """The same for somebody who cannot do without."""
        if self.verdict != "worse":
            return self
        return Finding(
            name=self.name, verdict="missing", found=self.found, cost=self.cost, cure=self.cure, part=self.part
        )


def ok(name: str, found: str, part: Part | None = None) -> Finding:
    """All is well."""
    return Finding(name=name, verdict="ok", found=found, part=part)
