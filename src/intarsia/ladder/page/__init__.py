"""The parts of a self-contained page: escaped markup, figures as SVG, one style sheet, a little script."""
