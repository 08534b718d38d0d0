"""Accuracy and mutual information on held-out images."""
