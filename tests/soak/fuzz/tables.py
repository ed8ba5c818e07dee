"""Damage to tables of numbers: .npy headers."""

from __future__ import annotations

import random

from tests.soak.fuzz import mutate


def mutate_npy(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """An .npy with a wrong number of rows, objects, or a header longer than the file."""
    kind = rng.random()
    if kind < 0.3:
        return mutate.mutate_bytes(data, rng)
    length = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    if kind < 0.5:
        at = rng.randrange(len(body) + 1)
        noise = rng.choice((b"\xff" * 8, b"\0" * 8, (2**63).to_bytes(8, "little"), (2**31).to_bytes(8, "little")))
        return data[: 10 + length] + (body[:at] + noise + body[at + 8 :])[: len(body)], f"rows overwritten at {at}"
    shape = header[header.index("'shape'") :].split(")")[0] + ")"
    descr = header[header.index("'descr'") : header.index(", 'fortran_order'")]
    changes = {
        "objects": (descr, "'descr': '|O'"),
        "objects in a row": (descr, "'descr': [('a', '|O'), ('b', '<u8')]"),
        "rows of no bytes": (descr, "'descr': '|V0'"),
        "rows of a terabyte": (descr, f"'descr': '|S{2**40}'"),
        "long integers": (descr, "'descr': '<i8'"),
        "times": (descr, "'descr': '<M8[s]'"),
        "a huge shape": (shape, f"'shape': ({2**40},)"),
        "a shape without end": (shape, f"'shape': ({2**62}, {2**62})"),
        "no rows": (shape, "'shape': (0,)"),
        "a number": (shape, "'shape': ()"),
        "a negative shape": (shape, "'shape': (-1,)"),
        "two dimensions": (shape, "'shape': (1, 1)"),
        "a thousand dimensions": (shape, "'shape': (" + "1," * 1000 + ")"),
        "other bytes in the row": ("<u4", "<u8"),
        "another byte order": ("<u8", ">u8"),
        "columns first": ("False", "True"),
        "code": (shape, "'shape': __import__('os')"),
        "brackets": (shape, "'shape': " + "(" * 5000),
        "a key more": (shape, shape + ", 'a': 1"),
    }
    what = rng.choice(list(changes))
    changed = header.replace(*changes[what]).encode("latin1").strip()
    changed += b" " * (-(len(changed) + 11) % 64) + b"\n"
    version = rng.choice((b"\x01\x00",) * 6 + (b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    if version != b"\x01\x00":
        size = rng.choice((len(changed), 2**32 - 1, 2**31))
        return data[:6] + version + size.to_bytes(
            4, "little"
        ) + changed + body, f"version {version[0]}, {size} bytes of header"
    return data[:8] + len(changed).to_bytes(2, "little") + changed + body, f"says {what}"
