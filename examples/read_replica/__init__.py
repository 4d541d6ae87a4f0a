"""A read replica, installed under another name."""
