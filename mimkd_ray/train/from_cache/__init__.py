"""The teacher cache as a training run sees it."""
