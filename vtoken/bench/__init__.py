"""Time of each stage with and without a strategy: `vtoken bench`.

`shapes` builds models of published shapes with random weights, `timing` times the stages of a call, `cells`
times strategies in turns with the unpatched model, `report` reads, compares and draws the results.
"""
