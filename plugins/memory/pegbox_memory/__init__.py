"""What a training run needs of a device's memory, before it runs.

The model of a config is built without weights, with every adapter and patch that the run would have, and one step of
training is made on tensors that have a shape, a data type and a device but no data (torch's fake tensors). What would
be allocated is counted, storage by storage, until it is freed; so the estimate follows what the model does, and no
formula has to know of layers, recomputing, heads or optimizers.
"""
