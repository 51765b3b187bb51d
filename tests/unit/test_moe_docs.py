"""What docs/communication.md and docs/deepep.md tell operators, against the plan."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from sglang_minimax.cli.main import app
from sglang_minimax.cli.topology import architecture
from sglang_minimax.moe_exchange import rules
from sglang_minimax.moe_exchange.plan import plan_for
from sglang_minimax.support import Launch, refusals

DOCS = Path(__file__).parents[2] / "docs"
FIELDS = {"tp-size": "tp", "attn-dp-size": "dp", "ep-size": "ep", "nnodes": "nodes"}


def starts() -> list[tuple[str, str]]:
    """(options, path) of the rows of the operators' table."""
    text = (DOCS / "communication.md").read_text()
    table = text[text.index("## For operators") : text.index("## The paths")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [(row[1], row[2]) for row in rows if len(row) == 4][2:]


def test_the_operators_table_is_what_is_taken() -> None:
    arch, before = architecture(None), ""
    assert len(starts()) == 6
    for options, path in starts():
        asked = f"{before} {options}" if options.startswith("the same") else options
        before = asked
        sizes = {FIELDS[name]: int(size) for name, size in re.findall(r"--([a-z-]+) (\d+)", asked)}
        backend = re.search(r"--moe-a2a-backend (\w+)", asked)
        launch = Launch(
            **sizes,
            hardware="cuda",
            capability=90,
            quantization=arch.recipe.method,
            moe_a2a_backend=backend[1] if backend else "none",
        )
        assert refusals(arch, rules.resolved(launch)) == []
        assert f"`{plan_for(arch, rules.resolved(launch)).path.name}`" in path


def test_commands_print_what_is_shown() -> None:
    tried = 0
    for file in ("communication.md", "deepep.md"):
        blocks = re.findall(
            r"```\n\$ sglang-minimax (.*)\n((?:.+\n)+?)```", (DOCS / file).read_text()
        )
        for command, shown in blocks:
            result = CliRunner().invoke(app, shlex.split(command))
            printed = [line.rstrip() for line in (result.stdout + result.stderr).splitlines()]
            wanted = [line for line in shown.splitlines() if line != "..."]
            assert [line for line in wanted if line not in printed] == []
            tried += 1
    assert tried == 2
