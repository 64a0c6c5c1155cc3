"""The networks: the Vision Transformer, the projection head, and the student/teacher pair."""
