"""The demo: a run file and the tiny base weights that it starts from. See examples/tiny-vlm for how they were made."""
