"""A sender in a process of its own, which tests can kill.

`python -m tests.support.weight_sender_process ADDRESS SHAPES_JSON VERSION SECONDS_PER_TENSOR DOOR [FINGERPRINT]` sends
random weights, of which the version is the seed, and writes a line for each tensor that it is about to send. With a
fingerprint it is a teacher's, of float32, that they are sent to.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import cast

from torch import Tensor

from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.rpc.weights.services import ROLLOUTS, TEACHERS
from kdmesh.types import DType
from kdmesh.weights.doors import DoorChoice
from tests.support.weight_targets import FINGERPRINT, random_weights


def main(
    address: str, shapes: str, version: int, seconds_per_tensor: float, door: DoorChoice, teacher: str = ""
) -> None:
    """Send once."""
    wanted = {name: tuple(shape) for name, shape in json.loads(shapes).items()}
    weights = random_weights(wanted, seed=version, dtype=DType.FLOAT32 if teacher else DType.BFLOAT16)

    def maker(name: str, tensor: Tensor) -> Callable[[], Tensor]:
        def make() -> Tensor:
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()
            time.sleep(seconds_per_tensor)
            return tensor

        return make

    makers = [(spec, maker(spec.name, tensor)) for spec, tensor in weights.items()]
    service = TEACHERS if teacher else ROLLOUTS
    with WeightSender([address], service=service, bucket_bytes=2**16, door=door) as sender:
        sender.publish(version, teacher or FINGERPRINT, makers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), cast(DoorChoice, sys.argv[5]), *sys.argv[6:])
