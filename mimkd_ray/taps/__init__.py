"""Taps: features of named layers, which layers those are by default, and how teacher and student pair."""
