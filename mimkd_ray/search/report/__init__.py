"""The report.html of a search: figures, tables, and the page around them."""
