"""Example applications for fastapi-sqlnative, each with its own tests."""
