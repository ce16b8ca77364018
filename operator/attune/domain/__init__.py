"""Pure decisions: an observation in, a Plan out. Nothing here knows a clock, a cluster or a logger."""
