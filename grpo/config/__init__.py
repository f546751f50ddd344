"""Configuration: schema, parser, validation, help."""
