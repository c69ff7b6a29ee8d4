"""The output head of a causal LM, taken apart so that logits can be made elsewhere."""

from __future__ import annotations

from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.losses.head import OutputHead
from kdmesh.types import HeadSpec


def head_spec(model: PreTrainedModel, vocabulary_size: int) -> HeadSpec:
    """How `model` makes logits, for a tokenizer of `vocabulary_size` tokens.

    Raises:
        ConfigError: the tokenizer has more tokens than the head has rows.
    """
    head = output_head(model)
    if vocabulary_size > head.vocabulary_size:
        raise ConfigError(
            f"the tokenizer of {model.name_or_path} has {vocabulary_size} tokens; "
            f"its output head has only {head.vocabulary_size} rows"
        )
    return HeadSpec(
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
        vocabulary_size=vocabulary_size,
        padded_vocabulary_size=head.vocabulary_size,
        has_bias=head.bias_V is not None,
    )


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head's own tensors, padding rows included, with the constants of the model's config.

    The tensors carry gradients like any parameter. When `model` is sharded by FSDP, they are
    whole only inside its root module's forward: call this there.

    Raises:
        ConfigError: the model has no output embeddings, or scales its logits to nothing.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise ConfigError(f"model type {model.config.model_type} of {model.name_or_path} has no output head")
    config = model.config.get_text_config()
    scale = _constant(config, "logit_scale", 1.0) * _constant(config, "lm_head_multiplier", 1.0)
    divisor = _constant(config, "logits_scaling", 1.0)
    if scale == 0 or divisor == 0:
        raise ConfigError(
            f"{model.name_or_path} has logit_scale {scale} and logits_scaling {divisor}; neither may be 0"
        )
    softcap = _constant(config, "final_logit_softcapping", 0.0)
    return OutputHead(
        weight_VD=linear.weight,
        bias_V=linear.bias,
        logit_scale=scale / divisor,
        logit_softcap=softcap or None,
    )


def _constant(config: object, name: str, absent: float) -> float:
    """A number of a family's config. Families name the same idea differently, and most leave it out."""
    value = getattr(config, name, None)
    return absent if value is None else float(value)
