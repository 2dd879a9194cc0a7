# SPDX-License-Identifier: Apache-2.0
"""What all scripts share on the command line: near names for unknown options, one line for an error, exit codes.

Standard library only, so that `--help` answers at once.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR = 2
TRY_AGAIN = 75  # EX_TEMPFAIL: stopped from outside after saving; the same command goes on


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error names the nearest option, and which never guesses an abbreviation."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message, with the nearest option if one was unknown, and exits."""
        words = message.partition("unrecognized arguments: ")[2].split()
        for word in words:
            name, _, value = word.partition("=")
            known = [option for action in self._actions for option in action.option_strings]
            if near := difflib.get_close_matches(name, known, 1):
                message += f"; did you mean {near[0]}?"
            elif name.startswith("--") and value:
                message += f"; fields of the config are set without dashes: {name.lstrip('-')}={value}"
        self.exit(USER_ERROR, f"{self.prog}: {message}\nTry {self.prog} --help\n")


def call(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits: ValueError, which is the user's to mend, as one line on stderr with code 2."""
    try:
        code = main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
