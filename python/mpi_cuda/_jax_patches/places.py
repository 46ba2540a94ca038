"""Where the collectives of a program stand in it, if how often they run depends on data.

Ranks compare such collectives one by one. Those of one program that stand in different loops, or in
a loop and outside of it, do not belong together, however alike they are: a rank has run its loop
more often than another. So each says its place, which is the innermost loop around it. A loop is
known by the collectives in it and its line. Branches of a `cond` may differ between ranks, and may
do the same operations, so what is in them says none.
"""

from __future__ import annotations

import hashlib
from typing import Any

from mpi_cuda import _library, _where
from mpi_cuda._jax_patches import jaxprs, uniform
from mpi_cuda._jax_patches.patch import Patch
from mpi_cuda._library import REDUCTIONS

PATCHES = (
    Patch(
        what="loops and branches are known by their names",
        used=(
            "lax.control_flow.conditionals.cond_p",
            "lax.control_flow.loops.scan_p",
            "lax.control_flow.loops.while_p",
        ),
        without="ranks that run a loop more or less often than others may get wrong numbers",
        test="test_loops_whose_length_depends_on_data",
    ),
)

ATTRIBUTE = "place"

_LOOPS = ("scan", "while")
_MESSAGES = ("send", "recv", "sendrecv", "isend", "irecv", "wait", "wait_send")
# Bits of a place that say which loop it is; those above say which program.
_SITE_BITS = 16


def _collective(eqn: Any) -> list[Any] | None:
    """What a collective is on every rank."""
    name = eqn.primitive.name.removeprefix("mpi_cuda_")
    if name in _MESSAGES:
        return None
    attributes = dict(eqn.params["attributes"])
    op = attributes.get("op", 0)
    # The user's reductions have other numbers on other ranks, and so have communicators.
    known = [name, op if op in range(len(REDUCTIONS)) else None, attributes.get("root")]
    return known + list(uniform.same_everywhere(name, eqn) or ())


def _structure(jaxpr: Any, effect: Any) -> list[Any]:
    """The collectives in `jaxpr`, and what they stand in, without the lengths of loops."""
    found: list[Any] = []
    for eqn in jaxpr.eqns:
        if effect not in eqn.effects:
            continue
        if "attributes" in eqn.params:
            found += filter(None, [_collective(eqn)])
            continue
        inside = [_structure(jaxprs.bare(p), effect) for p in jaxprs.in_params(eqn.params)]
        if eqn.primitive.name in (*_LOOPS, "cond"):
            found += [(eqn.primitive.name, inside)] if any(inside) else []
        else:
            found += [item for program in inside for item in program]
    return found


def _has_loop(structure: list[Any]) -> bool:
    return any(isinstance(item, tuple) and item[0] in _LOOPS for item in structure)


def _line(eqn: Any) -> str:
    """The line of the user's code that an equation comes from, as far as JAX knows it."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        if _where.is_users(frame.file_name):
            line = _where.words(frame.file_name, frame.line_num, frame.function_name)
            return f" ({line})"
    return ""


def _loop(eqn: Any, effect: Any) -> tuple[str, str] | None:
    """What a loop is known by: the collectives in it, if there are some, and its line."""
    inside = [_structure(jaxprs.bare(p), effect) for p in jaxprs.in_params(eqn.params)]
    return (repr((eqn.primitive.name, inside)), _line(eqn)) if any(inside) else None


class _Places:
    """Gives the collectives of one program their places."""

    def __init__(self, jaxpr: Any, structure: list[Any], effect: Any, name: str):
        # By what is in a loop and its line. JAX decides by itself which calls of a function share a
        # program, and that may differ between ranks.
        self.sites: dict[tuple[str, str], int] = {}
        numbers = self.loops(jaxpr, effect)
        # Programs whose loops are told apart otherwise are others.
        known = repr((structure, numbers)).encode()
        digest = hashlib.blake2b(known, digest_size=8).digest()
        program = int.from_bytes(digest, "little") >> (_SITE_BITS + 1)
        self.first = (program or 1) << _SITE_BITS
        self.effect = effect
        self.name = name
        # A program that is called twice in one place stays one program, which is lowered once.
        self.placed: dict[tuple[int, int], tuple[Any, Any]] = {}
        self.describe(0, f"outside of the loops of {name}")
        for (_, line), number in self.sites.items():
            self.describe(number, f"in loop {number} of {name}{line}")

    def describe(self, site: int, words: str) -> None:
        _library.load().mpi_cuda_describe(self.first + site, 0, words.encode())

    def loops(self, jaxpr: Any, effect: Any) -> list[int]:
        """The numbers of the loops with collectives, in their order."""
        found = []
        for eqn in jaxprs.bare(jaxpr).eqns:
            if effect in eqn.effects and "attributes" not in eqn.params:
                key = _loop(eqn, effect) if eqn.primitive.name in _LOOPS else None
                if key is not None:
                    found.append(self.sites.setdefault(key, len(self.sites) + 1))
                for program in jaxprs.in_params(eqn.params):
                    found += self.loops(program, effect)
        return found

    def program(self, program: Any, site: int) -> Any:
        known = self.placed.get((id(program), site))
        if known is None:
            eqns = [self.equation(eqn, site) for eqn in jaxprs.bare(program).eqns]
            # The original, too, so that its id stays its own.
            known = program, jaxprs.replace(program, eqns=eqns)
            self.placed[id(program), site] = known
        return known[1]

    def equation(self, eqn: Any, site: int) -> Any:
        name = eqn.primitive.name
        if self.effect not in eqn.effects or name == "cond":
            return eqn
        if "attributes" in eqn.params:
            if _collective(eqn) is None:
                return eqn
            place = (ATTRIBUTE, self.first + site)
            attributes = tuple(sorted((*eqn.params["attributes"], place)))
            return eqn.replace(params={**eqn.params, "attributes": attributes})
        if name in _LOOPS:
            # One without collectives is none.
            site = self.sites.get(_loop(eqn, self.effect) or ("", ""), site)
        params = dict(eqn.params)
        for key, value in eqn.params.items():
            if self.effect in getattr(value, "effects", ()) and hasattr(value, "eqns"):
                params[key] = self.program(value, site)
        return eqn.replace(params=params)


def place(jaxpr: Any, effect: Any) -> Any:
    """The program, whose collectives say their places if it has loops with some."""
    structure = _structure(jaxpr, effect)
    if not _has_loop(structure):
        return jaxpr
    name = str(getattr(jaxpr.debug_info, "func_name", "the program"))
    return _Places(jaxpr, structure, effect, name).program(jaxpr, 0)
