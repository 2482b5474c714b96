"""What a module of somebody else's network computes, in the words of these operations.

    rule = norms.rule_of(module)                       # NormRule(eps=1e-06, offset=1.0, cast='gemma') or None
    y = rule(x, module.weight)                         # the same numbers, in one pass

Names of classes say little: there are more than a hundred modules called RMSNorm, of at least five kinds. So a module
is tried on made-up inputs and compared with each kind. It is not touched: a copy with small made-up parts is tried, so
that it may be on the meta device. `agrees` compares any other implementation with the module, on any device.
"""
