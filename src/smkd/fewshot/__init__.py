"""Few-shot evaluation: features, episodes, heads, accuracy with its interval."""
