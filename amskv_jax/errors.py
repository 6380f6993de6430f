"""Errors that a user of the library can cause and mend, and warnings."""


class AmskvError(ValueError):
    """Something given to the library does not fit; the message says what, and what to do."""


class UsageError(AmskvError):
    """A command or a function was called with arguments that can never work."""


class OutOfMemoryError(AmskvError):
    """A device has too little memory for what was asked of it."""


class AmskvWarning(UserWarning):
    """Something was given that the library cannot take as it is; the message says what it does."""
