"""``latentline demo``: a set of different jobs on embedded services, from prompts to images in a folder."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from latentline.client import Client
from latentline.errors import LatentlineError
from latentline.images import Images
from latentline.jobs import JobRecord, JobRequest, Phase, Status
from latentline.operations import Outcome

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
TILE_PX, CAPTION_PX, COLUMNS = 192, 34, 4


def run(prompts: list[str] | None, out: Path) -> int:
    """Start everything, run the jobs, fetch the pictures, stop everything; 0 when every job succeeded."""
    console = Console()
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
        with console.status("starting broker, object store, API and worker ..."):
            stack = Stack(data, port=0, model=None)
            stack.start()
        try:
            with Client(stack.settings) as client:
                started = time.monotonic()
                ids = [_accepted(outcome).id for outcome in client.submit_many(requests)]
                records = _follow(console, client, ids)
                console.print(f"{len(ids)} jobs in {time.monotonic() - started:.1f} s on {stack.url}")
                saved = _save(records, Images(stack.settings), out)
        finally:
            stack.stop()
    except LatentlineError as error:
        print(f"latentline demo: {error.message}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(data, ignore_errors=True)
    _report(console, records)
    if saved:
        contact_sheet(saved, out / "contact-sheet.png")
        console.print(f"pictures in {out}/, all on one page: {out / 'contact-sheet.png'}")
    return 0 if all(record.status is Status.SUCCEEDED for record in records) else 1


def _accepted(outcome: Outcome) -> JobRecord:
    if isinstance(outcome, LatentlineError):
        raise outcome
    return outcome


def _follow(console: Console, client: Client, ids: list[str]) -> list[JobRecord]:
    """A bar per job with its step, and how many jobs the batch holds, until all have ended."""
    progress = Progress(
        TextColumn("{task.description:<34.34}"), BarColumn(bar_width=28), TextColumn("{task.fields[note]}"), console=console
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
                    description=record.request.prompt,
                    completed=record.num_steps if record.status is Status.SUCCEEDED else record.step,
                    total=record.num_steps,
                    note=f"{record.step}/{record.num_steps} {note}",
                )
            together = sum(r.status is Status.RUNNING and r.phase is Phase.DENOISING for r in records)
            progress.update(occupancy, completed=together, note=f"{together} jobs share each step")
            if all(record.status.terminal for record in records):
                return records
            time.sleep(POLL_S)


def _save(records: list[JobRecord], images: Images, out: Path) -> list[tuple[JobRecord, Path]]:
    saved = []
    for record in records:
        for ref in record.images[:1]:
            data = images.download(ref.key)
            if hashlib.sha256(data).hexdigest() != ref.sha256:
                raise LatentlineError(f"{ref.key}: the stored picture is not the one that was made")
            path = out / f"{record.id}.png"
            path.write_bytes(data)
            saved.append((record, path))
    return saved


def _report(console: Console, records: list[JobRecord]) -> None:
    table = Table("job", "prompt", "scheduler", "steps", "queue wait", "run time", "seed", "URL")
    for record in records:
        wait = (record.started_at or record.created_at) - record.created_at
        took = (record.finished_at or 0) - (record.started_at or 0)
        url = (record.images[0].url or "").split("?")[0] if record.images else (record.error.message if record.error else "")
        request = record.request
        table.add_row(
            record.id[:13],
            request.prompt,
            request.scheduler,
            str(record.num_steps),
            f"{wait:.2f} s",
            f"{took:.2f} s",
            str(request.seed),
            url,
        )
    console.print(table)
    steps = sum(r.timings.get("denoise_steps", 0) for r in records)
    shared = sum(r.timings.get("shared_steps", 0) for r in records)
    if steps:
        console.print(f"{shared:.0f} of {steps:.0f} denoise steps ({shared / steps:.0%}) were shared by two jobs or more")


def contact_sheet(saved: list[tuple[JobRecord, Path]], path: Path) -> None:
    """All images on one page, each above its prompt."""
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
