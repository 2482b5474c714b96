"""The reference of Pegbox, made from what the code declares: hooks, config sections, types, errors and commands.

Nothing is written by hand twice: signatures come from `pegbox.hooks`, settings from the sections that plugins
declare, errors from the core's catalog. The same text is shown in a terminal (`pegbox docs load_model`) and committed
as pages (`pegbox docs --write docs/reference`), and `--check` says when the two differ.
"""
