"""The error a wrong config raises."""


class ConfigError(ValueError):
    """A wrong key, value or file in a config; the message is one line and names the remedy."""

    user_error = True
