"""Recording rules, alerts and dashboards: every query can be read, and asks for what there is."""

from __future__ import annotations

import subprocess
from itertools import combinations
from pathlib import Path

import promql_parser
import pytest
import yaml

from tests.support import promql
from tools import dashboards, generate_dashboards

CASES = promql.ROOT / "tests" / "observability" / "rules.yaml"
QUERIES = [(rule.get("record") or rule["alert"], rule["expr"]) for rule in promql.rules()]
needs_promtool = pytest.mark.skipif(not promql.PROMTOOL.exists(), reason="run `make prometheus-env`")


@pytest.mark.parametrize(("where", "expr"), [*QUERIES, *promql.panel_queries()])
def test_a_query_can_be_read_and_asks_for_metrics_that_there_are(where: str, expr: str) -> None:
    promql_parser.parse(expr)
    assert not promql.metrics_of(expr) - promql.known_metrics()


def test_an_unknown_metric_is_noticed() -> None:
    assert promql.metrics_of('sum by (kdmesh_job) (kdmesh_teacher_token_total{kdmesh_job=~".*"})') == {
        "kdmesh_teacher_token_total"
    }
    assert "kdmesh_teacher_token_total" not in promql.known_metrics()


@needs_promtool
def test_promtool_reads_every_rule_and_every_query(tmp_path: Path) -> None:
    records = [
        {"record": f"query:{index}", "expr": expr, "labels": {"where": where}}
        for index, (where, expr) in enumerate(promql.panel_queries())
    ]
    queries = tmp_path / "queries.yaml"
    queries.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": records}]}), encoding="utf-8")
    files = [*sorted((promql.FILES / "rules").glob("*.yaml")), queries]
    subprocess.run([promql.PROMTOOL, "check", "rules", *files], check=True, capture_output=True)


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    result = subprocess.run([promql.PROMTOOL, "test", "rules", CASES], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested_both_ways_and_every_recorded_series_is() -> None:
    tests = yaml.safe_load(CASES.read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == promql.alerts()
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == promql.alerts()
    asked = {
        name for test in tests for case in test.get("promql_expr_test", ()) for name in promql.metrics_of(case["expr"])
    }
    assert asked == {rule["record"] for rule in promql.rules() if "record" in rule}


def test_operations_say_what_to_do_at_every_alert() -> None:
    page = (promql.ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert {alert for alert in promql.alerts() if f"| `{alert}` |" not in page} == set()


@pytest.mark.parametrize("dashboard", dashboards.ALL, ids=lambda dashboard: dashboard.name)
def test_a_dashboard_is_what_its_description_gives(dashboard: dashboards.Dashboard) -> None:
    path = generate_dashboards.FOLDER / f"{dashboard.name}.json"
    assert path.read_text(encoding="utf-8") == generate_dashboards.rendered(dashboard), "run `make dashboards`"


@pytest.mark.parametrize("name", ["fleet", "job", "teacher"])
def test_panels_do_not_overlap_and_are_told_apart(name: str) -> None:
    panels = promql.dashboards()[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    squares = [
        {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        for place in (panel["gridPos"] for panel in panels)
    ]
    assert not any(one & other for one, other in combinations(squares, 2))
    assert all(x < 24 for square in squares for x, _ in square)
