"""A page in the browser: a few photographs per class become a classifier, and its answers are shown with reasons."""
