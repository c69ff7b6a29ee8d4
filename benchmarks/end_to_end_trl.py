"""Runs TRL's GKDTrainer on the end_to_end benchmark's inputs; started with the Python of TRL's own environment."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.end_to_end_inputs import MAX_TOKENS, SEQUENCES_PER_STEP, prepare


class _Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


class _CountingGKDTrainer(GKDTrainer):
    """Counts the tokens that are not padding."""

    tokens: list[int]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.tokens.append(int(inputs["attention_mask"].sum()))
        return super().training_step(model, inputs, num_items_in_batch)


def main(folder: Path, num_chats: int, steps: int) -> None:
    """Print one JSON object: tokens and seconds of the steps after the first."""
    inputs = prepare(folder, num_chats=num_chats)
    tokenizer = AutoTokenizer.from_pretrained(inputs.student)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = _CountingGKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(inputs.student, dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(inputs.teacher, dtype=torch.float32),
            args=GKDConfig(
                output_dir=output,
                max_steps=steps,
                per_device_train_batch_size=SEQUENCES_PER_STEP,
                max_length=MAX_TOKENS,
                lmbda=0.0,
                beta=0.0,
                temperature=1.0,
                learning_rate=1e-4,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=load_dataset("json", data_files=str(inputs.chats), split="train"),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.tokens = []
        trainer.train()
    result = {"tokens": sum(trainer.tokens[1:]), "seconds": clock.ends[-1] - clock.ends[0], "steps": steps - 1}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
