"""Database failures as HTTP answers: at a route, and for a whole application."""
