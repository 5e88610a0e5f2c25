"""How wake-ups arrive: the Celery application, messages that cannot be read, fairness among queues."""
