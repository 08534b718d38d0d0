"""How values of configs are checked, and written down as JSON and as text."""
