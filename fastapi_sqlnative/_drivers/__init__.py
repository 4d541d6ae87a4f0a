"""Everything the package knows about drivers, dialects and pools."""
