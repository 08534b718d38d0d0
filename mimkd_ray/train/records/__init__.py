"""Files that a run writes: checkpoints, metrics, results; and the times at which it does."""
