"""Command lines and settings of the published code as recipes of ours."""
