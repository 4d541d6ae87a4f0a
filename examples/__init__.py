"""Applications built on fastapi-sqlnative, each executed by a test beside it."""
