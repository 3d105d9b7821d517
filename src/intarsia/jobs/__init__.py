"""Processes at work: locks between them, what stops them, children and what they say, progress that people see.

On the ground floor: training, comparisons and the preparation of data lock, watch and stop in the same way.
"""
