"""The commands `pegbox chat` (talk to a run or to any model) and `pegbox generate` (answer every row of a file)."""
