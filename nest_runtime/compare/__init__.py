"""The comparison of NeST with other methods on the same data: fit, answer, judge, tabulate."""
