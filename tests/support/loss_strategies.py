"""Random calls of the fused loss, with one teacher or a mixture of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tests.support.loss_cases import SMOOTH, Case
from tests.support.mixture_cases import Further
from tests.support.textbook_losses import Transform

TRANSFORMS = st.builds(
    Transform, scale=st.sampled_from([1.0, 0.0625, 0.7, 2.5]), softcap=st.sampled_from([None, 3.0, 30.0])
)
# So that no two logits reach a cap: which of them comes first would be nobody's to say.
_gentle = st.builds(Transform, scale=st.sampled_from([1.0, 0.0625, 0.7]), softcap=st.sampled_from([None, 60.0]))


def cases(*, name: str, kept: st.SearchStrategy[tuple[str, float] | None] | None = None) -> st.SearchStrategy[Case]:
    """Calls of the divergence `name`."""
    transforms = TRANSFORMS if name in SMOOTH and kept is None else _gentle
    return st.builds(
        _with_ce_only_for_labels,
        st.builds(
            Case,
            seed=st.integers(0, 2**16),
            rows=st.integers(1, 40),
            vocabulary=st.integers(2, 300),
            padding=st.integers(0, 7),
            student_size=st.integers(1, 20),
            teacher_size=st.integers(1, 20),
            spread=st.sampled_from([0.1, 1.0, 4.0]),
            name=st.just(name),
            knob=st.floats(0.05, 0.95),
            kept=st.none() if kept is None else kept,
            temperature=st.sampled_from([1.0, 0.5, 2.0, 3.7]),
            has_labels=st.just(True) if name == "sampled_reverse_kl" else st.booleans(),
            kd_weight=st.sampled_from([1.0, 0.0, 0.6]),
            ce_weight=st.sampled_from([0.0, 0.4, 1.0]),
            has_token_weights=st.booleans(),
            student=transforms,
            teacher=transforms,
            has_bias=st.booleans(),
            chunk_tokens=st.sampled_from([None, 1, 7, 16, 40]),
            upstream=st.sampled_from([1.0, -2.5, 1e-3]),
        ),
    )


def _with_ce_only_for_labels(case: Case) -> Case:
    return case if case.has_labels else replace(case, ce_weight=0.0)


_further = st.builds(
    Further,
    size=st.integers(1, 20),
    share=st.sampled_from([1.0, 0.1, 3.0, 1e-6]),
    own_tokens=st.integers(0, 9),
    has_bias=st.booleans(),
    transform=TRANSFORMS,
)


def further() -> st.SearchStrategy[list[Further]]:
    """One to three more teachers."""
    return st.lists(_further, min_size=1, max_size=3)
