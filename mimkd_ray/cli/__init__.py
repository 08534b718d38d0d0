"""Command lines, one file a job, and their common parts."""
