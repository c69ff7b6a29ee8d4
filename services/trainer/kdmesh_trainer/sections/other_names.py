"""What other trainers call the keys of ours, for whoever brings a configuration along."""

from __future__ import annotations

from collections.abc import Mapping

_WHOLE_STEP = "batch.sequences (of a whole step, on all ranks)"

OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("lr", "max_lr"), "optimizer.learning_rate"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), "optimizer.schedule"),
    "warmup_ratio": "optimizer.warmup_fraction",
    **dict.fromkeys(("max_grad_norm", "gradient_clipping"), "optimizer.max_gradient_norm"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "optimizer.betas"),
    "adam_epsilon": "optimizer.epsilon",
    "optim": "optimizer.name",
    "max_steps": "steps",
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "epochs"),
    **dict.fromkeys(("batch_size", "train_batch_size", "per_device_train_batch_size"), _WHOLE_STEP),
    "gradient_accumulation_steps": _WHOLE_STEP,
    "micro_batch_size": "batch.max_tokens",
    **dict.fromkeys(("max_length", "max_seq_len", "max_seq_length", "cutoff_len", "sequence_len"), "data.max_tokens"),
    **dict.fromkeys(("dataset", "dataset_name", "datasets", "train_file"), "data.train"),
    **dict.fromkeys(("model_name_or_path", "base_model"), "student.model"),
    **dict.fromkeys(("teacher_model", "teacher_model_name_or_path"), "teacher.addresses"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "student.lora.rank"),
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "lora_target_modules": "student.lora.target_modules",
    "load_in_4bit": "student.lora.base",
    "gradient_checkpointing": "student.activation_checkpointing",
    "attn_implementation": "student.attention",
    **dict.fromkeys(("bf16", "fp16", "torch_dtype"), "student.compute_dtype"),
    "torch_compile": "student.compile",
    "use_liger_kernel": "student.liger_kernels",
    **dict.fromkeys(("output_dir", "save_dir"), "output"),
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluation.every",
    "report_to": "trackers",
    "num_generations": "source.samples_per_prompt",
    "max_completion_length": "source.sampling.max_new_tokens",
}
"""Names of transformers' TrainingArguments, of TRL, PEFT, axolotl, LLaMA-Factory and DeepSpeed, each with the key that
means the same, or what comes closest.
"""
