"""From TOML to a plan: run files, settings, the machine, and why a plan cannot work."""
