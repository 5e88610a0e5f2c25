"""What tests share beyond fixtures: a tiny model, a cluster of real processes, a proxy and a receiver that misbehave."""
