"""Strict stand-ins of engines that need a GPU: executed as programs, they import nothing of the project (docs/operations.md, Engines)."""
