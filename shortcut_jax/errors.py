"""What a user can get wrong: the command line prints these as one line, without a traceback."""


class UserError(ValueError):
    """Something that the user gave cannot be used; the message says what, why and how to fix it."""


class PathError(UserError):
    """A path that is not one of this machine's file system."""
