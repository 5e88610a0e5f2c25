"""What an image is made of: a software bill of materials (CycloneDX) and the licences of its Python packages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from .engine import Engine

# In an environment of their own, so that they do not list themselves. Neither is a part of an image.
TOOLS = "cyclonedx-bom==7.5.0 pip-licenses==5.5.5"
SCRIPT = """
python -m venv /out/tools
/out/tools/bin/python -m pip install --quiet {tools}
cd /out
tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o {name}.cdx.json "$(command -v python)"
tools/bin/pip-licenses --python="$(command -v python)" --from=mixed --format=json --with-urls --output-file={name}.licenses.json
rm -rf tools
"""


def write(engine: Engine, tag: str, out: Path) -> dict[str, int]:
    """Both files in ``out``, named for the image; returns how many packages have which licence."""
    name = tag.partition(":")[0]
    out.mkdir(parents=True, exist_ok=True)
    engine.once(tag, SCRIPT.format(tools=TOOLS, name=name), out)
    packages = json.loads((out / f"{name}.licenses.json").read_text())
    return dict(Counter(package["License"] for package in packages).most_common())
