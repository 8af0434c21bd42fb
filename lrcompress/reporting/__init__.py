"""Results as plain data, and the reports that show them: JSON, CSV, Markdown, HTML, figures."""
