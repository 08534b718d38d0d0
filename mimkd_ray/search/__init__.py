"""Hyperparameter search: spaces, algorithm, trials and their records; its report is in report/."""
