"""The command `pegbox merge`: a run's adapter put into its base, and checked against the trained model."""
