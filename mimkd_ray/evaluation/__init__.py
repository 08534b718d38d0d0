"""Evaluation of finished networks: accuracy, calibration, agreement with the teacher, features, corruptions."""
