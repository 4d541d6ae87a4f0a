"""A read replica as a database of another name."""
