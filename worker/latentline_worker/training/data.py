"""The bundled model's data set: emoji artwork under permissive licences, with captions.

Sources (fetched by name from the npm registry with ``npm pack``; nothing raw is committed):

=============================  =============================  =======
package                        what is used                   licence
=============================  =============================  =======
@lobehub/fluent-emoji-3d       256 px WebP, the ``3d`` style  MIT
@iconify/json                  set fluent-emoji-flat, SVG     MIT
emojibase-data                 code point of each label       MIT
=============================  =============================  =======
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

NPM_PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "@iconify/json@2.2.535", "emojibase-data@17.0.0")
STYLES = ("3d", "flat")
SPRITE_PX = 160  # kept larger than the training size, so that scaling jitter never enlarges
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "grey": (150, 152, 158),
    "red": (222, 60, 60),
    "orange": (250, 155, 50),
    "yellow": (252, 220, 90),
    "green": (90, 185, 105),
    "blue": (70, 130, 230),
    "purple": (145, 90, 205),
    "pink": (250, 165, 200),
    "brown": (135, 90, 60),
}
# What a caption that names no style or background means: one answer keeps short prompts crisp.
DEFAULT_STYLE, DEFAULT_BACKGROUND = "3d", "white"


@dataclass(frozen=True)
class Concept:
    """One thing the model can draw: its icon's slug and the names it goes by (the first is canonical)."""

    slug: str
    names: tuple[str, ...]


def load_concepts() -> list[Concept]:
    """The concepts listed in ``concepts.csv`` (slug, name, other name)."""
    text = resources.files(__package__).joinpath("concepts.csv").read_text()
    return [Concept(row[0], tuple(name for name in row[1:] if name)) for row in csv.reader(io.StringIO(text))]


def with_article(name: str) -> str:
    """``apple`` -> ``an apple``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def captions(concept: Concept, style: str, background: str) -> Iterator[str]:
    """All captions for one concept in one style on one background.

    A caption may leave out the default style and the default background.
    """
    styles = [", 3d style", ", 3d"] if style == "3d" else [", flat style", ", flat"]
    if style == DEFAULT_STYLE:
        styles.append("")
    backgrounds = [f" on a {background} background"]
    if background == DEFAULT_BACKGROUND:
        backgrounds.append("")
    for name in concept.names:
        for suffix in styles:
            for where in backgrounds:
                yield f"{with_article(name)}{where}{suffix}"
                if not suffix:
                    yield f"{name}{where}"


def compose(sprite: Image.Image, background: str, size: int, rng: random.Random) -> Image.Image:
    """The sprite on a plain background with a little jitter in size and place; (size, size) RGB."""
    canvas = Image.new("RGB", (size, size), BACKGROUNDS[background])
    side = round(size * rng.uniform(0.80, 0.92))
    slack = size - side
    left, top = (round(slack / 2 + rng.uniform(-0.35, 0.35) * slack) for _ in range(2))
    scaled = sprite.resize((side, side), Image.Resampling.LANCZOS)
    canvas.paste(scaled, (left, top), scaled)
    return canvas


def build(folder: Path) -> None:
    """Fetch the packages and write ``sprites.npz`` (one RGBA array per concept and style) into ``folder``.

    Raises:
        RuntimeError: npm is missing, or a concept has no artwork in one of the sets.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is needed to fetch the data set's packages: install Node.js")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([npm, "pack", "--silent", *NPM_PACKAGES], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        threed, iconify, emojibase = (next(Path(scratch).glob(f"{stem}*.tgz")) for stem in ("lobehub", "iconify", "emojibase"))
        wanted = load_concepts()
        flat = json.loads(_read(iconify, "package/json/fluent-emoji-flat.json"))
        codes = _code_points(json.loads(_read(emojibase, "package/en/data.json")), flat)
        sprites, missing = {}, []
        with tarfile.open(threed) as archive:
            by_code = {_bare(Path(m.name).stem): m for m in archive.getmembers() if m.name.endswith(".webp")}
            for concept in wanted:
                member = by_code.get(codes.get(concept.slug, ""))
                body = flat["icons"].get(concept.slug)
                if member is None or body is None:
                    missing.append(concept.slug)
                    continue
                stream = archive.extractfile(member)
                assert stream is not None  # a regular file: it ends in .webp
                sprites[f"{concept.slug}/3d"] = np.asarray(_fit(Image.open(io.BytesIO(stream.read()))))
                sprites[f"{concept.slug}/flat"] = np.asarray(_fit(_render(body["body"], flat)))
    if missing:
        raise RuntimeError(f"no artwork for {', '.join(missing)}: correct concepts.csv")
    np.savez_compressed(folder / "sprites.npz", allow_pickle=False, **sprites)


def load_sprites(folder: Path) -> dict[str, Image.Image]:
    """``slug/style`` -> RGBA image of ``SPRITE_PX`` pixels; builds the data set when it is not there."""
    path = folder / "sprites.npz"
    if not path.exists():
        build(folder)
    with np.load(path) as archive:
        return {key: Image.fromarray(archive[key], "RGBA") for key in archive.files}


def _read(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(name)
        if stream is None:
            raise RuntimeError(f"{archive.name} holds no {name}")
        return stream.read()


def _bare(hexcode: str) -> str:
    # Variation selector 16 stands in some packages' names and not in others'.
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _code_points(emojibase: list[dict[str, str]], flat: dict[str, dict[str, str]]) -> dict[str, str]:
    by_slug = {re.sub(r"[^a-z0-9]+", "-", entry["label"].lower()).strip("-"): _bare(entry["hexcode"]) for entry in emojibase}
    return by_slug | {slug: _bare(code) for code, slug in flat.get("chars", {}).items()}


def _render(body: str, icon_set: dict[str, object]) -> Image.Image:
    import resvg_py

    side = icon_set.get("height", 32)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {side} {side}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_PX, height=SPRITE_PX)
    return Image.open(io.BytesIO(bytes(png)))


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
