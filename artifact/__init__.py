"""What crosses the gap, shared by registry, mirror and runtime; must not import any of the three."""
