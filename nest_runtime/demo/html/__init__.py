"""What the page is drawn with: text that is escaped, charts, figures, and the terms that explain themselves."""
