"""What each plugin of a config changes: short paired runs, with it and without it.

The run with all plugins is made before and after each run that lacks one, each in a process of its own, so that a
machine that slows down is seen as what it is. Every run takes the first steps of the run as it is configured, on the
same rows with the same seed, and is cut off there: nothing is evaluated, saved or exported.
"""
