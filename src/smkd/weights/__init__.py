"""Weights of other projects and of ours: fetching, reading, recognising and turning them into checkpoints."""
