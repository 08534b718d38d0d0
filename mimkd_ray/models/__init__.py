"""Networks: built by name (zoo), tapped at named layers (taps), with default taps (stages)."""
