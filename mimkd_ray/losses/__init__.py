"""The losses: mutual-information bounds, critics and the MIMKD loss; its rivals are in methods/. Pure PyTorch."""
