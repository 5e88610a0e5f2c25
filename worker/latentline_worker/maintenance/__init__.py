"""Periodic duties that belong to no single worker: lost leases, expired jobs, callbacks that are due."""
