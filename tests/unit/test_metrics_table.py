"""The page of metrics is what the code says."""

from __future__ import annotations

from tools import generate_metrics


def test_the_page_is_up_to_date() -> None:
    assert generate_metrics.page(text := generate_metrics.PAGE.read_text(encoding="utf-8")) == text, (
        "run `make metrics`"
    )


def test_every_metric_says_what_it_counts_in_a_sentence() -> None:
    for service in ("teacher", "rollout", "trainer"):
        rows = generate_metrics.rows(service)
        assert len(rows) > 20
        for row in rows:
            assert row.name.startswith(f"kdmesh_{service}_")
            assert row.meaning.endswith("."), row
            assert ("seconds" in row.name) == ("seconds" in row.unit), row
            assert ("_bytes" in row.name) == (row.unit == "bytes"), row
