"""Configs of other training programs as configs of Pegbox, with a report of every key.

A table for each program says what becomes of each of its keys; keys that only mean something together are read by a
small function. Whatever is in the file ends up in the report: a key can be unknown or not supported, never dropped.
"""
