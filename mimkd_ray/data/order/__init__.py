"""The rows of each step and lane."""
