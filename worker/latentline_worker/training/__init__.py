"""Training of the bundled model: data set, autoencoder, denoiser, export (``python -m latentline_worker.training``)."""
