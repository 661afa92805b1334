"""How figures are shown: tables on the terminal, plots, colours, percentages."""
