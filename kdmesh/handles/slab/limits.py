"""How much a slab lends, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from kdmesh.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabLimits:
    """How much is lent, and for how long.

    Raises:
        ConfigError: when a value is impossible.
    """

    slots: int
    slot_bytes: int
    slots_per_session: int
    lease_s: float  # silence after which a session ends
    claim_s: float  # how long a published answer waits to be claimed
    max_abandoned: int  # most orphans

    def __post_init__(self) -> None:
        for name in ("slots", "slot_bytes", "slots_per_session", "lease_s", "claim_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"slab: {name} is {getattr(self, name)}; it must be above 0")
        if self.max_abandoned < 0:
            raise ConfigError(f"slab: max_abandoned is {self.max_abandoned}; it must not be negative")
