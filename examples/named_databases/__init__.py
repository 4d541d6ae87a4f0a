"""Two databases under two names, each with tables of its own."""
