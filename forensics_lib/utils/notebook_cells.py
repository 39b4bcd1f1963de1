"""Parameters set in the cells of a running notebook."""

from __future__ import annotations

import ast
import io
import tokenize
from typing import Any


def notebook_parameters() -> dict[str, Any]:
    """The parameters set in the running notebook's ``# Parameters`` cells: its own, then papermill's injected one.

    Only names assigned in those cells, as last executed, count: neither variables of other cells nor deleted lines are
    parameters.  If the kernel keeps no history of cells (under nbval), every plain value counts.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        raise RuntimeError("notebook_parameters() works in a notebook; elsewhere call load_params(path)")
    return parameters_in(shell.user_ns)


def parameters_in(namespace: dict[str, Any]) -> dict[str, Any]:
    """The parameters in a kernel's namespace; see ``notebook_parameters``."""
    cells = _parameters_cells(namespace.get("In", []))
    names = {name for source in cells for name in assigned_names(source)}
    if not cells:
        plain = (str, int, float, list, dict, type(None))
        names = {name for name, value in namespace.items() if isinstance(value, plain) and name not in ("In", "Out")}
    return {name: namespace[name] for name in sorted(names) if name in namespace and not name.startswith("_")}


def _parameters_cells(history: list[str]) -> list[str]:
    """The ``# Parameters`` cells in a kernel's history, as last executed: the notebook's own, then papermill's.

    Papermill's cell holds plain assignments only, was first executed right after the notebook's own, and repeats no line
    of that.
    """
    own = injected = None
    before = ""
    for source in history:
        if source.lstrip().startswith("# Parameters") and (plain := _plain_assignments(source)) is not None:
            repeats = own is not None and set(source.splitlines()[1:]) & set(own.splitlines()[1:])
            if plain and own is not None and not repeats and (injected is not None or before == own):
                injected = source
            else:
                own = source
        before = source
    return [source for source in (own, injected) if source is not None]


def _plain_assignments(source: str) -> bool | None:
    """Whether a cell has neither annotations nor comments after its first line, as papermill writes it; None: not Python."""
    try:
        typed = any(isinstance(node, ast.AnnAssign) for node in ast.parse(source).body)
    except SyntaxError:
        return None
    comments = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT]
    return not typed and len(comments) == 1


def assigned_names(source: str) -> list[str]:
    """The names assigned at the top level of a cell's source, in order."""
    names = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names
