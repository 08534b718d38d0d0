"""The only room that imports Ray: training, search, units of work and checks on a cluster."""
