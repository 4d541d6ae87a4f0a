"""Two databases under two names, each with its own tables."""
