"""The steps of training: what goes in, one optimisation step, and the engines that take it."""
