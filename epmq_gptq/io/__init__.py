"""Files, folders, the hub and the console: what everything else reads and writes through."""
