"""The error that a user can cause. Its message names the remedy."""


class EagleError(ValueError):
    """A user-caused error; commands print its message in one line and exit with a non-zero code."""

    user_error = True
