"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake outside the code: a wrong key, a missing folder, a checkpoint of another recipe.

    The message says what was wrong, what was expected and what to do. The command line prints
    it without a traceback and exits with code 2.
    """
