"""Data: where examples come from, what happens to each, in which order they are seen."""
