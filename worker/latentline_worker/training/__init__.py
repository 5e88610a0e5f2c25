"""Training of a latent diffusion model's parts: data set, autoencoder, denoiser (``latentline train``)."""
