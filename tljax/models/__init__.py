"""Models: pure Linen, made of `tljax.layers` alone."""
