"""Counts of the code, for comparing two states of this repository: `python tools/house.py [--root DIR]`.

Reads source files without importing them, so it works on any checkout. It counts:

- Lines: all lines of a `.py` file, by the folder (or single file) of `ross_mcore` that it belongs to. The total of the
  trainer's package leaves out the folders of NOT_TRAINER, which may be inside or outside the package.
- Functions: of `ross_mcore`, `tools` and `pretrain_ross.py`, methods and nested functions included; the length runs
  from `def` to the last line. Parameters are those with a name, without `self`, `cls`, `*args` and `**kwargs`.
  The `__init__` that a dataclass generates is not a function of the source and does not count.
- The loop: distinct modules of `ross_mcore` that `training/loop.py` imports, and the names it imports from them.
- An option's files: files of `ross_mcore` and `tools` whose text has the word `supervise_final_eos`.
- A part's prefix: files of `ross_mcore` and `tools` with a string literal (pieces of f-strings included, docstrings
  not) in which a name of PARTS starts a dotted name, as in "denoiser.net" or r"language_model\\.decoder"; a name after
  another dot ("model.pixel_decoder.x") belongs to another format. Also literals equal to a name of PARTS, except
  "denoiser" and "pixel_decoder", which are sections of config.json as well.
- Exceptions caught by name in `train`: classes in its `except` clauses, tuples of the same file resolved.
- Comments `type: ignore` and `noqa: E402`: of all `.py` files outside hidden folders. A reason is text in a second
  comment behind `type: ignore[code]`. This file is in no count.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "ross_mcore"
NOT_TRAINER = ("parity", "commands")
LOOP = f"{PACKAGE}/training/loop.py"
OPTION = "supervise_final_eos"
PARTS = ("vision_model", "vision_projection", "language_model", "denoiser", "pixel_decoder")
PREFIX = re.compile(rf"(?<![\w.])({'|'.join(PARTS)})\\?\.\S|^({'|'.join(PARTS)})\.$|^({'|'.join(PARTS[:3])})$")
MOST_PARAMETERS = 7
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints counts of the code of a checkout of this repository.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], metavar="DIR", help="the checkout")
    root: Path = parser.parse_args().root
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not re.search(r"(^|/)\.", name) and name != "tools/house.py"]
    files = {name: (root / name).read_text(encoding="utf-8") for name in names}
    code = {name: text for name, text in files.items() if name.startswith((f"{PACKAGE}/", "tools/", "pretrain_ross"))}
    trees = {name: ast.parse(text) for name, text in code.items()}

    print_lines({name: text for name, text in code.items() if name.startswith(f"{PACKAGE}/")})
    functions = [(name, node) for name, tree in trees.items() for node in ast.walk(tree) if isinstance(node, Function)]
    longest = sorted(functions, key=lambda entry: (-length(entry[1]), entry[0]))[:10]
    show("largest functions (lines)", [f"{length(node):4} {name}:{node.name}" for name, node in longest])
    many = [(len(parameters(node)), name, node.name) for name, node in functions]
    many = sorted((entry for entry in many if entry[0] > MOST_PARAMETERS), reverse=True)
    show(f"functions with more than {MOST_PARAMETERS} parameters", [f"{n:4} {file}:{name}" for n, file, name in many])
    modules, imported = imports_of_loop(trees[LOOP], set(code))
    show(f"own modules imported by the loop ({imported} names)", sorted(modules))
    show(f"files with {OPTION}", [name for name, text in code.items() if re.search(rf"\b{OPTION}\b", text)])
    spelled = {name: {text for text in literals(tree) if PREFIX.search(text)} for name, tree in trees.items()}
    show("files that spell a part's prefix", [f"{name} ({len(texts)})" for name, texts in spelled.items() if texts])
    show("exception classes caught by name in train", caught(trees[LOOP], "train"))
    comments = [(name, comment) for name, text in files.items() for comment in comments_of(text)]
    ignores = [(name, comment) for name, comment in comments if "type: ignore" in comment]
    without = sum(not re.search(r"type: ignore\[[^]]*\]\s*#\s*\w", comment) for _, comment in ignores)
    own = sum(name.startswith(f"{PACKAGE}/") for name, _ in ignores)
    print(f"{'type: ignore':46} {len(ignores):6}, {own} in {PACKAGE}; {without} without a reason")
    print(f"{'noqa: E402':46} {sum('noqa: E402' in comment for _, comment in comments):6}")


def print_lines(package: dict[str, str]) -> None:
    """Prints lines and files of each folder of the package, and the total of the trainer."""
    lines, count = Counter[str](), Counter[str]()
    for name, text in package.items():
        room = name.split("/")[1]
        lines[room] += len(text.splitlines())
        count[room] += 1
    for room in sorted(lines):
        print(f"{room + ('' if room.endswith('.py') else '/'):28} {lines[room]:6} lines {count[room]:4} files")
    trainer = [room for room in lines if room not in NOT_TRAINER]
    total = sum(lines[room] for room in trainer), sum(count[room] for room in trainer)
    print(f"{'total of the trainer':28} {total[0]:6} lines {total[1]:4} files (without {', '.join(NOT_TRAINER)})\n")


def show(title: str, entries: list[str]) -> None:
    print(f"{title:46} {len(entries):6}")
    print(*(f"    {entry}" for entry in entries), sep="\n", end="\n\n")


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: Function) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def imports_of_loop(tree: ast.Module, files: set[str]) -> tuple[set[str], int]:
    """Own modules that the loop imports, and the number of names imported from them; a module counts as one name."""
    modules: set[str] = set()
    names = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = {f"{inner.replace('.', '/')}.py", f"{inner.replace('.', '/')}/__init__.py"} & files
                modules.add(inner if is_module else str(node.module))
                names += 1
        elif isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            modules.update(own)
            names += len(own)
    return modules, names


def literals(tree: ast.Module) -> Iterator[str]:
    """String literals, pieces of f-strings included; docstrings, also those of attributes, excluded."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def caught(tree: ast.Module, function: str) -> list[str]:
    """Names in the `except` clauses of a function; names of tuples in the module are replaced by their contents."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)]
    tuples = {target.id: node.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}

    def resolved(node: ast.expr) -> Iterable[str]:
        if isinstance(node, ast.Name) and node.id in tuples:
            return resolved(tuples[node.id])
        if isinstance(node, ast.Tuple):
            return [name for element in node.elts for name in resolved(element)]
        return resolved(node.value) if isinstance(node, ast.Starred) else [ast.unparse(node)]

    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    handlers = [node for node in ast.walk(body) if isinstance(node, ast.ExceptHandler) and node.type is not None]
    return sorted({name for handler in handlers if handler.type is not None for name in resolved(handler.type)})


def comments_of(text: str) -> Iterator[str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return (token.string for token in tokens if token.type == tokenize.COMMENT)


if __name__ == "__main__":
    main()
