"""Questions asked of a model, answers scored, and base and adapter compared."""
