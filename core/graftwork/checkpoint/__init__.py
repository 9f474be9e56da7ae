"""Checkpoints: saved whole and verified, opened strictly, merged and exported."""
