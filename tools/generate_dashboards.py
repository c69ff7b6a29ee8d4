"""Generates the Grafana dashboards of the chart, or with --check says whether they are up to date.

Run it as `python -m tools.generate_dashboards`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import dashboards
from tools.dashboards import Dashboard, Panel, Variable

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "helm" / "kdmesh" / "files" / "dashboards"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24


@dataclass(slots=True)
class _Place:
    """Where the next panel goes: rows are filled from the left."""

    x: int = 0
    y: int = 0
    height: int = 0

    def take(self, width: int, height: int) -> dict[str, int]:
        if self.x + width > _COLUMNS:
            self.x, self.y, self.height = 0, self.y + self.height, 0
        taken = {"x": self.x, "y": self.y, "w": width, "h": height}
        self.x, self.height = self.x + width, max(self.height, height)
        return taken


def rendered(dashboard: Dashboard) -> str:
    """The JSON that Grafana imports."""
    place = _Place()
    panels = [_panel(number, panel, place) for number, panel in enumerate(dashboard.panels, start=1)]
    tree = {
        "uid": f"kdmesh-{dashboard.name}",
        "title": f"kdmesh / {dashboard.title}",
        "description": dashboard.description,
        "tags": ["kdmesh"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {"type": "dashboards", "tags": ["kdmesh"], "asDropdown": False, "keepTime": True, "title": "kdmesh"},
        ],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                *map(_variable, dashboard.variables),
            ]
        },
        "annotations": {"list": []},
        "panels": panels,
    }
    return json.dumps(tree, indent=1) + "\n"


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": variable.query, "refId": variable.name},
        "definition": variable.query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def _panel(number: int, panel: Panel, place: _Place) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": place.take(panel.width, panel.height),
        "targets": list(_targets(panel)),
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _targets(panel: Panel) -> Sequence[dict[str, Any]]:
    is_table = panel.kind == "table"
    return [
        {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            **({"instant": True, "range": False, "format": "table"} if is_table else {}),
        }
        for index, query in enumerate(panel.queries)
    ]


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.is_stacked else "none"}
        defaults["custom"] = {
            "fillOpacity": 60 if panel.is_stacked else 10,
            "stacking": stacking,
            "showPoints": "never",
        }
    if panel.unit == "percentunit":
        defaults |= {"min": 0, "max": 1}
    return defaults


def _options(panel: Panel) -> dict[str, Any]:
    match panel.kind:
        case "timeseries":
            return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        case "stat":
            return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
        case "table":
            return {"showHeader": True}


def main() -> None:
    """Generate, or check with --check."""
    made = {FOLDER / f"{dashboard.name}.json": rendered(dashboard) for dashboard in dashboards.ALL}
    if sys.argv[1:] != ["--check"]:
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")
        return
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += [path for path in FOLDER.iterdir() if path not in made]
    if stale:
        sys.exit(f"out of date, run `make dashboards`: {', '.join(str(path.relative_to(ROOT)) for path in stale)}")


if __name__ == "__main__":
    main()
