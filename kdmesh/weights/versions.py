"""The versions of a server's weights, as a state machine without any I/O.

  SERVING --begin--> RECEIVING --verify--> VERIFIED --commit--> SERVING, the new version
     ^                   |                     |
     +------discard------+-------discard-------+   the old version, as if nothing had come

Every byte is checked as it comes, and verify finds what did not. Nothing but `commit` changes what is served. Weights
that are not finite are never committed: an engine fails at the first token that it draws with them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kdmesh.errors import InvalidRequest, ModelMismatch, Unavailable
from kdmesh.weights import digests
from kdmesh.weights.adding import AddingUp, Base
from kdmesh.weights.buckets import ALIGNMENT_BYTES, BucketEntry
from kdmesh.weights.finite import are_finite
from kdmesh.weights.manifest import AdapterSpec, LowRankSpec, Manifest, TensorSpec
from kdmesh.weights.target import WeightTarget

log = logging.getLogger(__name__)


class UpdateState(StrEnum):
    """What is being done about new weights."""

    SERVING = "serving"  # nothing
    RECEIVING = "receiving"  # they come
    VERIFIED = "verified"  # they are all here, and right


@dataclass(slots=True, kw_only=True)
class _Update:
    """What is announced, and how much of it has come."""

    manifest: Manifest
    places: tuple[int, ...]  # of each announced tensor, in the order of who takes it
    adding: AddingUp | None  # who takes it; None: the target itself
    received_bytes: list[int]  # of each announced tensor


class WeightVersions:
    """Which weights are served, and the one update that may be under way.

    All methods but `admit` may take long and must not run at the same time as another.

    Attributes:
        version: of the weights that are served.
        state: see the picture above.
    """

    def __init__(self, target: WeightTarget, *, architecture_fingerprint: str, version: int = 0) -> None:
        """`version` is that of the weights the server was started with."""
        self.version = self._version_at_start = version
        self.state = UpdateState.SERVING
        self._target = target
        self._fingerprint = architecture_fingerprint
        self._specs = target.tensor_specs()
        self._places = {spec.name: place for place, spec in enumerate(self._specs)}
        self._update: _Update | None = None
        self._base: Base | None = None  # of the weights that are served

    def admit(self, manifest: Manifest) -> None:
        """Look at what is announced; `begin` is next.

        Raises:
            Unavailable: another update is under way.
            ModelMismatch: it belongs to another model, or is not newer than what is served.
            InvalidRequest: its tensors are not the model's.
        """
        if self._update is not None:
            raise Unavailable(f"the update to version {self._update.manifest.version} is under way")
        if manifest.architecture_fingerprint != self._fingerprint:
            raise ModelMismatch(
                f"the update is for a model with fingerprint {manifest.architecture_fingerprint}; "
                f"the model served has {self._fingerprint}"
            )
        if manifest.version <= self.version:
            raise ModelMismatch(
                f"version {manifest.version} is not newer than the one served, {self.version}: another job has brought "
                "its weights, and a server takes those of one job"
            )
        adding = None
        if manifest.adapter is None:
            places = self._all_places(manifest.tensors)
        else:
            adding = self._admit_adapter(manifest, manifest.adapter)
            places = tuple(range(len(manifest.tensors)))
        self._update = _Update(manifest=manifest, places=places, adding=adding, received_bytes=[0] * len(places))
        self.state = UpdateState.RECEIVING

    def begin(self) -> None:
        """Make room for what was admitted."""
        update = self._receiving()
        (update.adding or self._target).begin()

    def write(self, entries: Sequence[BucketEntry], data: memoryview) -> None:
        """Take the bytes of one bucket.

        Raises:
            InvalidRequest: a part is not in the bucket, not the next one of its tensor, not what its digest says, or
                not finite.
        """
        update = self._receiving()
        for entry in entries:
            part, end = entry.part, entry.part.end_bytes
            if part.bucket_offset_bytes % ALIGNMENT_BYTES or not part.bucket_offset_bytes < end <= len(data):
                raise InvalidRequest(
                    f"{part.size_bytes} bytes at {part.bucket_offset_bytes} of a bucket of {len(data)}; parts begin at "
                    f"multiples of {ALIGNMENT_BYTES} and lie inside"
                )
            spec = self._expected(update, entry)
            with data[part.bucket_offset_bytes : end] as part_data:
                copied, is_finite = self._copy(update.places[part.tensor], spec, entry, part_data)
            if copied != entry.digest:
                raise InvalidRequest(f"the bytes of {spec.name} from {part.tensor_offset_bytes} on are not those sent")
            if not is_finite:
                raise InvalidRequest(f"{spec.name} is not finite, so what is served stays as it is")
            update.received_bytes[part.tensor] += part.size_bytes

    def _copy(self, place: int, spec: TensorSpec, entry: BucketEntry, data: memoryview) -> tuple[bytes, bool]:
        """Hand bytes to who takes them; their digest, and whether they are finite."""
        taker = self._receiving().adding or self._target
        running, is_finite = digests.Running(), True
        for begin, end in digests.steps(len(data)):
            with data[begin:end] as step:
                # Copied first: if the sender wrote here meanwhile, what it wrote is in the digest, and is noticed.
                taker.write(place, entry.part.tensor_offset_bytes + begin, step)
                running.update(step)
                is_finite = is_finite and are_finite(step, spec.dtype)
        return running.digest(), is_finite

    def verify(self) -> Manifest:
        """What has come, all of it, added up if need be.

        Raises:
            InvalidRequest: something has not come, or a sum is not finite.
        """
        update = self._receiving()
        pairs = zip(update.manifest.tensors, update.received_bytes, strict=True)
        short = [spec.name for spec, received in pairs if received < spec.size_bytes]
        if short:
            raise InvalidRequest(f"the update is to be committed, but bytes of {_some(short)} have not come")
        if update.adding is not None:
            update.adding.hand_over()
        self.state = UpdateState.VERIFIED
        return update.manifest

    def commit(self) -> None:
        """Serve what was verified."""
        assert self.state is UpdateState.VERIFIED and self._update is not None
        update = self._update
        self._target.commit(update.manifest.version)
        self.version = update.manifest.version
        self._base = None if update.adding is None else update.adding.base
        self._end()

    def discard(self) -> None:
        """Forget the update under way, if any; what is served stays."""
        if self._update is not None:
            log.warning("update of the weights dropped", extra={"version": self._update.manifest.version})
            taker = self._update.adding or self._target
            self._end()
            taker.discard()

    def start_over(self) -> None:
        """What is served are the weights of the start again, which the target was loaded with anew."""
        assert self._update is None
        self.version = self._version_at_start
        self._base = None

    def _end(self) -> None:
        self._update = None
        self.state = UpdateState.SERVING

    def _receiving(self) -> _Update:
        assert self.state is UpdateState.RECEIVING and self._update is not None
        return self._update

    def _all_places(self, announced: Sequence[TensorSpec]) -> tuple[int, ...]:
        places = tuple(self._place(spec) for spec in announced)
        missing = self._places.keys() - {spec.name for spec in announced}
        if missing:
            raise InvalidRequest(f"the update lacks {_some(missing)}; every tensor of the model must come")
        return places

    def _admit_adapter(self, manifest: Manifest, adapter: AdapterSpec) -> AddingUp:
        factors = {factor for change in adapter.changes for factor in self._factors(change)}
        missing = {spec.name for spec in factors - set(manifest.tensors)}
        if missing:
            raise InvalidRequest(f"the update lacks {_some(missing)}; float32 factors of every change must come")
        others = [spec for spec in manifest.tensors if spec not in factors]
        if others:
            self._all_places(others)
            return AddingUp(self._target, manifest.tensors, adapter, base=None)
        if self._base is None or self._base.name != adapter.base:
            held = "none" if self._base is None else self._base.name.hex()
            raise ModelMismatch(f"the update changes base {adapter.base.hex()}, and the base held is {held}")
        return AddingUp(self._target, manifest.tensors, adapter, base=self._base)

    def _factors(self, change: LowRankSpec) -> tuple[TensorSpec, TensorSpec]:
        place = self._places.get(change.tensor)
        if place is None or len(self._specs[place].shape) != 2:
            raise InvalidRequest(f"{change.tensor} is to be changed, and is no matrix of the model")
        return change.factors(self._specs[place].shape)

    def _place(self, announced: TensorSpec) -> int:
        place = self._places.get(announced.name)
        if place is None:
            raise InvalidRequest(f"the model has no tensor {announced.name}")
        own = self._specs[place]
        if announced != own:
            raise InvalidRequest(
                f"{announced.name} is announced as {announced.dtype} of {announced.shape}; "
                f"the model has {own.dtype} of {own.shape}"
            )
        return place

    def _expected(self, update: _Update, entry: BucketEntry) -> TensorSpec:
        """The tensor of an entry, which must be where that tensor's bytes go on."""
        part = entry.part
        if part.tensor >= len(update.places):
            raise InvalidRequest(f"a part of tensor {part.tensor}; {len(update.places)} tensors were announced")
        spec = update.manifest.tensors[part.tensor]
        expected = update.received_bytes[part.tensor]
        if part.tensor_offset_bytes != expected or expected + part.size_bytes > spec.size_bytes:
            raise InvalidRequest(
                f"{part.size_bytes} bytes of {spec.name} from {part.tensor_offset_bytes} on; "
                f"{expected} of its {spec.size_bytes} bytes have come, and parts come in order"
            )
        if part.size_bytes % spec.dtype.size_bytes:
            raise InvalidRequest(f"{part.size_bytes} bytes of {spec.name} end within an element; it is {spec.dtype}")
        return spec


def _some(names: set[str] | list[str]) -> str:
    return f"{', '.join(sorted(names)[:5])} ({len(names)} in all)"
