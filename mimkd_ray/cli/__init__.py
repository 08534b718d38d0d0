"""Command lines, one file a job, and what they share (command_line.py)."""
