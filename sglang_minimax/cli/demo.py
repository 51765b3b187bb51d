"""`sglang-minimax demo`: one question that needs thinking, one that needs a tool."""

from __future__ import annotations

import json
import re
import tempfile
from typing import Any

from rich.console import Console

from sglang_minimax.cli.local_server import LocalServer, ServerFailed

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
THINKING_QUESTION, THINKING_ANSWER = "What is 347 + 185?", 532
TOOL_QUESTION, TOOL_ANSWER = "What is 812 - 349?", 463

_EXPRESSION = re.compile(r"\s*(\d+)\s*([+-])\s*(\d+)\s*")
_FINAL_ANSWER = re.compile(r"####\s*(-?\d+)")


def demo() -> int:
    """Start a server, ask both questions, stop it; 0 only if both answers are right."""
    console = Console(highlight=False)
    with tempfile.TemporaryFile() as log:
        server = LocalServer(arguments=["--log-level", "warning"], log=log)
        try:
            with console.status("importing SGLang and starting the server"):
                server.start()
                server.wait_until_ready()
            right = ask_both(server.url, console)
        except ServerFailed as error:
            log.seek(0)
            console.print(log.read().decode(errors="replace")[-4000:], markup=False)
            console.print(f"[bold red]failed[/] {error}")
            return 1
        finally:
            server.stop()
    console.print("[bold green]both right[/]" if right else "[bold red]a wrong answer[/]")
    return 0 if right else 1


def ask_both(url: str, console: Console) -> bool:
    """Ask both questions of the server at `url` and print every step."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    thinking = [{"role": "user", "content": THINKING_QUESTION}]
    first = _ask(client, thinking, console)
    with_tool = [{"role": "user", "content": TOOL_QUESTION}]
    second = _ask(client, with_tool, console, tools=[CALCULATOR])
    if second.tool_calls:
        with_tool += [second.model_dump(exclude_none=True), *_results(second.tool_calls, console)]
        second = _ask(client, with_tool, console, tools=[CALCULATOR])
        used_tool = True
    else:
        used_tool = False
    return (
        final_answer(first.content) == THINKING_ANSWER
        and used_tool
        and final_answer(second.content) == TOOL_ANSWER
    )


def _ask(client: Any, messages: list[dict[str, Any]], console: Console, **options: Any) -> Any:
    if messages[-1]["role"] == "user":
        console.rule(f"[bold]{messages[-1]['content']}[/]", align="left")
    reply = (
        client.chat.completions.create(
            model="tiny-m2", messages=messages, temperature=0, max_tokens=256, **options
        )
        .choices[0]
        .message
    )
    if reasoning := getattr(reply, "reasoning_content", None):
        console.print("[cyan]reasoning[/]", reasoning.strip())
    for call in reply.tool_calls or ():
        console.print("[magenta]tool call[/]", f"{call.function.name}({call.function.arguments})")
    if answer := (reply.content or "").strip():
        console.print("[green]answer[/]", answer)
    return reply


def _results(calls: list[Any], console: Console) -> list[dict[str, Any]]:
    messages = []
    for call in calls:
        result = calculate(json.loads(call.function.arguments)["expression"])
        console.print("[magenta]tool result[/]", result)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return messages


def calculate(expression: str) -> str:
    """The value of `a + b` or `a - b` as text, or a sentence that says it is neither."""
    match = _EXPRESSION.fullmatch(expression)
    if match is None:
        return f"cannot evaluate {expression!r}"
    left, sign, right = match.groups()
    return str(int(left) + int(right) if sign == "+" else int(left) - int(right))


def final_answer(text: str | None) -> int | None:
    """The number after `####`, as in GSM8K, or None."""
    found = _FINAL_ANSWER.findall(text or "")
    return int(found[-1]) if found else None
