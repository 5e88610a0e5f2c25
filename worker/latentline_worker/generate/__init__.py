"""The process that generates images: start, drain and stop; one job from claim to settled record; leases; watchdog."""
