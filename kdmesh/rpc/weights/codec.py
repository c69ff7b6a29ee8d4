"""Translates between the messages of UpdateWeights and our types; everything on the wire is checked here."""

from __future__ import annotations

from collections.abc import Iterable

from kdmesh.errors import InvalidRequest
from kdmesh.groups.meeting import Invitation
from kdmesh.rpc import codec, group_codec
from kdmesh.rpc.wire_enum import WireEnum
from kdmesh.v1 import weights_pb2 as pb
from kdmesh.weights.buckets import BucketEntry, Part
from kdmesh.weights.digests import DIGEST_BYTES
from kdmesh.weights.doors import Door
from kdmesh.weights.manifest import AdapterSpec, LowRankSpec, Manifest, TensorSpec, UpdatePolicy

MAX_INLINE_BYTES = 2**20
"""Most bytes of a bucket that travels inside its message."""

MAX_GROUP_BYTES = 2**30
"""Most bytes of a bucket that comes through a group: the server holds them once more."""

DOORS = WireEnum(
    "door for weights",
    {
        Door.INLINE: pb.WEIGHT_DOOR_INLINE,
        Door.SHM: pb.WEIGHT_DOOR_SHARED_MEMORY,
        Door.GLOO: pb.WEIGHT_DOOR_GLOO,
        Door.NCCL: pb.WEIGHT_DOOR_NCCL,
    },
)
_POLICIES = WireEnum(
    "update policy",
    {
        UpdatePolicy.FINISH: pb.UPDATE_POLICY_FINISH,
        UpdatePolicy.ABORT: pb.UPDATE_POLICY_ABORT,
        UpdatePolicy.CONTINUE: pb.UPDATE_POLICY_CONTINUE,
    },
)


def manifest_from_wire(m: pb.BeginUpdate) -> Manifest:
    """Raises InvalidRequest when it announces what cannot be."""
    return Manifest(
        version=m.version,
        architecture_fingerprint=m.architecture_fingerprint,
        tensors=tuple(
            TensorSpec(name=t.name, shape=tuple(t.shape), dtype=codec.DTYPES.from_wire(t.dtype)) for t in m.tensors
        ),
        policy=_POLICIES.from_wire(m.policy),
        adapter=_adapter_from_wire(m.adapter) if m.HasField("adapter") else None,
        job=m.job,
    )


def manifest_to_wire(manifest: Manifest) -> pb.BeginUpdate:
    """The same as a message that offers no door: buckets are to come inline."""
    return pb.BeginUpdate(
        version=manifest.version,
        architecture_fingerprint=manifest.architecture_fingerprint,
        tensors=[
            pb.TensorSpec(name=t.name, shape=t.shape, dtype=codec.DTYPES.to_wire(t.dtype)) for t in manifest.tensors
        ],
        policy=_POLICIES.to_wire(manifest.policy),
        adapter=None if manifest.adapter is None else _adapter_to_wire(manifest.adapter),
        job=manifest.job,
    )


def invitation_from_wire(m: pb.JoinGroup) -> Invitation:
    """Raises InvalidRequest when nobody could be invited by it."""
    return group_codec.invitation(m.store_address, m.secret)


def invitation_to_wire(invitation: Invitation) -> pb.JoinGroup:
    """The same invitation as a message."""
    return pb.JoinGroup(store_address=invitation.store_address, secret=invitation.secret)


def entries_from_wire(messages: Iterable[pb.BucketEntry]) -> tuple[BucketEntry, ...]:
    """Raises InvalidRequest when a digest is none."""
    return tuple(_entry_from_wire(m) for m in messages)


def entries_to_wire(entries: Iterable[BucketEntry]) -> list[pb.BucketEntry]:
    """The same entries as messages."""
    return [
        pb.BucketEntry(
            tensor=entry.part.tensor,
            tensor_offset_bytes=entry.part.tensor_offset_bytes,
            bucket_offset_bytes=entry.part.bucket_offset_bytes,
            size_bytes=entry.part.size_bytes,
            digest=entry.digest,
        )
        for entry in entries
    ]


def _adapter_from_wire(m: pb.Adapter) -> AdapterSpec:
    changes = tuple(LowRankSpec(tensor=c.tensor, rank=c.rank, scaling=c.scaling) for c in m.changes)
    return AdapterSpec(base=m.base, changes=changes)


def _adapter_to_wire(adapter: AdapterSpec) -> pb.Adapter:
    changes = [pb.LowRankChange(tensor=c.tensor, rank=c.rank, scaling=c.scaling) for c in adapter.changes]
    return pb.Adapter(base=adapter.base, changes=changes)


def _entry_from_wire(m: pb.BucketEntry) -> BucketEntry:
    if len(m.digest) != DIGEST_BYTES:
        raise InvalidRequest(f"a digest of {len(m.digest)} bytes; it must have {DIGEST_BYTES}")
    part = Part(
        tensor=m.tensor,
        tensor_offset_bytes=m.tensor_offset_bytes,
        bucket_offset_bytes=m.bucket_offset_bytes,
        size_bytes=m.size_bytes,
    )
    return BucketEntry(part=part, digest=m.digest)
