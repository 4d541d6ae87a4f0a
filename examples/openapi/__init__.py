"""An OpenAPI document that says what is answered when the database says no."""
