"""SGLang servers: their agents, how they start, live and end, and which there are."""
