"""Grafana dashboards as code; `python -m monitoring.grafana.generate` writes them as JSON."""
