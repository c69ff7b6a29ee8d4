"""The command line of `kdmesh plan`: python -m kdmesh_trainer.commands.plan."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdmesh.interrupt import quiet_interrupt

with quiet_interrupt():
    from kdmesh.config import config_parser
    from kdmesh.outputs import say
    from kdmesh_trainer.commands.running import run
    from kdmesh_trainer.config import TrainerConfig
    from kdmesh_trainer.sections.source_config import OnPolicy

if TYPE_CHECKING:
    from kdmesh_trainer.memory.job import Job
    from kdmesh_trainer.memory.memory_plan import Plan

_MIB = 2**20
# Of what comes and goes on a CPU: the room between blocks that its allocator keeps. As measured, in float32.
_BETWEEN_BLOCKS = 0.15


def main() -> int:
    """Run the step without memory, and print what it would take. Returns 0, or see `run`."""
    return run(_parser(), _print_plan)


def _print_plan(cfg: TrainerConfig, arguments: argparse.Namespace) -> int:
    told = _plan(cfg, json.loads(arguments.teachers), device=arguments.device, ranks=arguments.ranks)
    say(json.dumps(told) + "\n" if arguments.json else _table(told))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = config_parser("kdmesh_trainer.commands.plan", "Say what memory a run will need.")
    parser.add_argument("--teachers", default="[]", metavar="JSON", help="what is known of the teachers' servers")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="plan for this device")
    parser.add_argument("--ranks", type=int, help="plan for so many ranks")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def _plan(
    cfg: TrainerConfig, servers: list[dict[str, Any]], *, device: str | None, ranks: int | None
) -> dict[str, Any]:
    """Bytes by what they are for: of a rank, and of each teacher's server that is known."""
    from kdmesh_trainer.memory.memory_plan import plan  # not at the top: a bad configuration must not wait for torch

    job = _job(cfg, servers, device=device, ranks=ranks)
    found = plan(job)
    worst = at_worst(found, job.device.type)
    return {
        "device": job.device.type,
        "ranks": job.ranks,
        "context": job.context,
        "tokens_per_micro_batch": sum(job.lengths),
        "worst_phase": found.worst_phase,
        "rank_bytes": dict(worst),
        "rank_peak_bytes": worst.total(),
        "rank_bytes_between_steps": dict(found.resident),
        "rank_host_bytes": dict(found.host),
        "rank_host_peak_bytes": found.host.total(),
        "compares_layers": cfg.layers is not None,
        "teachers_unknown": sorted(set(cfg.all_teachers) - {server["name"] for server in servers}),
        "servers": [
            {"name": server["name"], "weights_bytes": _weights_bytes(server), "slab_bytes": server["slab_bytes"]}
            for server in servers
        ],
    }


def at_worst(found: Plan, device: str) -> Counter[str]:
    """What is held at the plan's worst moment, with what the allocator of a CPU adds."""
    worst = found.phases[found.worst_phase].copy()
    if device == "cpu":
        worst["allocator"] = round(_BETWEEN_BLOCKS * (worst["activations"] + worst["gradients"]))
    return worst


def _job(cfg: TrainerConfig, servers: list[dict[str, Any]], *, device: str | None, ranks: int | None) -> Job:
    import torch

    from kdmesh.models.directory import read_config
    from kdmesh_trainer.builders.context import refuse_unfit_student
    from kdmesh_trainer.builders.layers import refuse_unknown_layers, refuse_unreached
    from kdmesh_trainer.builders.vision import load_reader
    from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer, vocabulary_size
    from kdmesh_trainer.memory.job import Job, TeacherHead

    wanted = device or cfg.student.device
    has_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    ranks = ranks or cfg.ranks or max(1, torch.cuda.device_count() if has_gpu else 1)
    cfg.parallel.check_ranks(ranks)
    refuse_unfit_student(cfg)
    refuse_unknown_layers(cfg)
    refuse_unreached(cfg)
    context = cfg.parallel.context
    student = read_config(cfg.student.model)
    whole, rest = divmod(cfg.batch.max_tokens, cfg.data.max_tokens)
    step_tokens = cfg.batch.sequences * cfg.data.max_tokens
    num_tokens = _tokens_of_teacher(cfg)
    return Job(
        student=cfg.student.model,
        vocabulary_size=vocabulary_size(load_fast_tokenizer(cfg.student.model)),
        teachers=[
            TeacherHead(hidden_size=width, dtype=dtype, num_tokens=num_tokens)
            for width, dtype in map(_teacher, servers)
        ],
        compute_dtype=getattr(torch, cfg.student.compute_dtype),
        device=torch.device("cuda" if has_gpu else "cpu"),
        optimizer=cfg.optimizer,
        ranks=ranks,
        # As long as they may be, and every position with a loss.
        lengths=[cfg.data.max_tokens] * whole + ([rest] if rest >= 2 else []),
        accumulates=isinstance(cfg.source, OnPolicy) or step_tokens > ranks // context * cfg.batch.max_tokens,
        shard_ranks=cfg.parallel.shard_ranks,
        gather=cfg.parallel.gather,
        offloads=cfg.parallel.offload == "all",
        spreads_head=cfg.parallel.head == "vocabulary",
        context=context,
        exchange=cfg.parallel.exchange(student.get_text_config().num_attention_heads),
        lora=cfg.student.lora,
        quantization=cfg.student.quantization,
        freeze=cfg.student.freeze,
        trains_vision=load_reader(cfg) is not None and not cfg.student.freeze_vision,
        frozen_dtype=torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32,
        checkpointed_every=cfg.student.checkpointed_every,
        layers=cfg.layers,
        follows=None if cfg.teacher is None else cfg.teacher.follows_student,
    )


def _tokens_of_teacher(cfg: TrainerConfig) -> int | None:
    """Whose rows of its head a rank has where it has another tokenizer; None: it has the student's."""
    from kdmesh_trainer.data.encoding.other_tokenizer import OtherTokenizerEncoder
    from kdmesh_trainer.data.encoding.recipe import EncoderRecipe
    from kdmesh_trainer.sections.algorithm_config import VanillaKD
    from kdmesh_trainer.sections.objective_config import Distill

    if cfg.data.teacher_tokenizer is None:
        return None
    recipe = EncoderRecipe(student=cfg.student.model, data=cfg.data)
    encoder = recipe.encoder(recipe.tokenizer())
    assert isinstance(encoder, OtherTokenizerEncoder)
    compares_all = isinstance(cfg.objective, Distill) and not isinstance(cfg.objective.algorithm, VanillaKD)
    # Held-out data compare distributions over what both have, for which there is a head beside the whole one.
    compares_shared = not compares_all or cfg.data.held_out is not None
    return compares_all * encoder.teacher_tokens().size + compares_shared * len(encoder.shared.student_ids)


def _teacher(server: Mapping[str, Any]) -> tuple[int, Any]:
    """Width and element type of a teacher's hidden states."""
    import torch

    from kdmesh.models.directory import read_config

    config = read_config(Path(server["model"]))
    dtype = config.dtype or torch.float32 if server["dtype"] == "auto" else getattr(torch, server["dtype"])
    return config.get_text_config().hidden_size, dtype


def _weights_bytes(server: Mapping[str, Any]) -> int:

    from kdmesh.models.body import empty_causal_lm, without_memory

    with without_memory():
        model = empty_causal_lm(Path(server["model"]))
        num_parameters: int = sum(parameter.numel() for parameter in model.parameters())
        return num_parameters * int(_teacher(server)[1].itemsize)


def _rank(ranks: int) -> str:
    return "The only rank" if ranks == 1 else f"One of {ranks} ranks"


def _share(context: int) -> str:
    return "a" if context == 1 else f"1/{context} of a"


def _table(told: Mapping[str, Any]) -> str:
    width = max(len(name) for name in [*told["rank_bytes"], "parameters"]) + 2
    lines = [
        f"{_rank(told['ranks'])}, on {told['device']}, at its worst moment ({told['worst_phase']}), for "
        f"{_share(told['context'])} micro-batch of {told['tokens_per_micro_batch']:,} tokens:",
        *(f"  {name:<{width}}{size / _MIB:>12,.0f} MiB" for name, size in _largest_first(told["rank_bytes"])),
        f"  {'in all':<{width}}{told['rank_peak_bytes'] / _MIB:>12,.0f} MiB",
    ]
    if told["rank_host_bytes"]:
        lines += [
            "and of its host's memory, at most:",
            *(f"  {name:<{width}}{size / _MIB:>12,.0f} MiB" for name, size in _largest_first(told["rank_host_bytes"])),
            f"  {'in all':<{width}}{told['rank_host_peak_bytes'] / _MIB:>12,.0f} MiB",
        ]
    for server in told["servers"]:
        name = f"Teacher {server['name']}".rstrip()
        lines += [
            f"{name}: weights {server['weights_bytes'] / _MIB:,.0f} MiB, "
            f"slab {server['slab_bytes'] / _MIB:,.0f} MiB of shared memory on its node"
        ]
    if told["teachers_unknown"]:
        what = "heads" if not told["compares_layers"] else "heads, and the layers,"
        lines += [f"Without the {what} of teachers whose configuration --serve does not name."]
    return "\n".join(lines) + "\n"


def _largest_first(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: -item[1])


if __name__ == "__main__":
    sys.exit(main())
