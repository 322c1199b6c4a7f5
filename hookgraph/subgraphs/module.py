"""`ModuleGraph`: any module at a location, its output a location: a probe, an adapter, a replacement."""

from typing import Final, Literal, TypeAlias, final, get_args

from jaxtyping import Float
from torch import Tensor, nn

from hookgraph.errors import ShapeMismatchError, SubgraphError, nearest
from hookgraph.graph.abstract import AbstractSubgraph, Frame
from hookgraph.graph.arguments import a_location
from hookgraph.ontology.dimensions import Dimension
from hookgraph.ontology.locations import Location, LocationType

MODULE_OUT: Final = LocationType(
    "module_out", (Dimension.BATCH, Dimension.POS, Dimension.D_MODEL), 10, layered=False
)
"""What an injected module returns for each position."""

OutputUse: TypeAlias = Literal["read", "added", "replacing"]
"""What becomes of the output: it is only `read`, `added` to the value at the site, or `replacing` it."""


@final
class ModuleGraph(AbstractSubgraph):
    """y = module(x) at a location; what goes on is x, x + y or y. The gradient is the true one.

    Args:
        module: is called with the value at `read`.
        at: the site whose value goes on.
        output: what becomes of y.
        read: what the module reads, if another site, before `at`.
        name: its name, a part of its location's name.

    Raises:
        SubgraphError: sites in the wrong order, or an unknown use of the output.
    """

    def __init__(
        self,
        module: nn.Module,
        at: Location,
        output: OutputUse = "read",
        read: Location | None = None,
        name: str = "module",
    ) -> None:
        at, read = a_location(at), None if read is None else a_location(read)
        if output not in get_args(OutputUse):
            raise SubgraphError(f"output={output!r} is unknown: {nearest(output, get_args(OutputUse))}")
        if read is not None and not read.precedes(at):
            raise SubgraphError(f"a module reads before it writes: {read} is not before {at}")
        self.module = module
        self.output_use: OutputUse = output
        self.name = name
        self.site = at
        self.read = at if read is None else read
        self.sites = tuple(dict.fromkeys((self.read, at)))
        self.output = MODULE_OUT().within(at, name)

    @property
    def acts(self) -> bool:
        """Unless its output is only read."""
        return self.output_use != "read"

    @property
    def locations(self) -> tuple[Location, ...]:
        """The output."""
        return (self.output,)

    def visit(self, site: Location, value: Float[Tensor, "..."], frame: Frame) -> Float[Tensor, "..."]:
        """Call the module.

        Raises:
            SubgraphError: someone edits an output that is only read.
            ShapeMismatchError: the output does not fit the site.
        """
        if site != self.site:
            frame.memory["read"] = value
            return value
        x = value if self.read == self.site else frame.memory.pop("read")
        y = frame.tap(self.output, self.module(x))
        if self.output_use == "read":
            if frame.edited(self.output):
                raise SubgraphError(f"{self.output} is read by nothing: an edit there would do nothing")
            return value
        if y.shape != value.shape:
            raise ShapeMismatchError(
                f"the module of {self.output} returns {tuple(y.shape)}, the value at {site} has shape "
                f"{tuple(value.shape)}"
            )
        return value + y if self.output_use == "added" else y
