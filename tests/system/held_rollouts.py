"""A rollout server that draws nothing for as long as a file is there, so that a test can end it in the midst.

`python -m tests.system.held_rollouts CONFIG FILE`. It takes weights and requests meanwhile, and answers REST.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kdmesh_rollout.__main__ import main
from kdmesh_rollout.engine import Finished
from kdmesh_rollout.transformers_engine import TransformersEngine

_LOOK_S = 0.01


def hold_while(file: Path) -> None:
    """From now on every step of an engine in this process waits until `file` is gone."""
    step = TransformersEngine.step

    def held(engine: TransformersEngine) -> list[Finished]:
        while file.exists():
            time.sleep(_LOOK_S)
        return step(engine)

    TransformersEngine.step = held  # type: ignore[method-assign]


if __name__ == "__main__":
    hold_while(Path(sys.argv.pop()))
    main()
