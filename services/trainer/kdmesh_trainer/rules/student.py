"""How the student is trained, rounded and written."""

from __future__ import annotations

from collections.abc import Iterator

from kdmesh_trainer.sections.job_config import JobSections


def broken(cfg: JobSections) -> Iterator[str]:
    """Every broken rule of optimizer, micro-batches and rounded matrices."""
    if cfg.optimizer.name == "muon" and cfg.student.lora is not None:
        yield "optimizer.name muon does not go with student.lora, whose factors are no maps of their own"
    if cfg.optimizer.name == "muon" and cfg.parallel.offload == "all":
        yield "optimizer.name muon does not go with parallel.offload all: it multiplies whole matrices"
    if (longest := cfg.data.max_tokens) > cfg.batch.max_tokens:
        yield f"data.max_tokens ({longest}) must not exceed batch.max_tokens ({cfg.batch.max_tokens})"
    yield from _of_quantization(cfg)


def _of_quantization(cfg: JobSections) -> Iterator[str]:
    """Those by which servers compute as the student does, and it is not its own teacher."""
    quantization = cfg.student.quantization
    if quantization is None:
        return
    asks = {
        "source on_policy": cfg.source.kind == "on_policy",
        "evaluation.questions": cfg.evaluation.questions is not None,
    }
    for key, is_asked in asks.items():
        if is_asked and quantization.activations != "none":
            yield (
                f"student.quantization.activations {quantization.activations} does not go with {key}: rollout servers "
                "compute with activations that are not rounded"
            )
    if cfg.teacher_update_every is not None:
        yield (
            "student.quantization does not go with teacher.follows_student: the teacher would have rounded "
            "matrices, too"
        )
