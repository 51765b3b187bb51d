"""What MiniMax-M2 writes, taken apart: reasoning, text and tool calls."""
