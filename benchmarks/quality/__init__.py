"""The quality tables: what is measured (plan), how (cells, pool), and how it is shown (tables)."""
