"""The built-in rewards, one file each. Each is an object with `options` and `open(options)`: see `opening.Reward`."""
