"""From images on disk to batches of augmented views."""
