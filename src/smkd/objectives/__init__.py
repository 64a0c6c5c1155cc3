"""The losses: pure functions over named axes, and the module that weighs them and keeps the centres."""
