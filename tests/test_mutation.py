"""The mutants of benchmarks/mutation.py: what the rules make of a few lines, and that the named ones still exist."""

from __future__ import annotations

import ast

import pytest

import mutation

SOURCE = b'''
LIMIT = 3

def f(a: int = 1, b=None) -> "x":
    """Returns 1 if a < b."""
    assert a < 2
    if a <= b and not b:
        raise ValueError(f"a is {a + 1}")
    a += 2.5
    g(a * (b), -b)
    h(*zip(a, strict=True))
    return [x for x in a if x is not True]  # \xc3\xa4 < b
'''
CHANGES = {
    "constant": {b"a: int = 2, b", b"a += 5.0", b"x is not False"},
    "comparison": {b"if a < b and", b"x is True"},
    "and / or": {b"a <= b or not b"},
    "sign left out": {b"and b:", b"(b), b)"},
    "negated condition": {b"if not (a <= b and not b):"},
    "statement left out": {
        b"        pass\n    a += 2.5",
        b"    pass\n    g(a",
        b"    pass\n    h(*",
        b"    pass\n    return",
    },
    "arithmetic": {b"g(a / (b)"},
    "swapped arguments": {b"g(-b, a * (b))"},
}


def test_the_rules_change_one_thing_each_and_no_message_annotation_or_constant_outside() -> None:
    made: dict[str, list[bytes]] = {}
    for what, start, end, instead in mutation.Rules(SOURCE):
        made.setdefault(what, []).append(SOURCE[:start] + instead + SOURCE[end:])
    assert made.keys() == CHANGES.keys()
    for what, changes in CHANGES.items():
        assert len(made[what]) == len(changes), (what, made[what])
        for change in changes:
            assert sum(change in changed for changed in made[what]) == 1, (what, change)
    everything = [changed for of_kind in made.values() for changed in of_kind]
    assert len(set(everything)) == len(everything)
    assert all(ast.parse(changed) for changed in everything)


def test_every_mutant_can_be_made_and_the_choice_repeats() -> None:
    """Fails when code moves from under a named mutant or one that is listed as equivalent."""
    mutants = mutation.chosen(list(mutation.GROUPS), 0, False)
    assert mutants == mutation.chosen(list(mutation.GROUPS), 0, False)
    assert len(mutants) >= 100
    assert len({(mutant.module, mutant.source) for mutant in mutants}) == len(mutants)
    for test in {test for mutant in mutants for test in mutant.tests}:
        assert (mutation.ROOT / "tests" / f"test_{test}.py").is_file()


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [("engine.step", "no such text", "0 x 'no such text'"), ("engine.step", "self", "x 'self'"),
     ("engine.nowhere", "self", "no module smkd.engine.nowhere")],
)  # fmt: skip
def test_a_mutant_that_cannot_be_made_is_an_error(
    module: str, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = mutation.Named("gone", module, text, "pass", ("step",))
    monkeypatch.setattr(mutation, "NAMED", (*mutation.NAMED, gone))
    with pytest.raises(SystemExit, match=said):
        mutation.chosen([], 0, False)
    monkeypatch.setattr(mutation, "NAMED", ())
    monkeypatch.setattr(mutation, "EQUIVALENT", {("data.sampler", "x = 1"): "it is not there"})
    with pytest.raises(SystemExit, match=r"no longer a mutant: smkd\.data\.sampler: x = 1"):
        mutation.chosen([], 0, False)
