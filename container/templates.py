"""Fetch the templates that the image brings for ``--output-spaces``.

``TEMPLATEFLOW_HOME=FOLDER python container/templates.py SPACE …``

A template that cannot be fetched is named and left out, and the image is built without it: the
program says what to do when it is asked for.
"""

from __future__ import annotations

import sys

from tlseg_bids.bids.spaces import find_template_file, parse_space
from tlseg_bids.errors import NoInputError


def main(spaces: list[str]) -> None:
    """Fetch the T1w of every space, and say of each where it is."""
    import templateflow.conf  # lists in the folder what there is: later it cannot be written to

    print(f"TemplateFlow in {templateflow.conf.TF_HOME}")
    for space in (one for text in spaces for one in parse_space(text)):
        try:
            print(f"{space}: {find_template_file(space, offline=False)}")
        except NoInputError as error:
            print(f"left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
