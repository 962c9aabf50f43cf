"""Tuning: the search for the fastest algorithm and configuration of each pass on a GPU, beside F.conv2d.

`command` is `groupconv tune`. `lab` runs, checks and times calls on a GPU, `stub` pretends to where there is none;
`search` decides what to time, `journal` keeps every result, `results` makes a configuration file of them.
"""
