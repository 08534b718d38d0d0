"""Images: where they come from, in which order, how they look, and how they reach the device."""
