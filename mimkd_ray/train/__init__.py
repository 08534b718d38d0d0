"""Training: the loop, the step, the student and what feeds them; the same with and without Ray."""
