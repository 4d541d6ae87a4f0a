"""Textual SQL, in which every value from a request is bound."""
