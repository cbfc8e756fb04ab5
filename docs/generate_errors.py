"""Write the page of troubleshooting: every error sentence in vtoken's source, and what it says to do.

python docs/generate_errors.py  # prints the page, which is built with the site and not stored

The source is parsed, not run: all `raise X(...)`, and all functions that return an error for others to raise.
"""

from __future__ import annotations

import ast
import builtins
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "vtoken"
FIELD = "…"  # a value that is known when the error is raised
DEEPEST = 5  # names, conditions and calls that are followed to find a text
HEAD = f"""# Troubleshooting

Every error sentence that vtoken raises, from its source. {FIELD} stands for a value of your call. Search this
page for words of the sentence that you see: most say after their last colon what to do, the last column here.
"""


class Sentence(NamedTuple):
    error: str
    said: str
    remedy: str
    file: str


@dataclass
class Source:
    """What texts may refer to: constants and functions, by file and then by name."""

    constants: dict[str, dict[str, ast.expr]] = field(default_factory=lambda: defaultdict(dict))
    functions: dict[str, dict[str, ast.FunctionDef]] = field(default_factory=lambda: defaultdict(dict))
    imports: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    errors: set[str] = field(default_factory=set)

    def named(self, table: str, name: str, file: str) -> ast.AST | None:
        """The thing of a name in a file, else where that imports it from, else in the only other file."""
        tables, module = getattr(self, table), self.imports[file].get(name)
        places = [f for f, names in tables.items() if name in names]
        near = [f for f in places if f == file] or [f for f in places if f.endswith(f"/{module}.py")]
        chosen = near or (places if len(places) == 1 else [])
        return tables[chosen[0]][name] if chosen else None


@dataclass
class Scope:
    """A function of a file, and the texts of its parameters."""

    source: Source
    file: str
    function: ast.AST
    given: dict[str, list[str]] = field(default_factory=dict)
    depth: int = 0

    def values(self, name: str) -> list[ast.expr]:
        """Everything that is assigned to a name in this function."""
        return assigned(self.function).get(name, [])

    def deeper(self) -> Scope:
        return Scope(self.source, self.file, self.function, self.given, self.depth + 1)

    def texts(self, node: ast.expr | None) -> list[str]:
        """What an expression may say; `FIELD` for what only a run knows."""
        if node is None or self.depth > DEEPEST:
            return [FIELD]
        inside = self.deeper()
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return _joined(inside.texts(part) for part in parts)
            case ast.FormattedValue(value=ast.Name() as name):
                return inside.texts(name)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return _joined([inside.texts(left), inside.texts(right)])
            case ast.BinOp(left=left, op=ast.Mult(), right=right):  # a text times a condition
                text = left if isinstance(left, ast.Constant | ast.JoinedStr) else right
                return [*inside.texts(text), ""]
            case ast.IfExp(body=body, orelse=other):
                return [*inside.texts(body), *inside.texts(other)]
            case ast.BoolOp(values=values):
                return [text for value in values for text in inside.texts(value)]
            case ast.Subscript(value=value, slice=ast.Slice()):
                return inside.texts(value)
            case ast.Name(id=name):
                return self._of_name(name, inside)
            case ast.Call():
                return self._of_call(node)
        return [FIELD]

    def _of_name(self, name: str, inside: Scope) -> list[str]:
        if name in self.given:
            return self.given[name]
        values = self.values(name)
        if not values:
            constant = self.source.named("constants", name, self.file)
            values = [constant] if isinstance(constant, ast.expr) else []
        return list(dict.fromkeys(t for value in values for t in inside.texts(value))) or [FIELD]

    def _of_call(self, call: ast.Call) -> list[str]:
        """What a function of the package may return; of one that only changes a text, the text."""
        scope = self.called(call)
        if scope is None:
            return [FIELD]
        returned = [r.value for r in ast.walk(scope.function) if isinstance(r, ast.Return) and r.value]
        texts = [t for value in returned if not _is_none(value) for t in scope.texts(value)]
        if not any(map(_says, texts)):
            texts = [t for given in scope.given.values() for t in given if _says(t)]
        return list(dict.fromkeys(texts)) or [FIELD]

    def called(self, call: ast.Call) -> Scope | None:
        """The function of a call, with the texts of its arguments."""
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        function = self.source.named("functions", name, self.file) if name != "str" else None
        if not isinstance(function, ast.FunctionDef):
            return None
        owner = next(f for f, known in self.source.functions.items() if known.get(name) is function)
        parameters = [a.arg for a in function.args.args if a.arg != "self"]
        given = {p: self.deeper().texts(a) for p, a in zip(parameters, call.args)}
        given |= {k.arg: self.deeper().texts(k.value) for k in call.keywords if k.arg in parameters}
        return Scope(self.source, owner, function, given, self.depth + 1)

    def errors(self, node: ast.expr | None) -> list[tuple[str, str]]:
        """(class, text) of an expression that makes an error."""
        if isinstance(node, ast.BoolOp):
            return [found for value in node.values for found in self.errors(value)]
        if isinstance(node, ast.IfExp):
            return [*self.errors(node.body), *self.errors(node.orelse)]
        if not isinstance(node, ast.Call) or self.depth > DEEPEST:
            return []
        kinds = self._kinds(node.func)
        if kinds:
            every = [self.texts(a) for a in node.args]
            said = next((texts for texts in every if any(map(_says, texts))), [])
            return [(" or ".join(kinds), text) for text in said if _says(text)]
        scope = self.called(node)
        if scope is None:
            return []
        returned = [r.value for r in ast.walk(scope.function) if isinstance(r, ast.Return)]
        return [found for value in returned for found in scope.errors(value)]

    def _kinds(self, name: ast.expr) -> list[str]:
        """The classes that a callee may be, if it is a class of errors."""
        if isinstance(name, ast.IfExp):
            return [*self._kinds(name.body), *self._kinds(name.orelse)]
        if isinstance(name, ast.Attribute):
            return [name.attr] if name.attr.endswith(("Error", "Exception")) else []
        if not isinstance(name, ast.Name):
            return []
        if name.id in self.source.errors:
            return [name.id]
        return [kind for value in self.values(name.id) for kind in self._kinds(value)]


@functools.cache
def assigned(function: ast.AST) -> dict[str, list[ast.expr]]:
    """The values of the names of a function."""
    found = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id].append(node.value)
    return found


def _joined(parts: Iterable[list[str]]) -> list[str]:
    return [re.sub(f"{FIELD}+", FIELD, "".join(each)) for each in itertools.product(*parts)]


def _says(text: str) -> bool:
    return bool(re.search(r"[A-Za-z]{2}", text))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_error(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, BaseException)


def trees() -> dict[str, ast.Module]:
    """Parsed files of the package, by their path in the repository."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {
        str(f.relative_to(PACKAGE.parent).as_posix()): ast.parse(f.read_text(encoding="utf-8")) for f in files
    }


def source_of(files: dict[str, ast.Module]) -> Source:
    source = Source(errors={name for name in dir(builtins) if _is_error(name)})
    for file, tree in files.items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                source.constants[file][node.targets[0].id] = node.value
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                source.functions[file].setdefault(node.name, node)
            elif isinstance(node, ast.ImportFrom):
                module = (node.module or "").rpartition(".")[2]
                source.imports[file] |= {a.asname or a.name: module for a in node.names}
            elif isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases
            ):
                source.errors.add(node.name)
    return source


def sentences(files: dict[str, ast.Module]) -> list[Sentence]:
    """Every sentence with which the package may end a call, once per file."""
    source = source_of(files)
    found: dict[Sentence, None] = {}
    for file, tree in files.items():
        for function, node in _made(tree):
            value = node.exc if isinstance(node, ast.Raise) else node.value
            for error, text in Scope(source, file, function).errors(value):
                said, remedy = divided(" ".join(text.split()))
                found[Sentence(error, said, remedy, file)] = None
    return list(found)


def _made(tree: ast.Module) -> list[tuple[ast.AST, ast.Raise | ast.Return]]:
    """(innermost function, node) of every `raise`, and of every `return` whose caller may raise it."""
    found: list[tuple[ast.AST, ast.Raise | ast.Return]] = []
    waiting: list[tuple[ast.AST, ast.AST]] = [(tree, tree)]
    for node, function in waiting:
        if isinstance(node, ast.Raise | ast.Return):
            found.append((function, node))
        elif isinstance(node, ast.stmt | ast.Module | ast.ExceptHandler | ast.match_case):
            inside = node if isinstance(node, ast.FunctionDef) else function
            waiting += [(child, inside) for child in ast.iter_child_nodes(node)]
    return found


def divided(text: str) -> tuple[str, str]:
    """A sentence up to its last colon, and what it says to do after that; "" if it says nothing there."""
    said, colon, remedy = text.rpartition(": ")
    return (said + colon.rstrip(), remedy) if colon and _says(remedy) and _says(said) else (text, "")


def _cell(text: str) -> str:
    """Markdown of a text in a table; what stands in backticks stays code."""
    text = text.replace("|", "\\|").replace("<", "&lt;")
    parts = text.split("`")
    plain = (re.sub(r"([\\*_\[\]](?!\|))", r"\\\1", p) if i % 2 == 0 else p for i, p in enumerate(parts))
    return "`".join(plain)


def page() -> str:
    """Markdown: one section per room of the package, one row per sentence."""
    files = trees()
    rooms: dict[str, list[Sentence]] = defaultdict(list)
    for found in sentences(files):
        head, _, rest = found.file.removeprefix("vtoken/").partition("/")
        rooms["vtoken" + f".{head}" * bool(rest)].append(found)
    lines = [HEAD]
    for room in sorted(rooms):
        about = ast.get_docstring(files[room.replace(".", "/") + "/__init__.py"]) or ""
        lines += [f"## {room}", "", about.split("\n\n")[0].replace("\n", " "), ""]
        lines += ["| error | sentence | what to do |", "| --- | --- | --- |"]
        for s in sorted(rooms[room], key=lambda s: (s.said.lower(), s)):
            lines.append(f"| `{s.error}` | {_cell(s.said)} | {_cell(s.remedy)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
