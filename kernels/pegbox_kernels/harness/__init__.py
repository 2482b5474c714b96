"""What every operation shares: the record that describes it, the parity test, the benchmark.

`opspec.py` is the record, `registry.py` finds the records, `parity.py` compares an operation with its
reference, `bench.py` measures it beside its peers and refuses to print a speed that parity has not cleared.
"""
