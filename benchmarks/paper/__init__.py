"""What ``paper_tables.py`` is made of: the paper's settings, the two benchmarks, the tables."""
