"""Tiny random Hugging Face models with a tokenizer, saved as directories."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY_SIZE = 320
"""Tokens of the tokenizer; also the rows of every model's head unless vocab_size is overridden."""

CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHAPE = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}

_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

_SINKS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}

MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **_MLA},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        **_MLA,
    },
    # Every other of its layers has a window, the first too.
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _YARN},
}
"""Mixtures of experts: model type -> what makes this family special. Each is one of FAMILIES too."""

_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_chunk_size": 16,
}

_GRANITE = {
    **_MAMBA,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "logits_scaling": 4.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
}

_NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 6,
    "n_groups": 2,
    "chunk_size": 16,
    "time_step_min": 1e-12,  # which transformers raises time steps to; none is smaller
    "time_step_floor": 0.05,
}

_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}

HYBRID_MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_5_moe_text": {**MIXTURES["qwen2_moe"], **_LINEAR},
    "qwen3_next": {**MIXTURES["qwen2_moe"], **_LINEAR},
    "granitemoehybrid": _GRANITE,
    "nemotron_h": _NEMOTRON,
    "lfm2_moe": {
        **_CONVOLUTIONS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
}
"""Mixtures of experts among HYBRIDS."""

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _LINEAR,
    "olmo_hybrid": _LINEAR,
    "falcon_h1": {
        **_MAMBA,
        "mamba_d_ssm": 64,
        "mamba_rms_norm": True,
        "lm_head_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "key_multiplier": 0.5,
        "mlp_multipliers": [0.9, 0.4],
        "ssm_multipliers": [0.4, 0.3, 0.6, 0.5, 0.7],
        "attention_out_multiplier": 0.7,
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.6,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "lfm2": _CONVOLUTIONS,
    "lfm3": {
        "layer_types": ["conv", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 8,
    },
    **HYBRID_MIXTURES,
}
"""Models whose layers carry a state from token to token: model type -> what makes this family special. Each is one of
FAMILIES too."""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {
        "sliding_window": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True, "use_qk_norm": True},
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
    },
    "phi": {"partial_rotary_factor": 0.5},  # its head has a bias
    "granite_swa": {**_SINKS, "attention_multiplier": 0.3},
    "mimo_v2_flash": {**_SINKS, "v_head_dim": 4, "mlp_layer_types": ["dense", "dense"]},
    **MIXTURES,
    **HYBRIDS,
}
"""Model type -> what makes this family special."""


class TinyModels:
    """Makes each directory once and keeps it; callers must not change what they are given."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(
        self,
        family: str = "qwen3",
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        tokenizer: bool = True,
        **overrides: Any,
    ) -> Path:
        """Directory of a random model of `family`; every parameter, biases and norms too, is random.

        Args:
            family: a key of FAMILIES.
            seed: of the weights; equal arguments give equal weights.
            dtype: of the saved weights.
            tokenizer: whether a tokenizer with a chat template lies beside them.
            **overrides: any attribute of the model's config.
        """
        name = "-".join([family, str(seed), str(dtype), str(tokenizer), *(f"{k}={overrides[k]}" for k in overrides)])
        path = self._root / name.replace("/", "_")
        if not path.exists():
            save_model(path, family, seed=seed, dtype=dtype, **overrides)
            if tokenizer:
                save_tokenizer(path)
        return path

    def student_and_teacher(self) -> dict[str, str]:
        """Directories of two models of one shape but for the student's head, which is its embedding."""
        return {
            "student": str(self.path("qwen3", seed=1, tie_word_embeddings=True)),
            "teacher": str(self.path("qwen3", seed=2)),
        }


def save_model(path: Path, family: str, *, seed: int, dtype: torch.dtype, **overrides: Any) -> None:
    """Writes a random model of `family` to `path`."""
    config = AutoConfig.for_model(family, **{**_SHAPE, **FAMILIES[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path)


def save_tokenizer(path: Path, *, bos_token: str | None = None) -> None:
    """Writes a byte-level BPE tokenizer of VOCABULARY_SIZE tokens, trained on the standard library, to `path`."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([bos_token] if bos_token else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([textwrap.__file__], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos_token,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Directories of tiny random models."""
    return TinyModels(tmp_path_factory.mktemp("tiny_models"))
