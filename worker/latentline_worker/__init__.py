"""The GPU side of latentline: Celery workers that hold a latent diffusion model and batch denoise steps."""
