"""Building a teacher cache: its plan, its units of work, and what is published when they are done."""
