"""Hyperparameter search: spaces, algorithm, trials and what they leave; its pages are in report/."""
