"""How much memory a plan needs, found out before it runs."""
