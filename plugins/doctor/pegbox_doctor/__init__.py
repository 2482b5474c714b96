"""What is installed here, what this machine can do, what would stop a run, and a package for a new plugin.

A check looks at one thing, notes facts, and adds a problem where something is broken: what is wrong, why, and what to
type next, as everywhere in Pegbox. Nothing is changed and no network is used. A library that is not installed is not
missed unless a plugin declares that it needs it.
"""
