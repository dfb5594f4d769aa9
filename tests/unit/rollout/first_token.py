"""The reward of the controller's tests."""


def reward(response: str, answer: str) -> float:
    """The response's first token, if the prompt wants a reward at all."""
    if answer == "refuse":
        raise ValueError("the scorer broke down")
    return float(response.split()[0]) if answer == "signal" else 0.0
