"""What runs beside Data-Juicer, in a process and an environment of its own: the standard library, Data-Juicer and Ray only.

It is started from a copy, as the environment that has Data-Juicer need not have Graftwork.
"""
