"""Command lines, one file a job, and what they share."""
