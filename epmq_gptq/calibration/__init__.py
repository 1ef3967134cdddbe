"""Calibration rows: from any source to batches that each belong to one expert."""
