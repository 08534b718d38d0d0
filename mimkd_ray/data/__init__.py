"""Images: their sources, order, augmentation, and loading to the device."""
