"""One script a question: prints a table, writes JSON, draws a plot from the JSON."""
