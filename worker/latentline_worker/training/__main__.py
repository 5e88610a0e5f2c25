"""``python -m latentline_worker.training STAGE``: each stage is resumable and writes into ``--work``."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m latentline_worker.training", description=__doc__)
    parser.add_argument("stage", choices=("data", "autoencoder", "denoiser", "decoder", "export"))
    parser.add_argument("--data", type=Path, default=Path("build/data"), help="where the data set is kept")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="checkpoints and trained parts")
    parser.add_argument("--minutes", type=float, default=10.0, help="time budget of this stage, over all restarts")
    parser.add_argument("--out", type=Path, default=Path("worker/latentline_worker/models/bundled"), help="export: target")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    # Imported after parsing: --help needs no torch.
    import torch

    torch.set_num_threads(options.threads)
    if options.stage == "data":
        from .data import build

        build(options.data)
    elif options.stage == "denoiser":
        from .denoiser import train as train_denoiser

        train_denoiser(options.data, options.work, options.minutes)
    elif options.stage == "export":
        from .export import export

        export(options.work, options.out)
    else:
        from .autoencoder import train as train_autoencoder

        train_autoencoder(options.data, options.work, options.minutes, decoder_only=options.stage == "decoder")


if __name__ == "__main__":
    main()
