"""A class without hooks."""


class SamplePlugin:
    """It would be listed and do nothing."""
