"""How messages arrive: the Celery application, messages that nobody can read, the order of queues."""
