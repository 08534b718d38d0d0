"""Which rows a step and a lane see."""
