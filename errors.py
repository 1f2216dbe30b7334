"""The one error that users cause: entry points print its message and exit with 1."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or the configuration key, what was expected and
    what was found.
    """
