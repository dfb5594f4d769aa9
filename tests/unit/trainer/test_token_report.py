from megatron_fipo.trainer.token_report import token_pieces
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pieces_of(text: bytes) -> list[str]:
    return token_pieces(bytes_to_ids(text), TOKENIZER.decode)


def bytes_to_ids(text: bytes) -> list[int]:
    """Ids of single bytes, valid UTF-8 or not: the tokenizer's alphabet has a character for each."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return TOKENIZER.convert_tokens_to_ids([character[byte] for byte in text])


def test_every_token_has_its_text() -> None:
    assert pieces_of(b"3 + 4\n") == ["3", " ", "+", " ", "4", "\n"]


def test_a_character_of_several_tokens_stands_with_the_first() -> None:
    assert pieces_of("aé日b".encode()) == ["a", "é", "", "日", "", "", "b"]
    assert pieces_of("😀".encode()) == ["😀", "", "", ""]


def test_bytes_that_are_no_character_are_shown_one_by_one() -> None:
    assert pieces_of(b"a\xff\xe9b") == ["a", "\ufffd", "\ufffd", "b"]
    assert pieces_of(b"\xff" + "é".encode()) == ["\ufffd", "é", ""]


def test_a_space_that_a_tokenizer_drops_at_the_start_is_kept_inside() -> None:
    def decode(ids: list[int]) -> str:
        return "".join(" word" for _ in ids).lstrip()

    assert token_pieces([1, 2, 1], decode) == [" word", " word", " word"]
