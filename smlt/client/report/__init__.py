"""The report of a run: what became of it, drawn and told in one page. docs/report.md."""
