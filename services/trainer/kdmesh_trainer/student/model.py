"""The student: a causal LM whose loss is computed inside its own forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kdmesh.errors import ConfigError
from kdmesh.losses import FusedLoss, VocabularyShare
from kdmesh.models.context import ContextGroup, Exchange
from kdmesh.models.context_attention import use_context_attention
from kdmesh.models.element_types import parameters_in_float32
from kdmesh.models.fingerprint import architecture_fingerprint
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.head import output_head
from kdmesh.models.images.packing import Packer
from kdmesh.models.layer_outputs import captured, chosen_layers
from kdmesh.models.packing import PackedTokens, slice_of, slices_of
from kdmesh.types import TokenSequence
from kdmesh_trainer.student.compute_copy import ComputeCopy
from kdmesh_trainer.student.lora import Adapter
from kdmesh_trainer.student.spread_head import own_head, spread_head
from kdmesh_trainer.student.weights import StudentWeight, weights_of, without_aliases

if TYPE_CHECKING:
    from kdmesh_trainer.sections.parallel_config import Gather  # which needs pydantic

# (hidden_RD, head, labels_R, and [R, D] of each layer that is looked at) -> the loss of these rows.
RowLoss = Callable[..., FusedLoss]

# Below this, a student is gathered once a step unless it is said otherwise.
_WHOLE_BYTES = 2 * 1024**3

# On a GPU layers are gathered and reduced together until they hold so many parameters: smaller messages cost
# more for the host to start than for the wire to carry. On a CPU buffers of that size are memory that its
# allocator does not use again, for little.
_UNIT_PARAMETERS = {"cuda": 2**25, "cpu": 1}


class LossTotals(NamedTuple):
    """Sums over the rows of one micro-batch. A tuple, because FSDP looks for gradients in tuples only."""

    loss_sum: Tensor  # [] float32, carries the gradient
    sums_5: Tensor  # float64, no gradient: loss, divergence, cross-entropy, rows with equal top-1, top-k overlap
    num_diverging: int  # rows that have a divergence
    num_labelled: int  # rows that have a cross-entropy
    num_overlapping: int  # rows that have a top-k overlap
    num_preferring: int  # rows of which it is known whether both prefer the same token


class Gathered(NamedTuple):
    """Parameters that ranks gather together."""

    module: FSDPModule  # which speaks for all modules that have some of them
    is_frozen: bool


class Student(nn.Module):
    """A causal LM and the number of its tokens that are real.

    Attributes:
        share: the tokens of its head that this rank has, and no others; None: the head is gathered whole.
        is_kept_whole: whether ranks keep whole parameters and gradients from the first micro-batch of a step to the
            last: one all-gather and one reduction a step instead of several for each micro-batch. `shard` decides.
        spread: what is gathered each for itself, as `shard` made it; the last is what the student itself has; none
            where one rank has it whole.
        compute_copy: what that rank computes with instead of its parameters; None: they have the right type.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        vocabulary_size: int,
        adapter: Adapter | None = None,
        algorithm: nn.Module | None = None,
        packer: Packer | None = None,
        is_varlen: bool = False,
        context: ContextGroup | None = None,
        exchange: Exchange = "heads",
        layers: Collection[int] = (),
    ) -> None:
        """
        Args:
            adapter: what was put into `lm`, if anything.
            algorithm: whose parameters are trained beside the model's, and are no part of it; called in `row_loss`.
            packer: lays sequences end to end for `lm`; None: it reads text alone.
            is_varlen: attend to all sequences of a row in one call.
            context: the ranks that hold each row together; None: each has rows of its own.
            exchange: what those ranks exchange in attention; `context` divides the heads that are exchanged.
            layers: decoder layers, counted from 1, whose outputs `row_loss` gets, too, in ascending order.

        Raises:
            ConfigError: the model has not all of `layers`.
        """
        super().__init__()
        self.lm = lm
        self.vocabulary_size = vocabulary_size
        self.adapter = adapter
        self.algorithm = algorithm
        self.share: VocabularyShare | None = None
        self.is_kept_whole = False
        self.spread: list[Gathered] = []
        self.compute_copy: ComputeCopy | None = None
        self._packer = packer or Packer(lm, None)
        self._is_varlen = is_varlen
        self._context = context
        self._exchange = exchange
        self._layers = chosen_layers(lm, layers) if layers else {}
        if context is not None:
            use_context_attention(lm, exchange)

    def pack(self, sequences: Sequence[TokenSequence]) -> PackedTokens:
        """What `forward` takes, on the CPU; without a sequence a blank, for a rank that only joins the collectives.

        Args:
            sequences: of the whole row, also where this rank holds a slice of it.

        Raises:
            InvalidRequest: an image's file has changed, or its bytes are damaged.
        """
        packed = self._packer.pack(sequences)
        context, attended = self._context, None
        if context is not None:
            packed = slice_of(packed, place=context.place, size=context.size)
            if self._exchange == "keys":
                attended = slices_of(packed.lengths, context.size)[context.place].lengths
        return packed.with_starts(attended) if self._is_varlen else packed

    def parameters_apart(self) -> tuple[list[nn.Parameter], ...]:
        """The model's, and the algorithm's where it has some: gradients of each are clipped by themselves."""
        own = [] if self.algorithm is None else list(self.algorithm.parameters())
        return (list(self.lm.parameters()), own) if own else (list(self.lm.parameters()),)

    def weights(self) -> dict[str, StudentWeight]:
        """Its tensors by the names that they have in a model without adapters; tied ones are the same object."""
        return weights_of(self.lm, self.adapter)

    def architecture_fingerprint(self) -> str:
        """Of the model without adapters, which is what others have."""
        weights = without_aliases(self.weights())
        return architecture_fingerprint(self.lm, {name: weight.shape for name, weight in weights.items()})

    @property
    def size_bytes(self) -> int:
        """Of the model's parameters, on all ranks together."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.lm.parameters())

    def forward(self, packed: PackedTokens, row_loss: RowLoss) -> LossTotals:
        """The summed loss of the rows that `packed` names. Collective, with those who hold the other slices too.

        The head is used here, inside the root module's forward, because only here are its
        shards gathered; one that is spread is this rank's part. `row_loss` runs after the body, so it may still wait
        for a teacher.
        """
        if self.compute_copy is not None:
            self.compute_copy.take_places()
        told = {} if self._context is None else {"packed_lengths": packed.lengths, "context": self._context}
        with record_function("body"), captured(self._layers) as outputs:
            hidden_RD = hidden_states_TD(self.lm, packed, **told).index_select(0, packed.rows_R)
        head = output_head(self.lm)
        head = head.sliced(self.vocabulary_size) if self.share is None else own_head(head, self.share)
        loss = row_loss(
            hidden_RD, head, packed.labels_R, *(outputs[layer].index_select(0, packed.rows_R) for layer in self._layers)
        )
        if self.compute_copy is not None:
            self.compute_copy.give_back_after(loss.loss_sum)
        rows = (loss.divergence_R, loss.cross_entropy_R, loss.top1_agreement_R, loss.topk_overlap_R)
        return LossTotals(
            loss_sum=loss.loss_sum,
            sums_5=torch.stack([loss.loss_sum.detach().double(), *(values.double().sum() for values in rows)]),
            num_diverging=len(loss.divergence_R),
            num_labelled=len(loss.cross_entropy_R),
            num_overlapping=len(loss.topk_overlap_R),
            num_preferring=len(loss.top1_agreement_R),
        )


def shard(
    student: Student,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    gather: Gather = "auto",
    unit_parameters: int | None = None,
    offloads: bool = False,
    head_share: type[VocabularyShare] | None = None,
) -> None:
    """Spread the parameters over `mesh`, in place: each few decoder layers, then the rest. One rank may keep all.

    Parameters stay as they are and are gathered as `compute_dtype`, but for those of the layers that transformers keeps
    in float32 in a model of that type, as of routers; gradients are reduced in float32 and *averaged* over all ranks,
    those of other copies too. Every rank must hold the same values before.

    Args:
        mesh: of one dimension, or of two: copies, and the ranks that share one.
        gather: see ParallelConfig.
        unit_parameters: see `units`; None: as the mesh's device needs it.
        offloads: keep shards and their gradients in the host's memory, and copy what is gathered to the device.
        head_share: what to spread the head's tokens over ranks as, which are then never gathered; None: it is whole.
            With another, `mesh` has one dimension and the host keeps nothing.

    Raises:
        ConfigError: the model's head cannot be spread.
    """
    wide = _layers_in_float32(student.lm, compute_dtype)
    is_small = 4 * _num_parameters(student) <= _WHOLE_BYTES
    student.is_kept_whole = is_small if gather == "auto" else gather == "step"
    if mesh.size() == 1 and gather != "micro_batch" and not offloads and head_share is None:
        # A copy of what is trained adds an eighth to what that takes; one of what is frozen would add half.
        copied = [p for p in student.parameters() if p.is_floating_point() and p.dtype != compute_dtype]
        if student.is_kept_whole or all(parameter.requires_grad for parameter in copied):
            if any(parameter.device.type != mesh.device_type for parameter in student.parameters()):
                student.to(mesh.device_type)
            student.compute_copy = ComputeCopy(student, compute_dtype, in_float32=wide) if copied else None
            return
    apart = None
    if head_share is not None:
        student.share = head_share(
            vocabulary_size=student.vocabulary_size,
            padded_size=output_head(student.lm).vocabulary_size,
            rank=mesh.get_local_rank(),
            num_ranks=mesh.size(),
            group=mesh.get_group(),
        )
        apart = spread_head(student.lm, student.share, mesh, compute_dtype=compute_dtype)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Only memory that a GPU copies from is worth pinning, and torch pins none without one.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offloads else OffloadPolicy()
    spread = partial(fully_shard, mesh=mesh, offload_policy=offload)
    for unit in units(student.lm, unit_parameters or default_unit(mesh.device_type)):
        _spread_unit(student, unit, wide, spread, policy)
    spread(student, reshard_after_forward=False, ignored_params=apart, mp_policy=policy)
    student.spread.append(Gathered(cast(FSDPModule, student), is_frozen=_is_frozen(student.parameters())))


def _spread_unit(
    student: Student,
    unit: list[nn.Module],
    wide: set[nn.Parameter],
    spread: Callable[..., object],
    policy: MixedPrecisionPolicy,
) -> None:
    """Gather the layers of `unit` together, and for themselves those of their parameters that are in `wide`."""
    with_wide = [part for layer in unit for part in layer.modules() if not wide.isdisjoint(part.parameters(False))]

    def gather(parts: list[nn.Module], parameters: set[nn.Parameter], policy: MixedPrecisionPolicy) -> None:
        is_frozen = _is_frozen(parameters)
        # What is frozen has no backward pass, after which it would be shards again.
        after_forward = is_frozen or not student.is_kept_whole
        others = _parameters(parts) - parameters
        spread(parts, reshard_after_forward=after_forward, ignored_params=others, mp_policy=policy)
        student.spread.append(Gathered(cast(FSDPModule, parts[0]), is_frozen))

    # First the layers, because FSDP takes nothing inside of what it has been told of before.
    gather(unit, _parameters(unit) - wide, policy)
    if with_wide:
        gather(with_wide, _parameters(with_wide) & wide, replace(policy, param_dtype=torch.float32))


def default_unit(device_type: str) -> int:
    """How many parameters are worth a message of their own."""
    return _UNIT_PARAMETERS.get(device_type, 1)


def units(lm: PreTrainedModel, unit_parameters: int) -> list[list[nn.Module]]:
    """The decoder layers that `shard` gathers together: neighbours of one kind. Before they are sharded.

    Args:
        unit_parameters: layers with as many are gathered by themselves, smaller ones until they have as many.
    """
    found: list[list[nn.Module]] = []
    for layer in decoder_layers(lm):
        last = found[-1] if found else []
        is_alike = (
            last and type(last[0]) is type(layer) and _is_frozen(last[0].parameters()) == _is_frozen(layer.parameters())
        )
        if is_alike and sum(_num_parameters(each) for each in last) < unit_parameters:
            last.append(layer)
        else:
            found.append([layer])
    return found


def checkpoint_activations(lm: PreTrainedModel, *, every: int) -> None:
    """Of every `every`-th decoder layer keep only the inputs for the backward pass. Before `shard`.

    Raises:
        ConfigError: the model's layers do not allow it.
    """
    layers, of_language = decoder_layers(lm), set(lm.get_decoder().modules())
    allowing = [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)]
    for layer in of_language.intersection(layers).difference(allowing):  # a vision tower's embeddings may keep theirs
        raise ConfigError(
            f"student.activation_checkpointing: layers {type(layer).__name__} of {lm.config.model_type} keep all "
            "their activations; only none is possible"
        )
    for layer in allowing[::every]:
        # Not by the layer's own means, which a forward pass that was replaced, as by compile_layers, does not have.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def begin_micro_batch(student: Student, *, is_last: bool) -> None:
    """Tell a sharded student where in its step the next forward and backward pass is."""
    if student.compute_copy is not None:
        student.compute_copy.stays = not is_last
    if isinstance(student, FSDPModule):
        student.set_is_last_backward(is_last)
    for module, is_frozen in student.spread:
        # Until then each copy of the student adds up its own gradient: copies meet once a step.
        module.set_requires_all_reduce(is_last, recurse=False)
        if student.is_kept_whole:
            # Of what is frozen there is nothing to keep, and FSDP looks for it even where nothing was ever gathered.
            module.set_requires_gradient_sync(is_last or is_frozen, recurse=False)
            module.set_reshard_after_backward(is_last, recurse=False)


def release(student: Student) -> None:
    """Give up what a pass without gradients left gathered, so that the parameters are shards again."""
    if student.compute_copy is not None:
        student.compute_copy.give_back()
    for module, _ in student.spread:
        module.reshard()


def decoder_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """The blocks that transformers says must not be split, or may be checkpointed, and of these the outermost."""
    names, found, inside = set(lm._no_split_modules or ()), list[nn.Module](), set[nn.Module]()
    for module in lm.modules():
        is_layer = type(module).__name__ in names or isinstance(module, GradientCheckpointingLayer)
        if is_layer and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def _layers_in_float32(lm: PreTrainedModel, compute_dtype: torch.dtype) -> set[nn.Parameter]:
    """Of the decoder layers' parameters those that stay in float32 where the rest is computed as `compute_dtype`."""
    wide = parameters_in_float32(lm, compute_dtype)
    return {parameter for layer in decoder_layers(lm) for parameter in layer.parameters() if parameter in wide}


def _parameters(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _is_frozen(parameters: Iterable[nn.Parameter]) -> bool:
    return not any(parameter.requires_grad for parameter in parameters)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
