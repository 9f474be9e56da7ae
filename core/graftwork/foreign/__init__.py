"""Folders that other code wrote: what they are, where their base is, and a checkpoint made of them."""
