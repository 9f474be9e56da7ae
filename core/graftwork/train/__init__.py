"""The training loop, resuming, and the verdict on a run."""
