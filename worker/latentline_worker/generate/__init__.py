"""A GPU worker: its process, one job from claim to settled record, the leases on its jobs."""
