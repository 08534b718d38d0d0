"""Batches in loader processes, on their way to the device."""
