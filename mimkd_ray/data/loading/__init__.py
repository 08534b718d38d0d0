"""Batches made in loader processes and copied to the device."""
