"""Predict, then score: metrics as pure functions, tasks, and a runner that never sees the model."""
