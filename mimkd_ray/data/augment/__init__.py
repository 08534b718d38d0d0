"""Decoding, augmented views, and the mixing of images."""
