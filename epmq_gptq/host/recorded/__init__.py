"""Statistics that are kept: what the calibration said of every layer, expert by expert.

From them a merge can be quantized anew without calibration rows and without a forward pass: with
other bits, group sizes, alphas or weights of the experts, or without one of them.
"""
