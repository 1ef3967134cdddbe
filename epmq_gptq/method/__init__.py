"""The mathematics of E-PMQ on plain tensors: statistics, target, choice of alpha, weighting."""
