"""Errors that a user of the library can cause and mend."""


class AmskvError(ValueError):
    """Something given to the library does not fit; the message says what, and what to do."""


class UsageError(AmskvError):
    """A command or a function was called with arguments that can never work."""
