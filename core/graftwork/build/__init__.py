"""From a plan to a model: filled from its base weights, adapted, bound to kernels."""
