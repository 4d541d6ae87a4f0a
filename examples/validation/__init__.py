"""Pydantic models for the tables, and a test that keeps both in sync."""
