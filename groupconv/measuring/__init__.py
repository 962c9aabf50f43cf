"""Measuring on a GPU, and the search for the fastest algorithm and configuration of each pass, beside F.conv2d.

`command` is `groupconv tune`. `lab` runs, checks and times calls on a GPU, `stub` pretends to where there is none,
`peers` are the calls of PyTorch and others. `contenders` are who runs, `search` decides what to time, `share` between
how many processes, `journal` keeps every result, `results` makes a configuration file of them, `summary` sums them up.
"""
