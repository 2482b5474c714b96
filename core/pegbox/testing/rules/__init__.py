"""The rules, one function each, grouped by what they look at. A rule returns nothing, or raises `RuleBroken`."""
