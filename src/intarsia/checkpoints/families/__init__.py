"""One file a family of published models: a table of names, and options both ways. No modelling code."""
