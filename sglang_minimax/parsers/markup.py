"""The tags of MiniMax-M2's replies, and how much of an unfinished text may still become one."""

from __future__ import annotations

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
BLOCK_OPEN = "<minimax:tool_call>"
BLOCK_CLOSE = "</minimax:tool_call>"
INVOKE_OPEN = "<invoke name="
INVOKE_CLOSE = "</invoke>"
PARAMETER_OPEN = "<parameter name="
PARAMETER_CLOSE = "</parameter>"


def partial(text: str, *tags: str, start: int = 0) -> int:
    """The length of the longest end of text[start:] that begins one of `tags` and is not all of it.

    Costs as much as the tags are long, whatever the text.

    >>> partial("a < b </thi", "</think>"), partial("a <", "</think>"), partial("a", "</think>")
    (5, 1, 0)
    """
    longest = max(map(len, tags)) - 1
    first = {tag[0] for tag in tags}
    for at in range(max(start, len(text) - longest), len(text)):
        if text[at] in first and any(
            len(text) - at < len(tag) and tag.startswith(text[at:]) for tag in tags
        ):
            return len(text) - at
    return 0
