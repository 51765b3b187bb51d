"""The layers of MiniMax-M2 on SGLang's building blocks."""
