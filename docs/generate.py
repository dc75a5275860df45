"""Write the pages and pictures that come from the code.

python docs/generate.py            # write them
python docs/generate.py --check    # exit with 1 if one of them is out of date
"""

import argparse
import sys
from pathlib import Path

from option_tables import options_page
from rewrite_picture import rewrite_picture

FOLDER = Path(__file__).parent
PAGES = {"options.md": options_page, "rewrite.svg": rewrite_picture}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        page, file = make(), FOLDER / name
        if file.is_file() and file.read_text() == page:
            continue
        stale.append(name)
        if not check:
            file.write_text(page)
    for name in stale:
        print(f"{name}: {'out of date, run python docs/generate.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
