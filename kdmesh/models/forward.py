"""A causal LM run up to its final norm over packed sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.models.packing import PackedTokens


def hidden_states_TD(model: PreTrainedModel, packed: PackedTokens, **told: Any) -> Tensor:
    """[T, D] hidden states after the final norm, each sequence as if it were alone; the lm_head does not run.

    Carries gradients when autograd records. When `model` is sharded by FSDP, call this from inside
    its root module's forward. `model` comes from load_causal_lm; `packed` lies on its device.

    Args:
        told: what the attention is told, where the model has another than packed attention; else the lengths.
    """
    told = told or {"packed_lengths": packed.lengths}
    if packed.starts is not None:
        told["packed_starts"] = packed.starts
    images = packed.images
    if images is None:
        output = model.get_decoder()(
            input_ids=packed.token_ids_T[None],
            position_ids=packed.position_ids_T[None],
            use_cache=False,
            **told,
        )
    else:
        positions_3T = images.position_ids_3T
        output = model.base_model(
            input_ids=packed.token_ids_T[None],
            position_ids=packed.position_ids_T[None] if positions_3T is None else positions_3T[:, None],
            use_cache=False,
            **images.inputs,
            **told,
        )
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD
