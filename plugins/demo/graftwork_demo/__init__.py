"""The demo: a run file and the tiny base weights that it starts from. See examples/demo-base for how they were made."""
