"""Who writes for data operators, and what was asked and replied, kept so that nothing is asked twice."""
