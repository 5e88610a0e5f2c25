"""The process that delivers callbacks: a Celery worker with no model and no GPU, and the guard on where it connects."""
