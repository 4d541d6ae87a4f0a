"""An OpenAPI document that includes the responses to database failures."""
