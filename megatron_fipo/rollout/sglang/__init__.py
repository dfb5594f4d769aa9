"""The engine over SGLang servers: calls, answers, and which request goes where."""
