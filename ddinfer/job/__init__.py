"""A job from its configuration to its report: prepare, run, rank 0's part, restarts, shutdown."""
