"""The rivals of MIMKD, one file each, and their registry."""
