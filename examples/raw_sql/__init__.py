"""SQL as text, with everything that a request says bound and never written into it."""
