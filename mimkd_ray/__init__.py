"""Mutual Information Maximization Knowledge Distillation (arXiv 2110.15946), distributed with Ray."""

__version__ = "0.1.0"
