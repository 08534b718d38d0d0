"""Pages for people: the report.html of a run and of a comparison, and the shell that the search's report uses too."""
