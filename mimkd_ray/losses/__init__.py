"""The losses: mutual-information bounds, critics, MIMKD and Hinton's KD. Pure PyTorch."""
