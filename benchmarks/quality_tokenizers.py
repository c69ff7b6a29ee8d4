"""What each method makes of a student that has another tokenizer than its teacher, in the same number of steps.

The teacher and the text are the demo's; the student's tokenizer is a smaller one of SentencePiece's kind. All students
see the same batches. The distance is over the tokens that both vocabularies have, where they are one token on both
sides, whatever was trained with; the perplexity is of the student's own tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.measure import finish, say, table
from kdmesh.demo import plan as plans
from kdmesh.demo.models import write_model
from kdmesh.demo.plan import BRIEF, STANDARD, Plan
from kdmesh.demo.record import Evaluation, read_record
from kdmesh.demo.stage import Stage, opened
from kdmesh.demo.workspace import METRICS, is_finished
from kdmesh.launch import jobs

_EVALUATIONS = 6  # of each student on its way
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _distil(algorithm: str, *, ce_weight: float = 0.5, **params: Any) -> dict[str, Any]:
    return {"name": "distill", "algorithm": {"name": algorithm, **params}, "ce_weight": ce_weight}


METHODS: Mapping[str, dict[str, Any]] = {
    "SFT": {"name": "sft"},
    "shared tokens, forward KL": _distil("vanilla_kd"),
    "dual space, ETA": _distil("dskd"),
    "dual space, ETA, both trained": _distil("dskd", student_projector="trained"),
    "dual space, CMA": _distil("dskd", token_alignment="cma"),
    "ALM, tau 1": _distil("alm", tau=1),
    "ALM, tau 100": _distil("alm", tau=100),
    "ALM, tau 100, debiased": _distil("alm", tau=100, debias_above=0.1),
    "ULD": _distil("uld"),
    "GOLD": _distil("gold"),
    "GOLD, both terms whole": _distil("gold", matched_weight=1, unmatched_weight=1),
    "ALM, tau 100, no SFT": _distil("alm", tau=100, ce_weight=0),
    "GOLD, no SFT": _distil("gold", ce_weight=0),
}


def main(arguments: Sequence[str]) -> None:
    """Print the table, nearest to the teacher first, and the JSON line."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality_tokenizers", description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of each student  [default: 120]")
    parser.add_argument("--seeds", type=int, default=2, help="students of each method  [default: 2]")
    parser.add_argument("--only", action="append", choices=METHODS, help="a method; may be given several times")
    parser.add_argument("--output", type=Path, help="keeps finished students  [default: runs/quality-tokenizers-STEPS]")
    parser.add_argument("--brief", action="store_true", help="models too small to learn: does it run at all?")
    options = parser.parse_args(arguments)
    standard = BRIEF if options.brief else STANDARD
    every = max(1, options.steps // _EVALUATIONS)
    training = replace(standard.student_training, steps=options.steps, evaluate_every=every)
    found = _measure(
        replace(standard, student_training=training),
        {name: METHODS[name] for name in options.only or METHODS},
        seeds=options.seeds,
        output=options.output or Path(f"runs/quality-tokenizers-{options.steps}"),
    )
    kl = {name: [last.kl_nats_per_token or 0.0 for last in lasts] for name, lasts in found.items()}
    nearest = sorted(found, key=lambda name: statistics.fmean(kl[name]))
    say(f"\nAfter {options.steps} steps, mean of {options.seeds} seeds ± the furthest from it, on held-out text:")
    table(
        ["trained by", "KL over shared tokens, nats", "perplexity"],
        [[name, _spread(kl[name], 4), _spread([last.perplexity for last in found[name]], 1)] for name in nearest],
    )
    means = {name: round(statistics.fmean(kl[name]), 5) for name in nearest}
    perplexity = {name: round(statistics.fmean(last.perplexity for last in found[name]), 2) for name in nearest}
    finish(
        "quality_tokenizers",
        {"steps": options.steps, "seeds": options.seeds, "kl_nats_per_token": means, "perplexity": perplexity},
    )


def _measure(
    plan: Plan, methods: Mapping[str, dict[str, Any]], *, seeds: int, output: Path
) -> dict[str, list[Evaluation]]:
    """Of each method the last evaluation of every seed."""
    found: dict[str, list[Evaluation]] = {name: [] for name in methods}
    with opened(plan, output=output, cache=Path(".cache"), fresh=False) as stage:
        texts = [text for example in stage.corpus.train for text in (example.source, example.docstring)]
        tokenizer = _tokenizer(texts, plan.vocabulary_size // 2)
        write_model(stage.workspace.student_start, plan.student, tokenizer, max_tokens=plan.max_tokens)
        stage.train_teacher()
        server = plans.teacher_server(plan, model=stage.workspace.teacher_model)
        overrides = jobs.served(jobs.TEACHER, stage.serve(jobs.TEACHER, server))
        for seed in range(1, seeds + 1):
            for name, objective in methods.items():
                found[name].append(_train(stage, name, objective, seed, overrides))
    return found


def run_name(name: str, seed: int) -> str:
    """Of the directory of one student."""
    return "".join(letter if letter.isalnum() else "-" for letter in f"{name}-{seed}")


def _train(stage: Stage, name: str, objective: dict[str, Any], seed: int, overrides: list[str]) -> Evaluation:
    """The last evaluation; a run that an earlier call has finished is not made again."""
    workspace = stage.workspace
    run = workspace.run(run_name(name, seed))
    plan = replace(stage.plan, seed=seed)
    if not is_finished(run, steps=plan.student_training.steps):
        tree = plans.student_training(
            plan, corpus=workspace.corpus, start=workspace.student_start, output=run, objective=objective
        )
        tree["data"] |= {"teacher_tokenizer": {"path": str(workspace.teacher_model)}, "unusable": "drop"}
        tree["ranks"] = 1  # several would learn the same
        stage.train(f"{name}, seed {seed}", workspace.write_config(run.name, tree), run, overrides)
    last = read_record(run / METRICS).evaluations[-1]
    assert last.kl_nats_per_token is not None
    say(f"{name}, seed {seed}: {last.kl_nats_per_token:.4f} nats from the teacher, perplexity {last.perplexity:.1f}")
    return last


def _tokenizer(texts: Sequence[str], vocabulary_size: int) -> Tokenizer:
    """Of SentencePiece's kind, with byte tokens: spaces are a letter, and no digit or bracket is apart from a word."""
    backend = Tokenizer(models.BPE(unk_token=_SPECIAL[0], fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=_SPECIAL, show_progress=False)
    )
    written = json.loads(backend.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    written["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(written))
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean, and how far the furthest is from it."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ± {max(abs(value - mean) for value in values):.{digits}f}"


if __name__ == "__main__":
    main(sys.argv[1:])
