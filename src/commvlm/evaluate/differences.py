"""Why two scores differ, in words, from their receipts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .receipts import Receipt


def differences(a: Receipt, b: Receipt) -> list[str]:
    """One sentence a cause, what weighs most first; the last one says whether the gap is more than chance."""
    said = []
    if a["task"] != b["task"]:
        said.append(f"They are scores of different tasks, {a['task']} and {b['task']}: they cannot be compared.")
    if a["rule"] != b["rule"]:
        said.append(
            f"A was scored by the rule {a['rule']}, B by {b['rule']}; `commvlm rescore` shows both on one file."
        )
    said += _references(a, b)
    if unread := _differing(a, b, "unparsable"):
        said.append(f"{unread[0]} of A's answers and {unread[1]} of B's could not be read.")
    if bared := _differing(a, b, "unwrapped"):
        said.append(
            f"A wrapper such as 'The answer is ...' was taken off {bared[0]} of A's answers, {bared[1]} of B's."
        )
    said += _prompts(a, b)
    if _get(a, "box_codec") != _get(b, "box_codec"):
        said.append(f"Boxes are written as {_get(a, 'box_codec')} in A, as {_get(b, 'box_codec')} in B.")
    said += _answers(a, b)
    said += _plain("versions", "ran with", a["versions"], b["versions"])
    if not said:
        said.append("The receipts agree in everything that makes a score.")
    return [*said, _gap(a, b)]


def _references(a: Receipt, b: Receipt) -> list[str]:
    said = []
    if _get(a, "split") != _get(b, "split"):
        said.append(f"A is on the split {_get(a, 'split')}, B on {_get(b, 'split')}.")
    hashes = [{name: _get(file, "sha256") for name, file in receipt["files"].items()} for receipt in (a, b)]
    odd = sorted(name for name in {*hashes[0], *hashes[1]} if _get(hashes[0], name) != _get(hashes[1], name))
    if odd:
        said.append(f"They were held against different files ({', '.join(odd)}): the contents are not the same.")
    if a["n"] != b["n"]:
        said.append(f"A is the mean of {a['n']:,} items, B of {b['n']:,}: another set or another unit.")
    return said


def _prompts(a: Receipt, b: Receipt) -> list[str]:
    first, second = (_get(receipt, "prompt") or {} for receipt in (a, b))
    if not _get(first, "first") or not _get(second, "first") or _get(first, "sha256") == _get(second, "sha256"):
        return []
    return [f"The questions were asked in other words: A began with {first['first']!r}, B with {second['first']!r}."]


def _answers(a: Receipt, b: Receipt) -> list[str]:
    first, second = (_get(_get(receipt, "predictions") or {}, "sha256") for receipt in (a, b))
    if first is not None and first == second:
        return (
            ["The answers are the same, byte for byte: only the scoring differs."] if a["value"] != b["value"] else []
        )
    made = _get(a, "made"), _get(b, "made")
    if None in made:
        return ["The answers are not the same file, and at least one receipt does not say who made them."]
    return _plain("made", "was answered with", *made)


def _plain(field: str, verb: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Every entry that differs, nested ones by their dotted names."""
    first, second = _flat(a), _flat(b)
    return [
        f"A {verb} {name} {_get(first, name)}, B with {_get(second, name)}."
        for name in dict.fromkeys((*first, *second))
        if _get(first, name) != _get(second, name)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, entry in value.items():
        found |= _flat(entry, f"{prefix}{name}.") if isinstance(entry, Mapping) else {f"{prefix}{name}": entry}
    return found


def _gap(a: Receipt, b: Receipt) -> str:
    gap = b["value"] - a["value"]
    said = f"B is {abs(gap):.2f} {'above' if gap >= 0 else 'below'} A ({a['value']:.2f} and {b['value']:.2f})"
    errors = _get(a, "standard_error"), _get(b, "standard_error")
    if None in errors:
        return f"{said}; without standard errors nothing says whether that is more than chance."
    spread = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    verdict = "more than chance explains" if abs(gap) > 1.96 * spread else "within what other images would change"
    return f"{said}: {verdict}, if the images were drawn apart (standard errors {errors[0]:.2f} and {errors[1]:.2f})."


def _differing(a: Receipt, b: Receipt, name: str) -> tuple[Any, Any] | None:
    """Both figures, where both receipts have one and they differ."""
    pair = _get(a, name), _get(b, name)
    return None if None in pair or pair[0] == pair[1] else pair


def _get(value: Mapping[str, Any], name: str) -> Any:
    """None where the receipt of an older version or another tool says nothing."""
    return value.get(name)
