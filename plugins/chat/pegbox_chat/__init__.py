"""The command `pegbox chat`: talk to a run or to any model, in the terminal."""
