"""The other systems' side of P3 and P12, each in an environment of its own (see pyproject.toml)."""
