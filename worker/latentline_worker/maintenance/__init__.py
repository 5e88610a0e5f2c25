"""Periodic duties that belong to no single worker: lost leases, deadlines, expired jobs, callbacks that are due."""
