"""Pure functions that damage valid content. All take a random generator, so that a case can be repeated."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Container = dict[str, Any] | list[Any]

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**40, 2**63, 2**64 + 1, -(2**63), 10**30),
    *(0.0, 0.5, -0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *(
        "",
        " ",
        "abc",
        "null",
        "1",
        "1e400",
        "nan",
        "a" * 5000,
        "\0",
        "\x1b[31mred",
        "a\nb",
        "\ud800",
        "猫\u202e\U0001f600",
    ),
    *("../canary/secret.txt", "../../../../etc/hostname", "/etc/hostname", "file:///etc/hostname", "..", ".", "/", "~"),
    *("{}", "%s%n", "a/../b", "con\\aux", "__class__", "iter_0000000", "qwen2", "float32"),
)
SHAPES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": {}}, [1, 2, 3], {"a": [1]}, [0] * 3000)
MARK = "@@here@@"
RAW = (
    "[" * 100_000,
    '{"a":' * 20_000,
    "9" * 5000,
    "1e99999",
    "-",
    "nul",
    "NaN",
    '"\\ud800"',
    '"\\u0000"',
    "",
    '"\\x"',
    "'a'",
)
"""Texts to replace a value, which no valid value has."""
YAML_TEXTS = (
    *(
        "\t- a: b\n",
        "a: &a [x]\nb: [*a, *a]\n",
        "!!python/object/apply:os.system ['true']\n",
        "a: [",
        "a: b: c\n",
        "%\n",
    ),
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{y}: &{y} [{','.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi"))
    + "datasets: *i\n",
    *(
        "- 1\n---\n- 2\n",
        "? [a]\n: b\n",
        "2001-01-01: 1\n",
        "1_000: 0o7\n",
        "<<: {a: 1}\n",
        "seq_length: 1:30\n",
        "\x07",
    ),
)


def any_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, TEXTS, SHAPES))))


def places(tree: Any) -> Iterator[tuple[Container, Any]]:
    """(container, key) of every value in a tree of dicts and lists."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield tree, key
            yield from places(value)


def mutate_tree(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """A tree with one change, and its description. Prefers shallow places, where the keys of a format are."""
    tree = copy.deepcopy(tree)
    found = list(places(tree))
    if not found or rng.random() < 0.04:
        value = any_value(rng)
        return value, f"the whole is {value!r:.60}"
    container, key = rng.choice(found[: rng.choice((12, 40, len(found)))])
    change = rng.choice(_CHANGES)
    return tree, f"{key!r:.60}: {change(container, key, rng)}"


def _replace(container: Container, key: Any, rng: random.Random) -> str:
    container[key] = any_value(rng)
    return f"is {container[key]!r:.60}"


def _replace_alike(container: Container, key: Any, rng: random.Random) -> str:
    """Another value of the same type, which passes a check of types only."""
    value = container[key]
    if isinstance(value, bool):
        container[key] = not value
    elif isinstance(value, (int, float)):
        changes = (value + 1, value - 1, -value, value * 2, value * 1000, value // 2, *NUMBERS)
        container[key] = rng.choice(changes)
    elif isinstance(value, str):
        container[key] = rng.choice((value + "x", value[:-1], value * 2, value.upper(), *TEXTS))
    else:
        container[key] = any_value(rng)
    return f"is {container[key]!r:.60}"


def _remove(container: Container, key: Any, rng: random.Random) -> str:
    del container[key]
    return "is gone"


def _add(container: Container, key: Any, rng: random.Random) -> str:
    value = any_value(rng)
    if isinstance(container, list):
        container.insert(rng.randint(0, len(container)), value)
    else:
        container[rng.choice(("surprise", "", "size", "name", "a.b", "\x1b[31m", "__proto__", "猫"))] = value
    return f"has {value!r:.60} beside it"


def _swap(container: Container, key: Any, rng: random.Random) -> str:
    other = rng.choice(list(container.keys()) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]
    return f"is swapped with {other!r:.60}"


def _rename(container: Container, key: Any, rng: random.Random) -> str:
    if isinstance(container, list):
        return _swap(container, key, rng)
    name = rng.choice((f"{key}x", str(key).upper(), str(key)[:-1]))
    container[name] = container.pop(key)
    return f"is called {name!r}"


def _repeat(container: Container, key: Any, rng: random.Random) -> str:
    times = rng.choice((2, 3, 300))
    container[key] = [container[key]] * times
    return f"is a list of {times} of it"


_CHANGES: tuple[Callable[[Container, Any, random.Random], str], ...] = (
    *(_replace, _replace, _replace_alike, _replace_alike, _replace_alike),
    *(_remove, _remove, _add, _swap, _rename, _repeat),
)


def mutate_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A JSON text with one change, of its values or of the text."""
    tree = json.loads(data)
    if rng.random() < 0.8:
        changed, what = mutate_tree(tree, rng)
        return json.dumps(changed, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"), what
    found = list(places(tree))
    if not found:
        return rng.choice(RAW).encode(), "another text"
    container, key = rng.choice(found[: rng.choice((12, len(found)))])
    if isinstance(container, dict) and rng.random() < 0.4:
        first = json.dumps(container[key])
        container[key] = MARK
        second, what = json.dumps(any_value(rng)), "twice"
        raw = f"{first}, {json.dumps(key)}: {second}"
    else:
        raw = rng.choice(RAW)
        container[key], what = MARK, f"as {raw[:20]!r}"
    return json.dumps(tree).replace(f'"{MARK}"', raw).encode(), f"{key!r:.60} is {what}"


def mutate_yaml(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A YAML text with one change."""
    import yaml

    kind = rng.random()
    if kind < 0.2:
        text = rng.choice(YAML_TEXTS)
        return data + text.encode("utf-8", "surrogatepass"), f"ends with {text[:40]!r}"
    if kind < 0.3:
        text = rng.choice(YAML_TEXTS)
        return text.encode("utf-8", "surrogatepass"), f"is {text[:40]!r}"
    changed, what = mutate_tree(yaml.safe_load(data), rng)
    return yaml.safe_dump(changed, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass"), what


def mutate_lines(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file of JSON lines with one line changed, doubled, lost or moved."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return mutate_bytes(data, rng)
    place = rng.randrange(len(lines))
    change = rng.choice(("json", "json", "json", "twice", "gone", "first", "bytes"))
    what = f"line {place + 1} is {change}"
    if change == "json":
        changed, what = mutate_json(lines[place], rng)
        lines[place], what = changed + b"\n", f"line {place + 1}: {what}"
    elif change == "bytes":
        lines[place], what = mutate_bytes(lines[place], rng)
    elif change == "twice":
        lines.insert(place, lines[place])
    else:
        line = lines.pop(place)
        lines = [line, *lines] if change == "first" else lines
    return b"".join(lines), what


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes with one damage; half of the time near the beginning, where headers are."""
    size = len(data)
    place = rng.randrange(size + 1) if rng.random() < 0.5 else rng.randrange(min(size, 512) + 1)
    length = rng.choice((1, 4, 8, 64, 4096))
    noise = rng.choice((rng.randbytes(length), b"\0" * length, b"\xff" * length))
    kind = rng.choice(
        ("flipped", "flipped", "overwritten", "overwritten", "cut", "longer", "inserted", "lost", "empty")
    )
    if kind == "flipped":
        if not size:
            return b"\x01", "one byte"
        place = min(place, size - 1)
        changed = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    elif kind == "overwritten":
        noise = noise[: max(0, size - place)]
        changed = data[:place] + noise + data[place + len(noise) :]
    else:
        changed = {
            "cut": data[:place],
            "longer": data + noise,
            "inserted": data[:place] + noise + data[place:],
            "lost": data[:place] + data[place + length :],
            "empty": b"",
        }[kind]
    return changed, f"{kind} at byte {place} of {size}"
