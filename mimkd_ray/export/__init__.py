"""A trained student in the forms that other programs read, each compared with it on real images."""
