"""The reference backend: every operation by its own definition, in numpy."""
