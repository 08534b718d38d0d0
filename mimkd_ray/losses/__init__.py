"""The losses: mutual-information bounds, critics, MIMKD, Hinton's KD, and the rivals, one file each. Pure PyTorch."""
