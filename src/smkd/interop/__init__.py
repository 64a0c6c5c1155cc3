"""Weights and settings of other projects: reading, recognising and turning them into ours."""
