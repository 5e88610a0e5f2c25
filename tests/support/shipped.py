"""What ``deploy/`` ships for Prometheus and Grafana."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
DASHBOARD = FOLDER.with_name("grafana") / "latentline.json"


def dashboard_expressions() -> list[str]:
    """Of all panels."""
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


def alert_expressions() -> dict[str, str]:
    """By the alerts' names."""
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
