"""Blocks on this node's disk, shared by its processes."""
