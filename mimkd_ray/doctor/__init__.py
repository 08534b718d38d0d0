"""Checks of machines before money is spent."""
