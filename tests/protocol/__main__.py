"""`python -m tests.protocol table` runs every search; `... mistakes` tells every counterexample."""

from __future__ import annotations

import sys
import time

from tests.protocol.exchange import Exchange
from tests.protocol.explorer import explore
from tests.protocol.searches import HEADER, SEARCHES
from tests.protocol.trace import told
from tests.protocol.variants import MISTAKES


def _table() -> None:
    print(HEADER)
    for search in SEARCHES:
        start = time.process_time()
        result = search.run()
        if result.counterexample is not None:
            sys.exit(told(Exchange(search.bounds, search.rules), result.counterexample))
        print(search.row(result), flush=True)
        print(f"{time.process_time() - start:.1f} s", file=sys.stderr)


def _mistakes() -> None:
    for mistake in MISTAKES:
        model = Exchange(mistake.bounds, mistake.rules)
        result = explore(model)
        print(f"\n# {mistake.name} ({mistake.why_plausible})")
        print(told(model, result.counterexample) if result.counterexample else "not caught")


if __name__ == "__main__":
    commands = {"table": _table, "mistakes": _mistakes}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python -m tests.protocol {'|'.join(commands)}")
    commands[sys.argv[1]]()
