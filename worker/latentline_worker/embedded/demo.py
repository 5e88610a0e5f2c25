"""``latentline demo``: a set of different jobs on embedded services, from prompts to images in a folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from latentline.client import Client
from latentline.errors import LatentlineError
from latentline.images import Images
from latentline.jobs import JobRecord, JobRequest, Phase, Status
from latentline.operations import Outcome
from latentline.terminal import clean, note_json, note_lines, say_json_line, short

from .stack import Stack

# prompt, scheduler, steps, guidance: different on purpose, so that each batch mixes them all.
SHOWCASE: tuple[tuple[str, str, int, float], ...] = (
    ("a red apple", "dpmpp_2m", 20, 4.0),
    ("a smiling cat", "euler", 30, 4.0),
    ("a rocket", "ddim", 40, 4.0),
    ("a sunflower on a blue background", "unipc", 16, 4.0),
    ("a robot", "dpmpp_2m_karras", 25, 4.0),
    ("a dog on a green background", "euler_ancestral", 36, 4.0),
    ("a slice of pizza, flat style", "dpmpp_2m", 14, 4.0),
    ("a panda", "ddim", 50, 3.5),
    ("a house", "unipc", 24, 4.0),
    ("a crown on a purple background", "euler", 22, 4.5),
    ("a penguin", "dpmpp_2m_karras", 18, 4.0),
    ("a birthday cake", "dpmpp_2m", 32, 4.0),
    ("a guitar on a yellow background", "euler_ancestral", 28, 4.0),
    ("a green frog, flat style", "dpmpp_2m", 12, 3.0),
    ("a red car", "ddim", 45, 4.0),
    ("a cup of coffee", "lcm", 8, 2.0),
)
POLL_S = 0.15
COLUMN_NAMES = ("picture", "prompt", "sampler", "steps", "wait", "run", "seed")
PROMPT_COLUMN, LAST_TEXT_COLUMN, MIN_PROMPT_CHARS = 1, 2, 12
TILE_PX, CAPTION_PX, COLUMNS = 192, 34, 4


def run(prompts: list[str] | None, out: Path, as_json: bool = False) -> int:
    """Start everything, run the jobs, fetch the pictures, stop everything; 0 when every job succeeded.

    With ``as_json``, stdout has one JSON object for each job, and nothing else.
    """
    console = Console(stderr=as_json)
    if prompts:
        requests = [JobRequest.parse({"prompt": text, "guidance_scale": 4.0, "num_inference_steps": 24}) for text in prompts]
    else:
        requests = [
            JobRequest.parse({"prompt": text, "scheduler": scheduler, "num_inference_steps": steps, "guidance_scale": guidance, "seed": i})
            for i, (text, scheduler, steps, guidance) in enumerate(SHOWCASE, 1)
        ]
    out.mkdir(parents=True, exist_ok=True)
    data = Path(tempfile.mkdtemp(prefix="latentline-demo-"))
    try:
        records, saved = _generate(console, requests, data, out)
    except LatentlineError as error:
        if as_json:
            note_json({"error": {"code": error.code, "message": error.message}})
        else:
            note_lines(f"latentline demo: {error.message}")
        return 1
    finally:
        shutil.rmtree(data, ignore_errors=True)
    if as_json:
        for line in _lines(records, saved):
            say_json_line(line)
    else:
        _report(console, list(_lines(records, saved)))
        _report_sharing(console, records)
    if saved:
        sheet = contact_sheet([(record, saved[record.id]) for record in records if record.id in saved], out / "contact-sheet.png")
        if not as_json:
            console.print(Text(clean(f"pictures in {out}/, all on one page: {sheet}")))
    return 0 if all(record.status is Status.SUCCEEDED for record in records) else 1


def _generate(console: Console, requests: list[JobRequest], data: Path, out: Path) -> tuple[list[JobRecord], dict[str, Path]]:
    """The ended jobs, and the picture of each that has one."""
    with console.status("starting") as status:
        stack = Stack(data, tell=lambda part, does, _: status.update(Text(f"{part} {does}")))
        stack.start()
    try:
        with Client(stack.settings) as client:
            started = time.monotonic()
            ids = [_accepted(outcome).id for outcome in client.submit_many(requests)]
            records = _follow(console, client, ids)
            console.print(f"{len(ids)} jobs in {time.monotonic() - started:.1f} s on {stack.url}")
            return records, _save(records, Images(stack.settings), out)
    finally:
        stack.stop()


def _accepted(outcome: Outcome) -> JobRecord:
    if isinstance(outcome, LatentlineError):
        raise outcome
    return outcome


def _follow(console: Console, client: Client, ids: list[str]) -> list[JobRecord]:
    """A bar per job with its step, and how many jobs the batch holds, until all have ended."""
    progress = Progress(
        TextColumn("{task.description:<32.32}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[note]:<24.24}", markup=False),
        console=console,
    )
    occupancy = progress.add_task("batch occupancy", total=len(ids), note="")
    bars = {job_id: progress.add_task(job_id, total=1, note="queued") for job_id in ids}
    records: list[JobRecord] = []
    with Live(progress, console=console, refresh_per_second=8):
        while True:
            records = [client.get(job_id) for job_id in ids]
            for record in records:
                note = record.phase.value if record.phase and not record.status.terminal else record.status.value
                progress.update(
                    bars[record.id],
                    description=short(record.request.prompt, 32),
                    completed=record.num_steps if record.status is Status.SUCCEEDED else record.step,
                    total=record.num_steps,
                    note=f"{record.step}/{record.num_steps} {note}",
                )
            together = sum(r.status is Status.RUNNING and r.phase is Phase.DENOISING for r in records)
            progress.update(occupancy, completed=together, note=f"{together} jobs share each step")
            if all(record.status.terminal for record in records):
                return records
            time.sleep(POLL_S)


def _save(records: list[JobRecord], images: Images, out: Path) -> dict[str, Path]:
    """Write the first picture of each job, under its number; the path of each by the job's id."""
    saved = {}
    for number, record in enumerate(records, 1):
        for ref in record.images[:1]:
            data = images.download(ref.key)
            if hashlib.sha256(data).hexdigest() != ref.sha256:
                raise LatentlineError(f"{ref.key}: the stored picture is not the one that was made")
            path = out / f"{number:02}.png"
            path.write_bytes(data)
            saved[record.id] = path
    return saved


def _lines(records: list[JobRecord], saved: dict[str, Path]) -> Iterable[dict[str, Any]]:
    """What came of each job."""
    for record in records:
        request, started = record.request, record.started_at or record.created_at
        yield {
            "id": record.id,
            "status": record.status.value,
            "picture": str(saved[record.id]) if record.id in saved else None,
            "prompt": request.prompt,
            "sampler": request.scheduler,
            "steps": record.num_steps,
            "wait_s": round(started - record.created_at, 3),
            "run_s": round((record.finished_at or started) - started, 3),
            "seed": request.seed,
            "error": record.error.message if record.error else None,
        }


def _report(console: Console, lines: list[dict[str, Any]]) -> None:
    """A table with one line for each job, also on a terminal of 80 columns; then the errors."""
    rows = [COLUMN_NAMES, *(tuple(clean(cell) for cell in _cells(line)) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    taken = sum(widths) - widths[PROMPT_COLUMN] + len(widths) - 1  # all but the prompts, which are what is shortened
    widths[PROMPT_COLUMN] = min(widths[PROMPT_COLUMN], max(MIN_PROMPT_CHARS, console.width - taken))
    for row in rows:
        cells = [short(text, width) for text, width in zip(row, widths, strict=True)]
        sides = [
            text.ljust(width) if i <= LAST_TEXT_COLUMN else text.rjust(width)
            for i, (text, width) in enumerate(zip(cells, widths, strict=True))
        ]
        console.print(Text(" ".join(sides)), soft_wrap=True)
    for line in lines:
        if line["error"]:
            console.print(Text(clean(f"{line['id']}: {line['error']}")))


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    picture = Path(line["picture"]).name if line["picture"] else line["status"]
    return (
        picture,
        line["prompt"],
        line["sampler"],
        str(line["steps"]),
        f"{line['wait_s']:.1f} s",
        f"{line['run_s']:.1f} s",
        str(line["seed"]),
    )


def _report_sharing(console: Console, records: list[JobRecord]) -> None:
    steps = sum(r.timings.get("denoise_steps", 0) for r in records)
    shared = sum(r.timings.get("shared_steps", 0) for r in records)
    if steps:
        console.print(f"{shared:.0f} of {steps:.0f} denoise steps ({shared / steps:.0%}) were shared by two jobs or more")


def contact_sheet(saved: list[tuple[JobRecord, Path]], path: Path) -> Path:
    """All images on one page, each above its prompt; the path of the page."""
    columns = min(COLUMNS, len(saved))
    rows = -(-len(saved) // columns)
    sheet = Image.new("RGB", (columns * TILE_PX, rows * (TILE_PX + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (record, file) in enumerate(saved):
        left, top = i % columns * TILE_PX, i // columns * (TILE_PX + CAPTION_PX)
        with Image.open(file) as image:
            sheet.paste(image.convert("RGB").resize((TILE_PX - 8, TILE_PX - 8), Image.Resampling.LANCZOS), (left + 4, top + 4))
        request = record.request
        draw.text((left + 6, top + TILE_PX), request.prompt[:32], fill="black")
        draw.text((left + 6, top + TILE_PX + 14), f"{request.scheduler}, {request.num_inference_steps} steps", fill="grey")
    sheet.save(path)
    return path
