"""Names for token data: what was asked, under which vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from kdmesh.types import TokenSequence

DIGEST_BYTES = 16

_IMAGES_FOLLOW = b"\xff" * 8  # where a length would stand that no array has
_LAYERS_FOLLOW = b"\xfe" + b"\xff" * 7


def digest(sequences: Sequence[TokenSequence], layers: Sequence[int] = ()) -> bytes:
    """16-byte BLAKE2b over ids, positions and images, so that rows can be tied to the request that asked for them.

    Every array is preceded by its length, so no two different requests hash the same bytes.

    Args:
        layers: whose outputs are asked for beside the final hidden states.
    """
    running = RunningDigest(len(sequences))
    for sequence in sequences:
        running.add(sequence)
    return running.digest(layers)


class RunningDigest:
    """What `digest` gives, of sequences that come one after the other."""

    def __init__(self, num_sequences: int) -> None:
        """So many will be added."""
        self._state = hashlib.blake2b(num_sequences.to_bytes(8, "little"), digest_size=DIGEST_BYTES)

    def add(self, sequence: TokenSequence) -> None:
        """Add the next one."""
        for array in (sequence.token_ids, sequence.positions):
            self._state.update(len(array).to_bytes(8, "little"))
            self._state.update(array.astype("<i4").tobytes())
        if sequence.images:
            self._state.update(_IMAGES_FOLLOW)
            self._state.update(len(sequence.images).to_bytes(8, "little"))
            self._state.update(image_names(sequence))

    def digest(self, layers: Sequence[int] = ()) -> bytes:
        """Of all of them; `layers` as in `digest`. Nothing may be added then."""
        if layers:
            self._state.update(_LAYERS_FOLLOW)
            self._state.update(layer_names(layers))
        return self._state.digest()


def image_names(sequence: TokenSequence) -> bytes:
    """Its images as bytes that no other images in other places have; empty without images."""
    return b"".join(
        image.digest + image.first_token.to_bytes(8, "little") + image.num_tokens.to_bytes(8, "little")
        for image in sequence.images
    )


def layer_names(layers: Sequence[int]) -> bytes:
    """Layers as bytes that no others have."""
    return b"".join(layer.to_bytes(4, "little") for layer in layers)


def tokenizer_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """32 hexadecimal digits that name a token -> id map; the order of the mapping does not matter."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        # A token may hold any character, even a lone surrogate.
        encoded = token.encode("utf-8", "surrogatepass")
        state.update(token_id.to_bytes(8, "little"))
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state.hexdigest()
