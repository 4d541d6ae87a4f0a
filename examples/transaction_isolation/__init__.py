"""What goes wrong when transactions meet, and what prevents it."""
