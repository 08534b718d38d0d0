"""A search as Ray Tune runs it."""
