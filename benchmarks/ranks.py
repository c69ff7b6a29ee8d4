"""Two gloo ranks of this machine, one thread each, as processes of a benchmark's own module, and a student for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoConfig

from benchmarks.measure import say

RANKS = 2


def on_ranks(module: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """What each rank tells; it runs `module` with `arguments` and ends in `tell`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    common = {**os.environ, **{key: str(value) for key, value in place.items()}}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def save_student(directory: Path, *, vocabulary: int) -> None:
    """The configuration of a student of eight narrow layers, for ranks that draw its weights."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(directory)


def tell(figures: Mapping[str, object]) -> NoReturn:
    """Ends this rank as the trainer does: gloo's threads must not meet an interpreter that goes down."""
    say(json.dumps(figures))
    os._exit(0)
