"""Time of each stage with and without a strategy: `vtoken bench`.

`shapes` builds models of published shapes with random weights, `timing` times the stages of a call, `cells`
puts strategies beside the unpatched model in turns, `report` reads, compares and draws what was measured.
"""
