"""What names a sequence's rows: everything that they depend on, and who may have them."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence

from kdmesh.tokens import image_names, layer_names
from kdmesh.types import TokenSequence
from kdmesh_teacher.engine import EngineDescription

KEY_BYTES = 32


class RowKeys:
    """Names by content: equal keys mean equal bytes.

    Rows of weights that can be replaced have names of this process alone: a version's number says nothing of its
    values to another run.
    """

    def __init__(
        self, model: EngineDescription, *, shared: bool | Collection[str], computed_by: Mapping[str, str]
    ) -> None:
        """
        Args:
            shared: as in CacheConfig.
            computed_by: what else decides the bits of a row: the kind of engine, releases of libraries.
        """
        self._shared = shared
        facts = {
            "fingerprint": model.model_fingerprint,
            "hidden_size": model.hidden_size,
            "dtype": model.dtype.value,
            "deterministic": model.is_deterministic,
            "process": secrets.token_hex(16) if model.architecture_fingerprint else "",
            **computed_by,
        }
        self._model = json.dumps(facts, sort_keys=True)

    def key(self, job: str, weight_version: int, sequence: TokenSequence, layers: Sequence[int] = ()) -> bytes:
        """The name of the rows that a job may have of these weights and layers; KEY_BYTES long."""
        # Not tokens.digest, whose 16 bytes tell requests apart: two sequences of one key, made on purpose, must not be
        # to be found, for one job would get rows that it did not ask for from another.
        state = hashlib.blake2b(digest_size=KEY_BYTES)
        for part in (
            self._model.encode(),
            *((b"layers " + layer_names(layers),) if layers else ()),  # as no scope begins
            self._scope(job).encode(),
            weight_version.to_bytes(8, "little"),
            sequence.token_ids.astype("<i4").tobytes(),
            sequence.positions.astype("<i4").tobytes(),
            *((image_names(sequence),) if sequence.images else ()),
        ):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
        return state.digest()

    def _scope(self, job: str) -> str:
        is_sharing = self._shared if isinstance(self._shared, bool) else job in self._shared
        return "shared" if is_sharing else f"job {job}"
