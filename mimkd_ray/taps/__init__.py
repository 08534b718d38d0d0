"""Taps: features of named layers, the default layers, and the pairing of teacher and student."""
