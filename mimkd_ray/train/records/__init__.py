"""What a run writes: checkpoints, metrics, results; and when."""
