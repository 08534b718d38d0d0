"""Configs of the jobs beside training: data, evaluation, export, search, checks."""
