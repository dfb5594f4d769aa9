import pytest

from megatron_fipo.runtime.seeding import derive_seed

# The first 8 bytes of BLAKE2b (digest size 8) over "type:value" parts joined by \x1f, without the lowest bit. They
# must never change: a run that is repeated with a later release draws the same samples.
KNOWN = [
    ((1, "prompts"), 7699452769410715332),
    ((1, "model"), 3685628262773102683),
    ((5, "4.0", 2, "train:17", 3), 5112787523807218708),
    ((0,), 6711488920161924273),
    ((), 8238016292129134938),
]


@pytest.mark.parametrize(("parts", "seed"), KNOWN)
def test_seeds_are_stable(parts: tuple[int | str, ...], seed: int) -> None:
    assert derive_seed(*parts) == seed


def test_every_part_and_its_type_counts() -> None:
    variants = [
        (1, "a"),
        ("1", "a"),
        (1, "b"),
        (2, "a"),
        ("a", 1),
        (1, "a", ""),
        ("1a",),
        (1,),
        (1, 0),
        (10,),
        (-1, "a"),
    ]
    assert len({derive_seed(*parts) for parts in variants}) == len(variants)


def test_seeds_fit_a_signed_64_bit_number() -> None:
    seeds = [derive_seed("spread", number) for number in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62, "all 63 bits are used"
    # Every bit is set about half the time.
    for bit in range(63):
        assert 850 < sum(seed >> bit & 1 for seed in seeds) < 1150
