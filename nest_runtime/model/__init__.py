"""The base model: where its FFN neurons are, what identifies it, and how it is loaded. Knows no patches."""
