# SPDX-License-Identifier: Apache-2.0
"""What all scripts share on the command line: near names for unknown options, one line for an error, exit codes.

Standard library only, so that `--help` answers at once.
"""

import argparse
import difflib
import os
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

    def parse_known_args(self, args=None, namespace=None):
        """As usual, but an unknown option is told before a missing argument is."""
        words = list(sys.argv[1:] if args is None else args)
        known = [option for action in self._actions for option in action.option_strings]
        commands = any(isinstance(action.choices, dict) for action in self._actions)  # they know their own options
        for word in words[: words.index("--")] if "--" in words else words:
            name, equals, value = word.partition("=")
            if word.startswith("--") and name not in known and not commands:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
                if equals and not near:
                    hint = f"; fields of the config are set without dashes: {name.lstrip('-')}={value}"
                self.error(f"unknown option {name}{hint}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits."""
        self.exit(USER_ERROR, f"{self.prog}: {message}\nTry {self.prog} --help\n")


def call(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits; what the user can mend is one line on stderr and code 2.

    That is ValueError, OSError (a full disk) and ImportError (an extra that is not installed).
    """
    # Without it transformers tells everyone who has no torch to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        code = main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
