"""`sglang-minimax`: look at an installation before a server has to."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sglang_minimax import TINY_M2, __version__
from sglang_minimax.cli import accuracy
from sglang_minimax.cli.exits import stop_on_user_error as _stop_on_user_error

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="MiniMax-M2 for SGLang. The server itself is `python -m sglang.launch_server`.",
)


@app.callback()
def main() -> None:
    """Keep `sglang-minimax COMMAND` the form even while there are few commands."""


@app.command()
def version() -> None:
    """Print the version of this package."""
    typer.echo(__version__)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check versions, platform, model class, kernels and hooks; exit 1 if something matters."""
    # Imported here: the check imports SGLang, `--help` should not.
    from sglang_minimax.cli import doctor as checks

    report = checks.examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        checks.show(report)
    raise typer.Exit(1 if report.problems else 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = TINY_M2,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 30000,
) -> None:
    """Run SGLang's server with the bundled tiny-m2; further options go to SGLang."""
    from sglang_minimax.cli.serve import serve as run

    _stop_on_user_error(lambda: run(model, host, port, context.args))


@app.command()
def demo() -> None:
    """Start a server, ask one question that needs thinking and one that needs a tool, stop it."""
    from sglang_minimax.cli.demo import demo as run

    _stop_on_user_error(run)


@app.command()
def validate(
    topology: Annotated[
        str | None, typer.Option(help="One shape, as tp=8,dp=2; without it, the whole list.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder, instead of the list's random weights.")
    ] = None,
    random_config: Annotated[
        str | None,
        typer.Option(help="A MiniMax-M2 config.json or its text; random weights are made for it."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list with one object a shape.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that an engine may be silent.")] = 300.0,
) -> None:
    """Run shapes with SGLang's engine and compare with transformers; exit 1 if any falls short."""
    from sglang_minimax.cli.validate import validate as run

    _stop_on_user_error(lambda: run(topology, checkpoint, random_config, as_json, timeout))


# The sizes, in our short names and SGLang's, for the commands that ask about a topology.
Tp = Annotated[int, typer.Option("--tp", "--tp-size", help="Ranks of a stage.")]
Dp = Annotated[int, typer.Option("--dp", "--attn-dp-size", help="Attention groups.")]
Ep = Annotated[int, typer.Option("--ep", "--ep-size", help="Expert groups.")]
Pp = Annotated[int, typer.Option("--pp", "--pp-size", help="Pipeline stages.")]
Nodes = Annotated[int, typer.Option("--nodes", "--nnodes", help="Machines.")]
RedundantExperts = Annotated[
    int,
    typer.Option(
        "--redundant-experts", "--ep-num-redundant-experts", help="Copies beyond the model's."
    ),
]
DpLmHead = Annotated[
    bool,
    typer.Option("--dp-lm-head", "--enable-dp-lm-head", help="Cut the head over attention-TP."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


#: What no compute capability reaches, but people's "90" does.
NO_CAPABILITY = 20


class Hardware(StrEnum):
    """Where a launch that is asked about would run."""

    cuda = "cuda"
    rocm = "rocm"
    ascend = "ascend"
    cpu = "cpu"


@app.command()
def topology(
    config: Annotated[
        Path | None,
        typer.Option(help="config.json or checkpoint folder; the published shape without."),
    ] = None,
    tp: Tp = 1,
    dp: Dp = 1,
    ep: Ep = 1,
    pp: Pp = 1,
    nodes: Nodes = 1,
    redundant_experts: RedundantExperts = 0,
    dp_lm_head: DpLmHead = False,
    hardware: Annotated[Hardware, typer.Option(help="Where it would run.")] = Hardware.cuda,
    capability: Annotated[
        float, typer.Option(help="Compute capability of the GPUs, with --hardware cuda.")
    ] = 9.0,
    quantization: Annotated[
        str | None, typer.Option(help="As for SGLang; the checkpoint's without.")
    ] = None,
    moe_exchange: Annotated[
        str | None,
        typer.Option(
            envvar="SGLANG_MINIMAX_MOE",
            help="Path to the experts to take: sglang, gather, gather-fp8, gather-fp4, ...",
        ),
    ] = None,
    moe_runner_backend: Annotated[str, typer.Option(help="As for SGLang.")] = "auto",
    moe_a2a_backend: Annotated[str, typer.Option(help="As for SGLang.")] = "none",
    as_json: AsJson = False,
) -> None:
    """Show which rank owns what, and how tokens reach their experts; exit 1 where it is refused."""
    from sglang_minimax.cli.topology import topology as show
    from sglang_minimax.support import Launch

    if capability >= NO_CAPABILITY:
        raise typer.BadParameter(f"write a compute capability of {capability:g} as 9.0 or 10.0.")
    on_gpus = hardware is Hardware.cuda
    launch = Launch(
        tp=tp,
        dp=dp,
        ep=ep,
        pp=pp,
        nodes=nodes,
        ep_redundant=redundant_experts,
        hardware=hardware.value,
        capability=round(10 * capability) if on_gpus else None,
        quantization=quantization,
        moe_exchange=moe_exchange,
        moe_runner_backend=moe_runner_backend,
        moe_a2a_backend=moe_a2a_backend,
        prefill_graphs=on_gpus and pp == 1,
    )
    _stop_on_user_error(lambda: show(config, launch, dp_lm_head=dp_lm_head, as_json=as_json))


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Local checkpoint folder.")],
    layout: Annotated[
        str | None, typer.Option("--topology", help="The sizes in one, as tp=8,ep=8.")
    ] = None,
    tp: Tp = 1,
    dp: Dp = 1,
    ep: Ep = 1,
    pp: Pp = 1,
    nodes: Nodes = 1,
    redundant_experts: RedundantExperts = 0,
    dp_lm_head: DpLmHead = False,
    target: Annotated[
        Path | None,
        typer.Option(help="Model folder, where CHECKPOINT is an Eagle3 draft to judge for it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a checkpoint by its headers: what it holds, and whether and how it would load.

    Exit 1 where it would not load. Example: sglang-minimax inspect /models/MiniMax-M2 --tp 8 --ep 8
    """
    from sglang_minimax.cli.inspect_checkpoint import inspect as show
    from sglang_minimax.legality import Sizes

    sizes = {"tp": tp, "dp": dp, "ep": ep, "pp": pp, "nodes": nodes}
    if layout is not None and any(size != 1 for size in sizes.values()):
        raise typer.BadParameter("give the sizes either in --topology or one by one.")
    asked = Sizes(**sizes, ep_redundant=redundant_experts)
    if target is not None:
        from sglang_minimax.cli.inspect_draft import inspect as show_draft

        model = target
        _stop_on_user_error(lambda: show_draft(checkpoint, model, asked, layout, as_json=as_json))
    _stop_on_user_error(
        lambda: show(checkpoint, asked, layout, dp_lm_head=dp_lm_head, as_json=as_json)
    )


app.add_typer(accuracy.app, name="accuracy")

if __name__ == "__main__":
    app()
