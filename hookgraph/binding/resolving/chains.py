"""Find the layers of every stack of a model in a trace.

A layer is a module of a list whose output feeds the next one; for want of such, it is one part each of
several lists, or one of several modules of the same class that lie side by side and feed each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import TypeAlias, final

from torch import nn

from hookgraph.binding.resolving.blocks import Block, handed_on, resolve
from hookgraph.binding.resolving.interleaved import bypassed_layers, interleaved_layers
from hookgraph.binding.resolving.paths import STREAM_AXES, PathFinder
from hookgraph.binding.tracing.trace import Call, Trace

Lists: TypeAlias = dict[str, list[Call]]
"""The calls of the modules of a list, in order, by the path of the list."""


def find_chains(trace: Trace) -> dict[str, list[Block]]:
    """The layers of every stack of the model, by the path of the list that holds them.

    Streams that are gated by activations, and layers that lie in no list, are looked for only for want of
    others.
    """
    calls, alone = called_lists(trace), calls_side_by_side(trace)
    strict, gated = _Search(trace), _Search(trace, gated=True)
    return strict.among(calls) or strict.among(alone) or gated.among(calls) or gated.among(alone)


def called_lists(trace: Trace) -> Lists:
    """The calls of the modules of every list, and of every dictionary of modules of one class."""
    members: dict[nn.Module, str] = {}
    for path, module in trace.root.module.named_modules():
        alike = isinstance(module, nn.ModuleDict) and len({type(m) for m in module.children()}) == 1
        if alike or isinstance(module, (nn.ModuleList, nn.Sequential)):
            members.update(dict.fromkeys(module.children(), path))
    calls: Lists = {}
    for call in trace.calls:
        if call.module in members and call.outputs:
            calls.setdefault(members[call.module], []).append(call)
    return calls


def calls_side_by_side(trace: Trace) -> Lists:
    """The calls of modules of one class that a module has as attributes, where each feeds the next."""
    groups: dict[tuple[int, type[nn.Module]], list[Call]] = {}
    for call in trace.calls:
        if call.parents and call.outputs:
            groups.setdefault((call.parents[-1].number, type(call.module)), []).append(call)
    several = {key: calls for key, calls in groups.items() if len({c.module for c in calls}) > 1}
    return {
        f"{calls[0].parents[-1].path}:{number}": calls
        for number, calls in enumerate(several.values())
        if is_chain(calls)
    }


def is_chain(calls: list[Call]) -> bool:
    """Whether the output of each call feeds the next."""
    return all(handed_on(before, call) for before, call in pairwise(calls))


@final
@dataclass(frozen=True, slots=True)
class _Search:
    """The search for chains of layers in one trace; `gated`: whether a stream may be gated."""

    trace: Trace
    gated: bool = False

    def among(self, calls: Lists) -> dict[str, list[Block]]:
        """The chains among the calls of the modules of lists; for want of them, of parts of layers."""
        linked = {path: found for path, found in calls.items() if is_chain(found)}
        linked |= _braided({path: found for path, found in calls.items() if path not in linked})
        linked = {path: found for path, found in linked.items() if not self._only_holds_layers(found, linked)}
        inner = {c for found in linked.values() for c in found}
        outermost = {path: f for path, f in linked.items() if not inner & set(f[0].parents)}
        chains = self._resolved(outermost) or self._of_stages(linked)
        apart = {path: found for path, found in calls.items() if path not in linked}
        return self._with_more_between(apart, chains) or dict(self._of_parts())

    def _only_holds_layers(self, calls: list[Call], lists: Lists) -> bool:
        """Whether a list of one module is none of layers: that module holds a list of modules of one class,
        and adds nothing to the stream but what these add.
        """
        whole = resolve(self.trace, calls[0], gated=self.gated) if len(calls) == 1 else None
        if whole is None:
            return False
        added = {step.value for step in whole.adds}
        inner = (found for found in lists.values() if len(found) > 1 and calls[0] in found[0].parents)
        alike = [found for found in inner if len({type(call.module) for call in found}) == 1]
        for found in alike:
            pairs = zip_longest(found, found[1:])
            blocks = [b for pair in pairs if (b := resolve(self.trace, *pair, gated=self.gated)) is not None]
            if len(blocks) == len(found) and added == {step.value for b in blocks for step in b.adds}:
                return True
        return False

    def _resolved(self, lists: Lists, *, passed: bool = True) -> dict[str, list[Block]]:
        """The outermost lists of which every call is a layer, the stream being what it hands on to the next
        if it is `passed` on.
        """
        chains: dict[str, list[Block]] = {}
        taken: set[Call] = set()
        for path, found in sorted(lists.items(), key=lambda pair: len(pair[1][0].parents)):
            if taken & set(found[0].parents):
                continue
            following = found[1:] if passed else []
            pairs = zip_longest(found, following)
            resolved = (resolve(self.trace, call, after, gated=self.gated) for call, after in pairs)
            blocks = [block for block in resolved if block is not None]
            if blocks and len(blocks) < len(found):
                blocks = self._with_beginnings(found, blocks)
            if len(blocks) == len(found):  # one left out would shift the numbers of those after it
                chains[path] = blocks
                taken |= set(found)
        return chains

    def _with_beginnings(self, calls: list[Call], blocks: list[Block]) -> list[Block]:
        """The layers of a list among which are some that do not add to what they are given, but begin
        anew.
        """
        known = {block.call: block for block in blocks}
        found = (
            known.get(call) or resolve(self.trace, call, after, begins=True)
            for call, after in zip_longest(calls, calls[1:])
        )
        return [block for block in found if block is not None]

    def _of_stages(self, lists: Lists) -> dict[str, list[Block]]:
        """Lists inside the modules of other lists, where no stream leads through these: as stages that end
        with a map to another width. A stream of pictures, which convolutions read, is none.
        """
        chains = self._resolved(lists)
        return {
            path: blocks for path, blocks in chains.items() if blocks[0].entering.tensor.ndim < STREAM_AXES
        }

    def _with_more_between(self, lists: Lists, chains: dict[str, list[Block]]) -> dict[str, list[Block]]:
        """The chains, and those lists apart from them whose layers are given more than the layer before
        returns: something is added between them, as positions once more.
        """
        found = dict(chains)
        for path, blocks in self._resolved(lists, passed=False).items():
            taken = {block.call for others in found.values() for block in others}
            around = {parent for call in taken for parent in call.parents}
            own = {block.call for block in blocks}
            known = own & (taken | around) or taken & {parent for call in own for parent in call.parents}
            if len(blocks) > 1 and not known and all(self._leads_on(*pair) for pair in pairwise(blocks)):
                found[path] = blocks
        return found

    def _leads_on(self, before: Block, after: Block) -> bool:
        """Whether the stream leads from one layer to the next, whatever is added to it on the way."""
        between = replace(after.call, first=before.call.last)
        return PathFinder(self.trace, between, before.leaving, before.grid).path(after.entering) is not None

    def _of_parts(self) -> Iterator[tuple[str, list[Block]]]:
        """The layers that are no modules, by the path of what holds them."""
        for path, layers in (*interleaved_layers(self.trace), *bypassed_layers(self.trace)):
            blocks = [resolve(self.trace, call, gated=self.gated) for call, _ in layers]
            found = [
                replace(b, ends=ends) for b, (_, ends) in zip(blocks, layers, strict=True) if b is not None
            ]
            if len(found) == len(layers):
                yield path, found


def _braided(calls: Lists) -> Lists:
    """Lists whose modules take turns, as layers and cross-attentions between them: each feeds the next."""
    groups: dict[tuple[Call, ...], list[str]] = {}
    for path, found in calls.items():
        groups.setdefault(found[0].parents, []).append(path)
    chains: Lists = {}
    for paths in groups.values():
        found = sorted((c for path in paths for c in calls[path]), key=lambda c: c.number)
        if len(paths) > 1 and is_chain(found):
            chains[" and ".join(paths)] = found
    return chains
