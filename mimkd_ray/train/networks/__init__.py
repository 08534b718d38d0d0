"""The networks of a run: student, teacher and critics, built, placed and optimised."""
