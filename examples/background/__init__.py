"""Work that runs only after a successful commit."""
