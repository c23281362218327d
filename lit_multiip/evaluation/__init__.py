"""Evaluation: tasks, sampling, scores with their intervals, and the report."""
