"""Pydantic in front of the tables, and a test that keeps the two together."""
