"""Periodic duties that belong to no single process: lost leases, deadlines, expired jobs, callbacks that are due."""
