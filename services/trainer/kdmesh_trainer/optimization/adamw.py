"""AdamW over the student's shards, and what of them it moves, how fast, and lets decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from kdmesh_trainer.student.shards import own_shard

if TYPE_CHECKING:
    from kdmesh_trainer.sections.optimizer_config import OptimizerConfig


def build_adamw(
    student: nn.Module, config: OptimizerConfig, *, algorithm: nn.Module | None = None, rate_factor: float = 1.0
) -> Optimizer:
    """AdamW over every parameter that is trained; vectors (norms, biases) do not decay.

    Call it after the student is sharded: sharding replaces the parameters.

    Args:
        algorithm: a part of `student` that does not decay either.
        rate_factor: its learning rate is this times that of the rest.

    Raises:
        ConfigError: `config.moments` needs what is not installed.
    """
    used = parameter_groups(student, config, algorithm=algorithm, rate_factor=rate_factor)
    match config.moments:
        case "float32":
            return ShardedAdamW(used, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
        case "8bit":
            from kdmesh_trainer.optimization.eight_bit import eight_bit_adamw

            return eight_bit_adamw(used, config)
        case _:
            assert_never(config.moments)


def parameter_groups(
    student: nn.Module, config: OptimizerConfig, *, algorithm: nn.Module | None, rate_factor: float
) -> list[dict[str, Any]]:
    """What is trained, by how much it decays, and by how fast it learns; arguments as build_adamw."""
    beside = [] if algorithm is None else list(algorithm.parameters())
    apart = {id(p) for p in beside}
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad and id(p) not in apart]
    decaying = [p for name, p in trained if not holds_vectors(name, p)]
    others = [p for name, p in trained if holds_vectors(name, p)]
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay, "rate_factor": 1.0},
        {"params": others, "weight_decay": 0.0, "rate_factor": 1.0},
        {"params": [p for p in beside if p.requires_grad], "weight_decay": 0.0, "rate_factor": rate_factor},
    ]
    return [group for group in groups if group["params"]]


def holds_vectors(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a norm or a bias, or several in one tensor, as of gpt_oss's experts or Cohere's heads."""
    return parameter.ndim < 2 or name.endswith("bias") or name.rpartition(".")[0].endswith("norm")


class ShardedAdamW(AdamW):
    """Updates shards as the plain tensors that they are.

    By way of DTensor, finding out that each of them may be updated where it lies takes the host longer than the update.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = [own_shard(tensor) for tensor in tensors]
        return has_complex
