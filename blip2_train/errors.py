"""The one exception that every command answers with a sentence instead of a traceback."""


class UserError(ValueError):
    """Something the user gave is wrong: the message names it and says what to do.

    Entry points print it as one line and exit with code 2; anything else is a bug and keeps its
    traceback.
    """


class RankError(UserError):
    """Trouble from outside that one rank meets alone, in the middle of a run: exit code 3.

    Nothing that was given is wrong, so the same command may well go on.
    """
