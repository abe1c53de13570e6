"""The one exception for a user's mistake.

Whatever a user can get wrong (a missing file, an unknown field, a width that the heads don't divide) raises
[`UserError`][] with a message of one line: what is wrong, and what to do. The command line prints that line and
exits with code 2; a library user catches it as the `ValueError` that it is.
"""


class UserError(ValueError):
    """A mistake in what the user asked for. The message is one line and says what to do."""
