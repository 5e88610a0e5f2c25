"""Options that several commands have."""

from __future__ import annotations

import click

url_option = click.option("--url", envvar="LATENTLINE_URL", default="http://127.0.0.1:8000", show_default=True, help="The API.")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
